"""Split frozen weights over several processes with FSDP2; every process keeps the whole factors and head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loralib.fingerprint import BEFORE_SHARDING, base_fingerprint
from loralib.layers import stored_form
from loralib.model import factors_of, head_tensors, unwrapped


def shard_frozen(model: nn.Module, device_type: str = "cpu") -> None:
    """Split every frozen parameter of ``model`` over all processes, in place; factors and trainable ones stay whole.

    The weights of a block (an entry of an ``nn.ModuleList``) are gathered for its forward and its backward pass and
    freed after each. Wrap the model in ``DistributedDataParallel``, which leaves the split weights alone and averages
    the gradients of the others once a step. Penalty, allocator, exact factors, checkpoints and
    :func:`loralib.save_adapter` then work as in one process. Merging needs whole weights and is refused.

    Args:
        model: the same on every process, with its low-rank layers injected and its ``requires_grad`` flags set, which
            are not changed. Call :func:`loralib.interop.precision.cast_frozen` before this.
        device_type: type of the devices on which the processes compute, ``"cpu"`` or ``"cuda"``.

    Raises:
        ValueError: for a weight that is sharded or quantised already, or if there is no process group. The model is
            unchanged then.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and (form := stored_form(parameter)) is not None:
            raise ValueError(f"{name} is {form} already, and FSDP splits only plain weights: leave out one of the two")
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    units = [*_units(model), model]
    setattr(unwrapped(model), BEFORE_SHARDING, base_fingerprint(model, head_tensors(model)))
    whole = {p for p in model.parameters() if p.requires_grad or p.dim() == 0} | set(factors_of(model))
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    split = [name for name, p in model.named_parameters(remove_duplicate=False) if stored_form(p) == "sharded"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, split)


def _units(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered as a whole: each block, and the two embeddings unless they share their weight."""
    found: list[Any] = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    embeddings = [module for module in found if isinstance(getattr(module, "weight", None), Tensor)]  # ViT's lack one
    tied = len({id(module.weight) for module in embeddings}) < len(embeddings)
    apart = [] if tied else [module for module in embeddings if not module.weight.requires_grad]
    return [*_blocks(model), *apart]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost module lists, each once, without containers, which are never called."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in dict.fromkeys(child) if type(block).forward is not nn.Module.forward)
        else:
            yield from _blocks(child)
