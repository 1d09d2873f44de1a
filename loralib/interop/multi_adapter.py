"""Several adapters on one base: switch by name, or give every row of a batch its own. The base never changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from loralib.adapter import check_base, fitting_layers, write_factors
from loralib.adapter_folder import AdapterConfig, read_adapter
from loralib.injection import modules_never_called
from loralib.layers import LoRALayer
from loralib.model import keep_flags, lora_layers, unwrapped

NOT_PER_ROW = (
    "run() can join only tensors whose first dimension is the rows, and one of the outputs is something else: give "
    "use_cache=False to a decoder, leave labels out, or use one adapter for all rows"
)
torch._dynamo.config.skip_nnmodule_hook_guards = False  # torch.compile then recompiles a model when it gets hooks
_RUNS = threading.RLock()  # held by run(), which switches the active adapter


class MultiAdapter:
    """Holds adapters for the plain base ``model`` and applies them through forward hooks, for inference.

    The model's modules and weights are not changed. With no adapter active the model computes what it did before, and
    :meth:`close` removes the hooks. ::

        adapters = MultiAdapter(model)
        adapters.load("similarity", folder_a)
        adapters.load("entailment", folder_b)
        adapters.activate("entailment")
        model(**batch)
        adapters.run(["similarity", "entailment", None], **batch_of_three)

    Adapters may differ in everything, the size of the head included. Hooks change only the outputs of modules: if the
    model's code reads a trained parameter without calling its module, it gets the base's value. ``load_adapter`` has no
    such limit.

    A compiled model is recompiled when adapters are loaded, if this module was imported before the model's first call.

    Args:
        model: has no low-rank layers and is on the device where it will run; of a wrapper the model inside is used.

    Raises:
        ValueError: for a model with low-rank layers.
    """

    def __init__(self, model: nn.Module) -> None:
        if lora_layers(model):
            raise ValueError("the model has low-rank layers already: give MultiAdapter the plain base")
        self.model = unwrapped(model)
        # Adapter → (module name → layer over the base's weight, module name → the head's tensors by their own name).
        self._adapters: dict[str, tuple[dict[str, LoRALayer], dict[str, dict[str, Tensor]]]] = {}
        self._hooks: dict[str, Any] = {}
        self.active: str | None = None  # the adapter that plain calls of the model use, see activate()

    @property
    def names(self) -> list[str]:
        """The loaded adapters."""
        return list(self._adapters)

    def load(self, name: str, folder: str | os.PathLike[str], *, allow_other_base: bool = False) -> AdapterConfig:
        """Load a folder of :func:`loralib.save_adapter` under a name of your choice.

        Raises:
            ValueError: if the name is in use, another MultiAdapter has adapters on the model, or a parameter of the
                adapter is in a module that is never called (a ``ParameterList``, ``out_proj`` in
                ``nn.MultiheadAttention``) or has children; also as :func:`loralib.load_adapter`. Nothing is changed.
        """
        if name in self._adapters:
            raise ValueError(f"an adapter {name!r} is loaded already: remove it first, or choose another name")
        hooks = (hook for module in self.model.modules() for hook in module._forward_hooks.values())
        if any(isinstance(hook, _Hook) and getattr(hook.func, "__self__", None) is not self for hook in hooks):
            raise ValueError("another MultiAdapter holds adapters for this model: load into that one, or close() it")
        config, tensors = read_adapter(folder)
        layers = fitting_layers(self.model, config, tensors)
        if not allow_other_base:
            check_base(self.model, config)
        write_factors(layers, config, tensors)
        with keep_flags(self.model):
            for layer in layers.values():
                layer.eval().requires_grad_(False)
        state = self.model.state_dict(keep_vars=True)
        never_called = modules_never_called(self.model)
        trained = {id(state[n]): n for n in config.head}
        served: set[int] = set()
        heads: dict[str, dict[str, Tensor]] = {}
        for owner, module in self.model.named_modules():  # a tied tensor has several owners
            called = owner not in never_called and type(module).forward is not nn.Module.forward
            if not called or next(module.children(), None) is not None:  # a hook would run its children twice
                continue
            for own, tensor in (module._parameters | module._buffers).items():
                if id(tensor) in trained:
                    heads.setdefault(owner, {})[own] = tensors[trained[id(tensor)]].to(tensor)
                    served.add(id(tensor))
        if alone := [n for number, n in trained.items() if number not in served]:
            raise ValueError(f"no hook can apply the adapter's {alone[0]}: its module is never called or has children")
        self._adapters[name] = layers, heads
        for module_name in (layers.keys() | heads.keys()) - self._hooks.keys():
            module, hook = self.model.get_submodule(module_name), _Hook(self._after_forward, module_name)
            self._hooks[module_name] = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        return config

    def remove(self, name: str) -> None:
        """Remove an adapter. If it was active, no adapter is active afterwards.

        Raises:
            ValueError: for a name that is not loaded.
        """
        self._known(name)
        if self.active == name:
            self.active = None
        del self._adapters[name]

    def activate(self, name: str | None) -> None:
        """Use this adapter for plain calls of the model; None uses the base alone.

        Raises:
            ValueError: for a name that is not loaded.
        """
        self._known(name)
        self.active = name

    def close(self) -> None:
        """Remove all hooks from the model, and all adapters."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._adapters.clear()
        self.active = None

    @torch.no_grad()
    def run(self, adapters: Sequence[str | None], *args: Any, **kwargs: Any) -> Any:
        """Call the model on a batch whose rows each have their own adapter.

        The model is called once for each adapter, on the rows that use it, and the outputs are joined row by row, also
        inside containers. A cache, or an output over all rows such as a loss, needs one adapter for all rows. Calls of
        this method from several threads take turns; a plain call of the model at the same time would use their adapter.

        Args:
            adapters: for each row the name of an adapter, or None for the base alone.
            args, kwargs: the model's. Tensors whose first dimension is the number of rows are split, also inside
                containers.

        Returns:
            What the model returns. If heads differ in size, the last dimension is padded with −inf after a row's own
            values.

        Raises:
            ValueError: if a name is not loaded, or no input has that many rows; with several adapters also if a cache
                is given, or if the output holds anything but None and tensors whose first dimension is the rows.
        """
        for name in adapters:
            self._known(name)
        batch = next((leaf for leaf in tree_leaves((args, kwargs)) if _has_rows(leaf, len(adapters))), None)
        if batch is None:
            raise ValueError(
                f"{len(adapters)} adapters named, but no input has {len(adapters)} rows: name one for each row"
            )
        rows: dict[str | None, list[int]] = {}
        for i, name in enumerate(adapters):
            rows.setdefault(name, []).append(i)
        if len(rows) > 1 and kwargs.get("past_key_values") is not None:  # each call would write to it
            raise ValueError("give no past_key_values to run() if the rows have different adapters")
        parts = []
        with _RUNS:
            before = self.active
            try:
                for self.active, places in rows.items():
                    if len(rows) == 1:
                        return self.model(*args, **kwargs)
                    rows_of = partial(_rows, index=torch.tensor(places), count=len(adapters))
                    parts.append(self.model(*tree_map(rows_of, args), **tree_map(rows_of, kwargs)))
            finally:
                self.active = before
        order = torch.tensor([i for places in rows.values() for i in places], device=batch.device).argsort()
        return tree_map(partial(_join_rows, [len(places) for places in rows.values()], order), *parts)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _known(self, name: str | None) -> None:
        if name is not None and name not in self._adapters:
            raise ValueError(f"no adapter {name!r} is loaded; there are: {', '.join(self._adapters) or 'none'}")

    def _after_forward(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The hook of one module. If the active adapter changes the module, recompute its output with the head's
        tensors and add the update; returning None keeps the output as it is."""
        layers, heads = self._adapters[self.active] if self.active is not None else ({}, {})
        layer, head = layers.get(name), heads.get(name)
        if layer is None and head is None:
            return None
        if self.model.get_submodule(name) is not module:  # get_peft_model does this; both updates would be added
            raise RuntimeError(f"{name} was replaced while a MultiAdapter serves the model: close() it first")
        if head is not None:
            tensors = {f"module.{tensor}": value for tensor, value in head.items()}
            output = functional_call(_ForwardAlone(module), tensors, args, kwargs)
        if layer is None:
            return output
        return layer.add_update(output, args[0] if args else next(iter(kwargs.values())))


class _Hook(partial):
    """A hook of a MultiAdapter; its type distinguishes it from the user's hooks."""


class _ForwardAlone(nn.Module):
    """A module's forward pass without its hooks: its caller runs them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _rows(value: Any, index: Tensor, count: int) -> Any:
    """The rows of a tensor that has ``count`` of them; anything else as it is."""
    return value.index_select(0, index.to(value.device)) if _has_rows(value, count) else value


def _has_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count


def _join_rows(counts: list[int], order: Tensor, *parts: Any) -> Tensor | None:
    """The parts' rows as one tensor, in the given order; outputs of smaller heads are padded to the largest."""
    if all(part is None for part in parts):
        return None
    if not all(map(_has_rows, parts, counts)):
        raise ValueError(NOT_PER_ROW)
    if parts[0].dim() > 1:
        width = max(part.shape[-1] for part in parts)
        parts = tuple(nn.functional.pad(part, (0, width - part.shape[-1]), value=-torch.inf) for part in parts)
    return torch.cat(parts).index_select(0, order.to(parts[0].device))
