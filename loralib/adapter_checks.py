"""Whether a saved adapter fits a model: places, shapes and the base's weights."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from loralib.adapter_files import AdapterConfig, LayerGroup
from loralib.injection import check_replaceable, is_linear
from loralib.layers import LoRALayer, factor_shapes
from loralib.model import factors_of, lora_layers, unwrapped
from loralib.stored_weight import frozen_shape, stored_form


def check_adapter(
    model: nn.Module,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    allow_other_base: bool = False,
    any_head_shape: bool = False,
) -> None:
    """Raises ValueError unless the adapter fits the model, see :func:`load_adapter`.

    Args:
        any_head_shape: the adapter's head may have other shapes than the model's.
    """
    present, state = lora_layers(model), model.state_dict(keep_vars=True)
    _refuse_merged(present)
    if present and set(present) != set(config.ranks):
        odd = sorted(set(present) ^ set(config.ranks))[0]
        raise ValueError(f"the model's low-rank layers are not the adapter's (see {odd}): load it into the plain base")
    expected = _factor_shapes(model, config)
    for name in config.head:
        if name not in state:
            raise ValueError(f"the model has no parameter {name}: {_architectures(model, config)}")
        expected[name] = tuple((tensors.get(name, state[name]) if any_head_shape else state[name]).shape)
    _compare(expected, tensors, config)
    for name in [*config.head, *(f"{name}.weight".removeprefix(".") for name in config.ranks)]:
        _refuse_meta(name, state[name])
    if not allow_other_base:
        check_base(model, config, ", or allow another base explicitly (allow_other_base)")


def _refuse_meta(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load the base's weights first")


def check_start(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless the model's low-rank layers are those of the adapter. The model may be on "meta"."""
    layers = lora_layers(model)
    _refuse_merged(layers)
    saved = {name: group for group in config.groups for name in group.rank_pattern}
    if set(saved) != set(layers):
        odd = sorted(set(saved) ^ set(layers))[0]
        raise ValueError(f"the adapter adapts other modules than the model (see {odd}): adapt the same modules")
    for name, layer in layers.items():
        group = saved[name]
        if (group.r, tuple(group.widths), group.kind == "lora") != (layer.r, layer.widths, layer.lora_E is None):
            raise ValueError(
                f"the adapter has {_settings(group.kind == 'lora', group.r, group.widths)} in {name}, the model "
                f"{_settings(layer.lora_E is None, layer.r, layer.widths)}: give the same method, rank and widths"
            )
    shared_by: dict[int, str] = {}  # the model's outer factors -> the stored tensor for them
    for name in (name for name, rank in config.ranks.items() if rank):
        for factor, parameter in zip(factor_names(name, layers[name]), layers[name].lora_parameters(), strict=True):
            stored = config.tied.get(factor, factor)
            if shared_by.setdefault(id(parameter), stored) != stored:
                raise ValueError("the model's layers share outer factors, the adapter's do not: leave share_outer out")
    factors = {name: tensor for name, tensor in tensors.items() if name not in config.head}
    _compare(_factor_shapes(model, config), factors, config)


def factor_names(layer_name: str, layer: LoRALayer) -> list[str]:
    """Names of ``layer.lora_parameters()``, in that order."""
    own = {id(parameter): name for name, parameter in layer.named_parameters()}
    prefix = f"{layer_name}." if layer_name else ""
    return [prefix + own[id(parameter)] for parameter in layer.lora_parameters()]


def _settings(plain: bool, r: int, widths: Sequence[int]) -> str:
    return f"{'LoRA' if plain else 'singular values'} of rank {r}" + (f" and widths {list(widths)}" if widths else "")


def _refuse_merged(layers: dict[str, LoRALayer]) -> None:
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the model holds a merged adapter: call unmerge_adapter() first")


def architecture_of(model: nn.Module) -> str:
    """The name of the model's class; ``fully_shard`` has put a class of its own before it."""
    return next(c.__name__ for c in type(model).__mro__ if all(base.__name__ != "FSDPModule" for base in c.__mro__))


def _architectures(model: nn.Module, config: AdapterConfig) -> str:
    if config.architecture == architecture_of(model):
        return "the adapter's base has more layers, or its method adds modules, which this model lacks"
    return f"the adapter was made for a {config.architecture}, this is a {architecture_of(model)}"


def check_base(model: nn.Module, config: AdapterConfig, other_way: str = "") -> None:
    if base_fingerprint(model, config.head) != config.base_fingerprint:
        origin = config.base_model or "unnamed"
        revision = f", revision {config.base_revision}" if config.base_revision else ""
        raise ValueError(
            f"the base's weights are not those the adapter was trained on ({origin}{revision}): load that "
            f"base{other_way}"
        )


