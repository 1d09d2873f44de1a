"""The fingerprint of a base's weights, by which an adapter recognises the base that it was trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from loralib.model import factors_of, unwrapped

_CHUNK = 1 << 22  # values hashed at once: bounds the memory, and lets several threads hash one large embedding
BEFORE_SHARDING = "_fingerprint_before_sharding"  # the attribute in which shard_frozen stores a model's fingerprint


def base_fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """SHA-256 over the name, shape and every value of the base's parameters and saved buffers, as a hex string.

    Floating-point values are first rounded to bfloat16, so that a base and its copy in bfloat16 have the same
    fingerprint; any base whose values round to the same numbers has it too. Low-rank factors are left out. A merged
    layer counts with its base weight, and a quantised weight with the tensors that it stores. A sharded model has the
    fingerprint from before sharding, without what was trainable then, because no process has all its values.
    184M float32 parameters took 0.12 s on two CPU cores.

    Args:
        model: wrappers are removed first. exclude: names of parameters and buffers that belong to the adapter (the
            head).
    """
    model = unwrapped(model)
    if hasattr(model, BEFORE_SHARDING):
        return getattr(model, BEFORE_SHARDING)
    state = model.state_dict(keep_vars=True)  # for a merged layer it holds the base's weight
    seen = {id(factor) for factor in factors_of(model)} | {id(state[name]) for name in exclude if name in state}
    parts: list[tuple[str, Tensor]] = []
    for name, tensor in state.items():
        if id(tensor) in seen or not isinstance(tensor, Tensor):
            continue
        seen.add(id(tensor))  # a tensor that has several names counts once, under the first
        if hasattr(tensor, "__tensor_flatten__"):  # quantised
            parts += [(f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0]]
        else:
            parts.append((name, tensor))
    pieces: list[bytes | Tensor] = []
    for name, tensor in sorted(parts, key=lambda part: part[0]):
        pieces += [f"{name} {tuple(tensor.shape)}".encode(), *tensor.detach().flatten().split(_CHUNK)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(_digest, pieces))).hexdigest()


def _digest(piece: bytes | Tensor) -> bytes:
    if isinstance(piece, Tensor):
        rounded = piece.to(torch.bfloat16) if piece.is_floating_point() else piece
        piece = rounded.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(piece).digest()
