"""The orthogonality regulariser (arXiv 2408.06854, eq. 5 and Table 3; arXiv 2303.10512, eq. 4).

Every term is ‖Gram − I‖_F. Grams have the side k or r, so that P = B₀B₁… (out, r) is never formed:
PᵀP = …B₁ᵀ (B₀ᵀB₀) B₁…, and likewise for Q.

    "uv"  the factors of P: ‖BⱼᵀBⱼ − I‖ for every j      "UV"  the factors of Q: ‖AⱼAⱼᵀ − I‖
    "PQ"  the products: ‖PᵀP − I‖ and ‖QQᵀ − I‖           "all"  all of them, the paper's best

A factor's Gram is taken on its smaller side, so that the identity can be reached. With one scale, P and Q are the
factors themselves and count once: the value is then AdaLoRA's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loralib.checks import check_not_negative
from loralib.fused import outside_autocast, transformed, without_autocast
from loralib.model import factors_in, refuse_new_factors, trained_svd_layers

TERMS = ("uv", "UV", "PQ")
_Side = tuple[bool, list[nn.Parameter]]  # whether its factors are wide, as A's are


def parse_terms(terms: str) -> frozenset[str]:
    """``"all"``, or some of uv, UV and PQ joined by ``+``.

    Raises:
        ValueError: for anything else.
    """
    parts = list(TERMS) if terms == "all" else terms.split("+")
    if not set(parts) <= set(TERMS) or len(set(parts)) != len(parts):
        raise ValueError(f"terms must be 'all' or some of {', '.join(TERMS)} joined by '+', got {terms!r}")
    return frozenset(parts)


_Shapes = list[tuple[bool, list[int]]]  # for each shape, whether its factors are wide and which they are


def _stacks(shapes: _Shapes, factors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack([factors[i] for i in rows]) for _, rows in shapes]


def _grams(shapes: _Shapes, stacks: list[Tensor]) -> Tensor:
    """Tall factors X (m, s), or wide ones as X = Aᵀ → their XᵀX, (n, s, s), in the order given."""
    return torch.cat([x @ x.mT if wide else x.mT @ x for x, (wide, _) in zip(stacks, shapes, strict=True)])


class _OuterGrams(torch.autograd.Function):
    """The Grams with one product for each shape on the way back, X (G + Gᵀ), where autograd makes two and adds."""

    @staticmethod
    def forward(ctx, shapes: _Shapes, *factors: Tensor) -> Tensor:
        stacks = _stacks(shapes, factors)
        ctx.save_for_backward(*factors, *stacks)
        ctx.shapes = shapes
        return _grams(shapes, stacks)

    @staticmethod
    @outside_autocast
    def backward(ctx, grad: Tensor):
        places = sum(len(rows) for _, rows in ctx.shapes)
        factors, stacks = ctx.saved_tensors[:places], ctx.saved_tensors[places:]
        if torch.is_grad_enabled():  # a second derivative is wanted, and the stacks have no history
            stacks = _stacks(ctx.shapes, factors)
        both = grad + grad.mT
        gradients, start = [], 0
        for stacked, (wide, rows) in zip(stacks, ctx.shapes, strict=True):
            part = both[start : start + len(rows)]
            gradients += (part @ stacked if wide else stacked @ part).unbind()
            start += len(rows)
        return None, *gradients


def _stacked(narrow: int, factors: Sequence[Tensor]) -> Tensor:
    """Equally sized inner factors as one (n, s, t): `narrow` of them as they are, then the others transposed."""
    parts = [torch.stack(factors[:narrow])] if narrow else []
    parts += [torch.stack(factors[narrow:]).mT] if narrow < len(factors) else []
    return torch.cat(parts)


class _Stacked(torch.autograd.Function):
    """:func:`_stacked` as one node of the graph."""

    @staticmethod
    def forward(ctx, narrow: int, *factors: Tensor) -> Tensor:
        ctx.narrow = narrow
        return _stacked(narrow, factors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, *grad[: ctx.narrow].unbind(), *grad[ctx.narrow :].mT.contiguous().unbind()


class _Chains:
    """The sides of layers (factors from the outermost inward) whose inner sizes agree, worked on as one stack.

    Every factor is looked at as B is, (outer, inner); an A is transposed. What layers share is computed once and, where
    a product needs it, repeated. An outer factor that is in ``counted``, other layers', counts there.
    """

    def __init__(self, chains: list[_Side], with_factors: bool, with_product: bool, counted: set[nn.Parameter]) -> None:
        self.with_factors, self.with_product = with_factors, with_product
        unique = list({id(factors[0]): (wide, factors[0]) for wide, factors in chains}.values())
        by_shape: dict[tuple, list[int]] = defaultdict(list)
        for i, (wide, factor) in sorted(enumerate(unique), key=lambda item: item[1][0]):
            by_shape[(wide, *factor.shape)].append(i)
        order = [i for rows in by_shape.values() for i in rows]
        self.outer = [unique[i][1] for i in order]
        self.shapes, start = [], 0
        for (wide, *_), rows in by_shape.items():
            self.shapes.append((wide, list(range(start, start + len(rows)))))
            start += len(rows)
        place = {id(factor): i for i, factor in enumerate(self.outer)}
        chains = sorted(chains, key=lambda chain: place[id(chain[1][0])])
        tall = [max(factor.shape) == factor.shape[int(wide)] for wide, factor in unique]
        new = [factor not in counted for _, factor in unique]
        counted.update(self.outer)
        self.flat = [unique[i] for i in order if new[i] and not tall[i]]
        # Index tensors lie on the device: a list would be copied to it in every step, which waits for the device.
        self.tall = self._index([j for j, i in enumerate(order) if new[i] and tall[i]])
        self.outer_of = self._index([place[id(factors[0])] for _, factors in chains])
        self.inner = [
            self._level([(wide, factors[j]) for wide, factors in chains]) for j in range(1, len(chains[0][1]))
        ]

    def _index(self, places: list[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.long, device=self.outer[0].device)

    def _level(self, level: list[tuple[bool, nn.Parameter]]) -> tuple[int, list[nn.Parameter], Tensor | None]:
        """(how many are not transposed, the distinct factors, whose each chain's is, None where each has its own)."""
        unique = {id(factor): (wide, factor) for wide, factor in level}
        position = {key: i for i, key in enumerate(unique)}
        repeated = None if len(unique) == len(level) else self._index([position[id(factor)] for _, factor in level])
        return sum(not wide for wide, _ in unique.values()), [factor for _, factor in unique.values()], repeated

    def norms(self, deviation: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """‖Gram − I‖ of the chosen terms."""
        found, plain, shapes, outer = [], transformed(), self.shapes, self.outer
        gram = _grams(shapes, _stacks(shapes, outer)) if plain else _OuterGrams.apply(shapes, *outer)
        if self.with_factors:
            found.append(deviation(_rows(gram, self.tall) if len(self.tall) < len(gram) else gram))
            # A factor wider than it is tall reaches the identity on its other side only.
            found += [deviation((f.T @ f if wide else f @ f.T).unsqueeze(0)) for wide, f in self.flat]
        if len(self.outer) < len(self.outer_of):
            gram = _rows(gram, self.outer_of)
        for narrow, factors, repeated in self.inner:
            stacked = _stacked(narrow, factors) if plain else _Stacked.apply(narrow, *factors)
            if self.with_factors:
                tall = stacked.shape[-1] <= stacked.shape[-2]
                found.append(deviation(stacked.mT @ stacked if tall else stacked @ stacked.mT))
            if self.with_product:
                stacked = stacked if repeated is None else _rows(stacked, repeated)
                gram = stacked.mT @ gram @ stacked
        if self.with_product:
            found.append(deviation(gram))
        return found


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index.to(values.device))  # a copy only where the model was moved since


class OrthogonalityRegulariser:
    """The regulariser of one model, its layers found once. Calling it gives the unweighted value, a scalar.

    Factors are handled stacked by shape, all layers and both sides at once. A factor that layers share counts once.

    Args:
        model: holds low-rank layers with singular values. terms: see :func:`parse_terms`.
        squared: the mean of squared norms, as the paper prints them, not of norms, as the published code has it.

    Raises:
        ValueError: for unknown terms, or a model without such layers.
    """

    def __init__(self, model: nn.Module, terms: str = "all", squared: bool = False) -> None:
        self._made_of = (model, terms, squared)
        chosen = parse_terms(terms)
        layers = list(trained_svd_layers(model, "regularise").values())
        self.squared = squared
        groups: dict[tuple, list[_Side]] = defaultdict(list)
        for layer in layers:
            for term, factors in (("uv", layer.lora_B), ("UV", layer.lora_A)):
                one_scale = len(factors) == 1
                with_factors = term in chosen or (one_scale and "PQ" in chosen)
                with_product = "PQ" in chosen and not one_scale
                if with_factors or with_product:
                    wide = term == "UV"
                    key = (with_factors, with_product, factors[0].device, *layer.widths, layer.r)
                    groups[key].append((wide, list(factors)))
        self._layers, self._factors = layers, factors_in(layers)
        counted: set[nn.Parameter] = set()  # layers of different ranks may share outer factors
        self._groups = [_Chains(chains, key[0], key[1], counted) for key, chains in groups.items()]

    def __call__(self) -> Tensor:
        if transformed():  # torch.func.functional_call may have put other tensors in place of the factors
            return OrthogonalityRegulariser(*self._made_of)._value()
        refuse_new_factors(self._layers, self._factors, "regulariser")
        return self._value()

    def _value(self) -> Tensor:
        with without_autocast(self._factors[0].device.type):  # Gram − I is a small difference
            norms = [norm for chains in self._groups for norm in chains.norms(self._deviation)]
            return torch.cat([norm.to(norms[0].device) for norm in norms]).mean()

    def _deviation(self, gram: Tensor) -> Tensor:
        """(n, s, s) → (n,): ‖Gram − I‖_F, squared where asked for; the gradient at exactly 0 is 0."""
        flat = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).flatten(1)
        squares = flat.square().sum(1)
        if self.squared:
            return squares
        zero = squares == 0  # where the second derivative of a norm is NaN
        return torch.where(zero, 0.0, torch.linalg.vector_norm(torch.where(zero.unsqueeze(1), 1.0, flat), dim=1))


def compute_orth_regu(model: nn.Module, regu_weight: float = 0.1, terms: str = "all", squared: bool = False) -> Tensor:
    """``regu_weight`` × the mean of ‖Gram − I‖_F over all chosen terms of all layers, a scalar to add to the loss.

    In a loop, build one :class:`OrthogonalityRegulariser` and call that: the layers are then looked up once.

    Raises:
        ValueError: for unknown terms, a negative weight, or a model without layers that have singular values.
    """
    check_not_negative("regu_weight", regu_weight)
    return regu_weight * OrthogonalityRegulariser(model, terms, squared)()