def _factor_shapes(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every factor that the adapter's file must hold, by its configuration and the model."""
    modules = dict(model.named_modules())
    expected: dict[str, tuple[int, ...]] = {}
    pruned: dict[str, tuple[int, ...]] = {}  # of layers with nothing stored, which may share outer factors
    for group in config.groups:
        for name, flags in group.rank_pattern.items():
            if name not in modules or not is_linear(modules[name]):
                raise ValueError(f"the model has no linear layer {name}: {_architectures(model, config)}")
            check_replaceable(name, modules[name])
            if len(flags) > group.r:
                raise ValueError(f"the adapter's rank pattern of {name} has {len(flags)} values, its rank is {group.r}")
            most = max(1024, *frozen_shape(modules[name]))
            if max(group.r, *group.widths, 0) > most:  # a layer that is pruned whole has no tensor that limits them
                raise ValueError(f"the adapter's rank or width of {name} is beyond {most}")
            shapes = expected if "1" in flags else pruned
            shapes.update(_shapes_of_one(name, modules[name], group, flags.count("1")))
    for alias, stored in config.tied.items():
        shape = expected.pop(alias, pruned.get(alias))
        if shape is None or expected.get(stored) != shape or not re.search(r"\.lora_[AB]\.\d+$", alias):
            raise ValueError(f"the adapter's configuration ties {alias} to {stored}, which does not fit")
    return expected


def _shapes_of_one(name: str, module: nn.Module, group: LayerGroup, rank: int) -> dict[str, tuple[int, ...]]:
    left, right = factor_shapes(*frozen_shape(module), group.widths, rank)
    prefix = f"{name}." if name else ""
    shapes: dict[str, tuple[int, ...]] = {} if group.kind == "lora" else {f"{prefix}lora_E": (rank,)}
    for side, of_side in (("B", left), ("A", right)):
        shapes |= {f"{prefix}lora_{side}.{i}": shape for i, shape in enumerate(of_side)}
    return shapes


def _compare(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], config: AdapterConfig) -> None:
    for name in sorted(set(expected) ^ set(tensors)):
        raise ValueError(f"{'unknown' if name in tensors else 'missing'} tensor {name} in the adapter's file")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)} in the adapter, the model needs {shape}: load the "
                f"base it was trained on ({config.base_model or config.architecture})"
            )


# ---- fingerprint ----------------------------------------------------------------------------------------------------

_CHUNK = 1 << 22  # values hashed at once: this bounds the memory and spreads a large embedding over the threads
_KEPT = "_fingerprint_before_sharding"


def base_fingerprint(model: nn.Module, exclude: Collection[str] = ()) -> str:
    """SHA-256 over the name, shape and every value of the base's parameters and saved buffers, as a hex string.

    Floating-point values are first rounded to bfloat16, so that a base and its copy in bfloat16 have the same
    fingerprint. A base that differs by less than this rounding in every value has it too. Low-rank factors do not
    count, a merged layer counts with its base weight, and a quantised weight with the tensors that it stores. Of a
    sharded model this is the fingerprint that it had before, since no process has all its values. 184M float32
    parameters took 0.12 s on two CPU cores.

    Args:
        model: wrappers are looked through. exclude: names of parameters and buffers that belong to the adapter (the
            head).

    Raises:
        ValueError: for a model on the meta device, and for a sharded one whose trainable parameters have changed since.
    """
    model = unwrapped(model)
    tensors = _base_tensors(model, exclude)
    if any(stored_form(tensor) == "sharded" for tensor in tensors.values()):
        head, digest = getattr(model, _KEPT, (None, ""))
        if head != set(exclude):
            raise ValueError("the model was sharded with other trainable parameters: set them before shard_frozen()")
        return digest
    chunks: list[tuple[bytes, Tensor]] = []
    for name, tensor in sorted(_stored_parts(tensors)):
        _refuse_meta(name, tensor)
        flat = tensor.detach().flatten()
        chunks.append((f"{name} {tuple(tensor.shape)}".encode(), flat[:0]))
        chunks += [(b"", part) for part in flat.split(_CHUNK)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return hashlib.sha256(b"".join(pool.map(_chunk_digest, chunks))).hexdigest()


def keep_fingerprint(model: nn.Module, exclude: Collection[str]) -> None:
    """Keep the fingerprint of a model that is about to be sharded; ``exclude`` as in :func:`base_fingerprint`."""
    setattr(unwrapped(model), _KEPT, (set(exclude), base_fingerprint(model, exclude)))


def _stored_parts(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and plain tensors: a quantised one as the tensors inside it."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            yield from ((f"{name}.{part}", getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
        else:
            yield name, tensor


def _base_tensors(model: nn.Module, exclude: Collection[str]) -> dict[str, Tensor]:
    """Each base tensor once, under the first of its names."""
    skip = set(map(id, factors_of(model)))
    merged = {id(layer.weight): layer.base_weight() for layer in lora_layers(model).values() if layer.merged}
    state = model.state_dict(keep_vars=True)
    skip |= {id(state[name]) for name in exclude if name in state}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and id(tensor) not in skip:
            skip.add(id(tensor))
            found[name] = merged.get(id(tensor), tensor)
    return found


def _chunk_digest(chunk: tuple[bytes, Tensor]) -> bytes:
    label, values = chunk
    rounded = values.to(torch.bfloat16) if values.is_floating_point() else values
    data = rounded.cpu().contiguous().view(torch.uint8).numpy() if values.numel() else b""
    return hashlib.sha256(label + data if label else data).digest()


# ---- merging --------------------------------------------------------------------------------------------------------


def refuse_merging(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError where ΔW cannot be added to the weight of a named module: where it is quantised, sharded or
    computed by a hook, or where another module uses it too, as an output layer that is tied to the embedding does."""
    users: dict[int, list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(module_name, recurse=False):
            users[id(parameter)].append(parameter_name)
    for name in names:
        own = f"{name}.weight" if name else "weight"
        weight = model.get_submodule(name).weight
        if stored_form(weight) is not None:
            raise ValueError(f"{own} is {stored_form(weight)}: save the adapter, and merge it into the plain base")
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"{own} is computed by a hook (pruning, a parametrisation): remove that first")
        others = [user for user in users[id(weight)] if user != own]
        if others:
            raise ValueError(
                f"{own} is tied to {others[0]}, which a merge would change too: untie them, or do not merge"
            )
