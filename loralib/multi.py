"""Several adapters on one base: switch by name, or give every row of a batch its own. The base is never written to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loralib.adapter import build_layers
from loralib.adapter_checks import check_adapter
from loralib.adapter_files import AdapterConfig, read_adapter
from loralib.layers import LoRALayer
from loralib.model import keep_flags, lora_layers

PADDING = float("-inf")


class _NotPerRow(Exception):
    """A module's inputs do not have the batch in their first dimension, so that they cannot be split by rows."""


class _Ambiguous(_NotPerRow):
    """Another dimension has as many entries as the batch has rows, so that the first one may not be the batch."""


class _Adapter:
    """The layers over the base's weights, and the head's tensors by the name of the module that owns them."""

    def __init__(self, layers: dict[str, LoRALayer], head: dict[str, dict[str, Tensor]]) -> None:
        self.layers, self.head = layers, head


class MultiAdapter:
    """Holds adapters for the plain base ``model`` and applies them through forward hooks, for inference.

    The model's modules and weights stay as they are; with no adapter active it computes what it did, and
    :meth:`close` takes the hooks off. ::

        adapters = MultiAdapter(model)
        adapters.load("similarity", folder_a)
        adapters.load("entailment", folder_b)
        adapters.activate("entailment")
        model(**batch)
        adapters.run(["similarity", "entailment", None], **batch_of_three)

    Adapters may differ in everything, the size of the head included.

    Args:
        model: without low-rank layers of its own, on the device where it will run.

    Raises:
        ValueError: for a model with low-rank layers.
    """

    def __init__(self, model: nn.Module) -> None:
        if lora_layers(model):
            raise ValueError("the model has low-rank layers already: give MultiAdapter the plain base")
        self.model = model
        self._adapters: dict[str, _Adapter] = {}
        self._hooks: dict[str, Any] = {}
        self._rows: str | list[str | None] | None = None  # one for all rows, or one for each
        self._replaying: set[str] = set()
        self._seen: set[str] = set()
        self._one_pass = True

    @property
    def names(self) -> list[str]:
        """The loaded adapters."""
        return list(self._adapters)

    @property
    def active(self) -> str | None:
        """The adapter that plain calls of the model use."""
        return self._rows if isinstance(self._rows, str) else None

    def load(self, name: str, folder: str | os.PathLike[str], *, allow_other_base: bool = False) -> AdapterConfig:
        """Load a folder of :func:`loralib.save_adapter` under a name of your choice.

        Raises:
            ValueError: for a name in use, and as :func:`loralib.load_adapter`; nothing is changed then.
        """
        if name in self._adapters:
            raise ValueError(f"an adapter {name!r} is loaded already: remove it first, or choose another name")
        config, tensors = read_adapter(folder)
        check_adapter(self.model, config, tensors, allow_other_base, any_head_shape=True)
        with keep_flags(self.model):
            built = build_layers(self.model, config, tensors)
            layers = {n: layer.eval().requires_grad_(False) for n, layer in built.items()}
        state = self.model.state_dict(keep_vars=True)
        head: dict[str, dict[str, Tensor]] = {}
        for tensor_name in config.head:
            owner, _, own_name = tensor_name.rpartition(".")
            head.setdefault(owner, {})[own_name] = tensors[tensor_name].to(state[tensor_name])
        self._adapters[name] = _Adapter(layers, head)
        for module_name in [*head, *layers]:
            if module_name not in self._hooks:
                module = self.model.get_submodule(module_name)
                hook = partial(self._after_forward, module_name)
                self._hooks[module_name] = module.register_forward_hook(hook, with_kwargs=True)
        return config

    def remove(self, name: str) -> None:
        """Forget an adapter; none is active afterwards if it was.

        Raises:
            ValueError: for a name that is not loaded.
        """
        self._known(name)
        if self._rows == name:
            self._rows = None
        del self._adapters[name]

    def activate(self, name: str | None) -> None:
        """Use this adapter for plain calls of the model; None is the bare base.

        Raises:
            ValueError: for a name that is not loaded.
        """
        self._known(name)
        self._rows = name

    def close(self) -> None:
        """Take all hooks off the model and forget the adapters."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._adapters.clear()
        self._rows = None

    @torch.no_grad()
    def run(self, adapters: Sequence[str | None], *args: Any, **kwargs: Any) -> Any:
        """Call the model on a batch whose rows each have their own adapter.

        The base computes the batch once, and every adapter adds its update to its rows. Otherwise the model is called
        once for each adapter on its rows, with the same result: if a module computes something that all rows share
        (DeBERTa projects its relative positions with the weights of query and key), if the model's layers do not have
        the batch first (XLNet), or if another dimension is as large as the batch, so that the two cannot be told apart.

        Args:
            adapters: for each row the name of an adapter, or None for the bare base.
            args, kwargs: the model's; tensors whose first dimension is the number of rows are the batch.

        Returns:
            What the model returns, its tensors joined along the first dimension if that has the rows, else along the
            second. If heads differ in size, the last dimension is padded with −inf after a row's own values.

        Raises:
            ValueError: for a name that is not loaded, or if no input has that many rows.
        """
        for name in adapters:
            self._known(name)
        rows = list(adapters)
        inputs = [*args, *kwargs.values()]
        if not any(_has_rows(value, len(rows)) for value in inputs):
            raise ValueError(f"{len(rows)} adapters named, but no input has {len(rows)} rows: name one for each row")
        if self._one_pass and len(set(rows)) > 1 and not _is_ambiguous(inputs, len(rows)):
            try:
                self._seen.clear()
                with self._using(rows):
                    return self.model(*args, **kwargs)
            except _Ambiguous:
                pass  # another batch may have other sizes
            except _NotPerRow:
                self._one_pass = False

        def of_adapter(_: str | None, chosen: list[int]) -> Any:
            return self.model(*_select(args, chosen, len(rows)), **_select(kwargs, chosen, len(rows)))

        return self._for_each(rows, of_adapter)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _known(self, name: str | None) -> None:
        if name is not None and name not in self._adapters:
            raise ValueError(f"no adapter {name!r} is loaded; there are: {', '.join(self._adapters) or 'none'}")

    @contextmanager
    def _using(self, rows: str | list[str | None] | None):
        before, self._rows = self._rows, rows
        try:
            yield
        finally:
            self._rows = before

    def _after_forward(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The hook of one module: its output under the adapters of the rows; None leaves it as it is."""
        rows = self._rows
        if rows is None or name in self._replaying:
            return None
        if isinstance(rows, str):
            return self._replay(rows, name, module, args, kwargs, output)
        count = len(rows)
        if not any(
            name in self._adapters[row].head or name in self._adapters[row].layers for row in {*rows} if row is not None
        ):
            return None
        inputs = [*args, *kwargs.values()]
        # Called twice, a module may be given the batch once and something shared the other time.
        if name in self._seen or not any(_has_rows(value, count) for value in inputs):
            raise _NotPerRow
        if _is_ambiguous(inputs, count):
            raise _Ambiguous
        self._seen.add(name)

        def of_adapter(adapter: str | None, chosen: list[int]) -> Any:
            part = _select(output, chosen, count)
            if adapter is None:
                return part
            inputs = _select(args, chosen, count), _select(kwargs, chosen, count)
            return self._replay(adapter, name, module, *inputs, part)

        return self._for_each(rows, of_adapter)

    def _replay(self, adapter: str, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The module's output under one adapter: computed anew with its head's tensors, and its update added."""
        head, layer = self._adapters[adapter].head.get(name), self._adapters[adapter].layers.get(name)
        if head is not None:
            self._replaying.add(name)
            try:
                output = functional_call(module, head, args, kwargs)
            finally:
                self._replaying.discard(name)
        if layer is None:
            return output
        source = args[0] if args else next(iter(kwargs.values()))
        return layer.add_update(output, source)

    def _for_each(self, rows: list[str | None], call: Callable[[str | None, list[int]], Any]) -> Any:
        """``call`` with each adapter and the numbers of its rows; the results in the rows' order."""
        indices: dict[str | None, list[int]] = {}
        for i, name in enumerate(rows):
            indices.setdefault(name, []).append(i)
        parts = []
        for name, chosen in indices.items():
            with self._using(name):
                parts.append(call(name, chosen))
        order = torch.tensor([i for chosen in indices.values() for i in chosen]).argsort()
        return _join(parts, [len(chosen) for chosen in indices.values()], order)


def _select(value: Any, chosen: list[int], count: int) -> Any:
    """The chosen rows of every tensor inside ``value`` that has ``count`` rows."""
    if isinstance(value, Tensor):
        return value[chosen] if _has_rows(value, count) else value
    if isinstance(value, Mapping):
        return {key: _select(item, chosen, count) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_select(item, chosen, count) for item in value)
    return value


def _has_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count


def _is_ambiguous(inputs: Sequence[Any], count: int) -> bool:
    """Whether a tensor has ``count`` rows and another dimension of that size, as (length, batch, features) may."""
    return any(_has_rows(value, count) and count in value.shape[1:] for value in inputs)


def _join(parts: list[Any], counts: list[int], order: Tensor) -> Any:
    """Results of parts of a batch as one, its rows in the given order."""
    first = parts[0]
    if isinstance(first, Tensor):
        of_rows = [d for d in (0, 1) if all(p.shape[d : d + 1] == (n,) for p, n in zip(parts, counts, strict=True))]
        if not of_rows:
            return first  # the same for all rows
        if first.dim() > 1 and of_rows[0] == 0:
            width = max(part.shape[-1] for part in parts)
            parts = [nn.functional.pad(part, (0, width - part.shape[-1]), value=PADDING) for part in parts]
        return torch.cat(parts, of_rows[0]).index_select(of_rows[0], order.to(first.device))
    if isinstance(first, Mapping):
        return type(first)(**{key: _join([part[key] for part in parts], counts, order) for key in first})
    if isinstance(first, (tuple, list)):
        return type(first)(_join(list(items), counts, order) for items in zip(*parts, strict=True))
    return first
