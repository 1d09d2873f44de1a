"""Several adapters on one base: switch by name, or give every row of a batch its own. The base's weights stay."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from loralib.adapter import check_base, config_places, fitting_layers, write_factors
from loralib.adapter_folder import AdapterConfig, read_adapter
from loralib.layers import LoRALayer
from loralib.model import HOLDER, lora_layers, unwrapped

NOT_PER_ROW = (
    "run() can join only tensors whose first dimension is the rows, and one of the outputs is something else: give "
    "use_cache=False to a decoder, leave labels out, or use one adapter for all rows"
)
_TURNS = threading.RLock()  # held while the active adapter changes


class MultiAdapter:
    """Holds adapters for the plain base ``model``, for inference.

    The layers and the head of the active adapter stand in the model in place of the base's, and its labels, problem
    type and padding token in the model's ``config``, as after :func:`loralib.load_adapter`. With none active, and after
    :meth:`close`, the model is the plain base again. Move or cast the base before you load adapters. ::

        adapters = MultiAdapter(model)
        adapters.load("similarity", folder_a)
        adapters.load("entailment", folder_b)
        adapters.activate("entailment")
        model(**batch)
        adapters.run(["similarity", "entailment", None], **batch_of_three)

    Adapters may differ in everything, the size of the head included.

    Args:
        model: has no low-rank layers and is on the device where it will run; of a wrapper the model inside is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)
        # Adapter → its places in the model: (module or configuration, attribute, the adapter's value).
        self._adapters: dict[str, list[tuple[Any, str, Any]]] = {}
        self._placed: list[tuple[Any, str, Any, Any]] = []  # the active adapter's places, and the base's values
        self.active: str | None = None  # the adapter that plain calls of the model use, see activate()

    @property
    def names(self) -> list[str]:
        """The loaded adapters."""
        return list(self._adapters)

    def load(self, name: str, folder: str | os.PathLike[str], *, allow_other_base: bool = False) -> AdapterConfig:
        """Load a folder of :func:`loralib.save_adapter` under a name of your choice.

        Raises:
            ValueError: if the name is in use, the model has low-rank layers of its own, or another MultiAdapter has
                adapters for it; also as :func:`loralib.load_adapter`. Nothing is changed.
        """
        if name in self._adapters:
            raise ValueError(f"an adapter {name!r} is loaded already: remove it first, or choose another name")
        if getattr(self.model, HOLDER, self) is not self:
            raise ValueError("another MultiAdapter has adapters for this model: load into that one, or close() it")
        with self._turn():
            self.activate(None)
            if lora_layers(self.model):
                raise ValueError("the model has low-rank layers already: give MultiAdapter the plain base")
            config, tensors = read_adapter(folder)
            layers = fitting_layers(self.model, config, tensors, any_head_size=True)
            if not allow_other_base:
                check_base(self.model, config)
            write_factors(layers, config, tensors)
            new: dict[int, Any] = {}  # id of a module or tensor of the base -> what stands in its place
            for module_name, layer in layers.items():
                layer.lora_dropout.p = 0.0
                for factor in layer.lora_parameters():
                    factor.requires_grad_(False)
                new[id(self.model.get_submodule(module_name))] = layer
            state = self.model.state_dict(keep_vars=True)
            for tensor_name in config.head:
                own = state[tensor_name]
                value = tensors[tensor_name].to(own, copy=True)  # the file's values are not aligned
                new[id(own)] = nn.Parameter(value, requires_grad=False) if isinstance(own, nn.Parameter) else value
            self._adapters[name] = [
                (owner, attribute, new[id(value)])
                for owner in [*self.model.modules(), *layers.values()]
                for values in (owner._modules, owner._parameters, owner._buffers)
                for attribute, value in values.items()
                if id(value) in new
            ]
            self._adapters[name] += config_places(self.model, config)
            encoders = [module for module in self.model.modules() if isinstance(module, nn.TransformerEncoder)]
            self._adapters[name] += [(encoder, "use_nested_tensor", False) for encoder in encoders if layers]
            setattr(self.model, HOLDER, self)
        return config

    def remove(self, name: str) -> None:
        """Remove an adapter. If it was active, no adapter is active afterwards.

        Raises:
            ValueError: for a name that is not loaded.
        """
        self._known(name)
        with _TURNS:
            if self.active == name:
                self.activate(None)
            del self._adapters[name]

    def activate(self, name: str | None) -> None:
        """Use this adapter for plain calls of the model; None uses the base alone.

        Raises:
            ValueError: for a name that is not loaded.
            RuntimeError: if a layer or tensor of the active adapter was replaced in the model. The plain base is
                restored then.
        """
        self._known(name)
        with _TURNS:
            of_modules = [place for place in self._placed if isinstance(place[0], nn.Module)]
            lost = [attribute for owner, attribute, value, _ in of_modules if getattr(owner, attribute) is not value]
            for owner, attribute, value, of_base in self._placed:
                if isinstance(value, LoRALayer):
                    value.unmerge()
                setattr(owner, attribute, of_base)
            before, self.active, self._placed = self.active, None, []
            if lost:
                raise RuntimeError(f"{lost[0]} was replaced while the adapter {before!r} was active: the base is back")
            places = [] if name is None else self._adapters[name]
            self._placed = [(*place, getattr(place[0], place[1], None)) for place in places]
            for owner, attribute, value in places:
                setattr(owner, attribute, value)
            self.active = name

    def close(self) -> None:
        """Remove all adapters."""
        with _TURNS:
            self._adapters.clear()
            if getattr(self.model, HOLDER, None) is self:
                delattr(self.model, HOLDER)
            self.activate(None)

    @torch.no_grad()
    def run(self, adapters: Sequence[str | None], *args: Any, **kwargs: Any) -> Any:
        """Call the model on a batch whose rows each have their own adapter.

        The model is called once for each adapter, on the rows that use it, and the outputs are joined row by row, also
        inside containers. A loss or a cache needs one adapter for all rows. Calls of this method from several threads
        take turns; a plain call of the model at the same time would use their adapter.

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
        with self._turn():
            for name, places in rows.items():
                self.activate(name)
                if len(rows) == 1:
                    return self.model(*args, **kwargs)
                rows_of = partial(_rows, index=torch.tensor(places), count=len(adapters))
                parts.append(self.model(*tree_map(rows_of, args), **tree_map(rows_of, kwargs)))
        order = torch.tensor([i for places in rows.values() for i in places], device=batch.device).argsort()
        return tree_map(partial(_join_rows, [len(places) for places in rows.values()], order), *parts)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Within the block any adapter may be activated; at its end the present one is active again."""
        with _TURNS:
            before = self.active
            try:
                yield
            finally:
                self.activate(before)

    def _known(self, name: str | None) -> None:
        if name is not None and name not in self._adapters:
            raise ValueError(f"no adapter {name!r} is loaded; there are: {', '.join(self._adapters) or 'none'}")


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
