"""The steps between loading a model and its first update: train the head alone, start the factors, set their rates.

A run that resumes takes all three from its checkpoint. One process computes head and factors, and the others receive
its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import loralib
from loralib.model import in_mode
from loralib.stored_weight import stored_form
from nlu.data.batching import effective_batch_size
from nlu.errors import RunError, UsageError
from nlu.methods.method import AppliedMethod, head_parameters
from nlu.runs.processes import several

if TYPE_CHECKING:
    from nlu.trainer import GlueTrainer

_COUNTS = ("idx", "length")  # columns that no model reads


def prepare_start(trainer: GlueTrainer) -> None:
    """Train the head alone and start the factors, as the run's arguments and its method ask for.

    Raises:
        UsageError: for an encoder whose head cannot be trained on stored features.
        RunError: for a gradient or an input that is not finite.
    """
    args, start = trainer.args, trainer.applied.start
    if not args.head_first_epochs and start is None:
        return
    # The weights that FSDP split are gathered from all processes: then each of them computes the same.
    if args.process_index == 0 or any(stored_form(p) == "sharded" for p in trainer.model.parameters()):
        devices = [args.device.index] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(args.seed)
            if args.head_first_epochs:
                train_head(trainer, args.head_first_epochs)
            if start is not None:
                _start_factors(trainer, *start)
    if several():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, 0)


def _start_factors(trainer: GlueTrainer, kind: str, count: int) -> None:
    """From ``count`` batches of the effective size, drawn by the seed, in pieces that one process takes at once."""
    args = trainer.args
    drawn = torch.randperm(len(trainer.train_dataset), generator=torch.Generator().manual_seed(args.seed))
    rows = drawn[: count * effective_batch_size(args)].split(args.per_device_train_batch_size)

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        # A sum, so that a shorter last piece counts as its rows; that of the training, though dropout is off.
        return trainer.task_loss(outputs, batch["labels"], 1, training=True)

    try:
        loralib.initialise(trainer.model, kind, (_batch(trainer, piece) for piece in rows), loss_of, seed=args.seed)
    except ValueError as error:
        raise RunError(f"--lora_init {kind}: {error}") from None


def _batch(trainer: GlueTrainer, rows: Tensor) -> dict[str, Tensor]:
    columns = trainer.train_dataset[rows.tolist()]
    names = [name for name in columns if name not in _COUNTS]
    collated = trainer.data_collator([{name: columns[name][i] for name in names} for i in range(len(rows))])
    return {name: value.to(trainer.args.device) for name, value in collated.items()}


# ---- the head alone ------------------------------------------------------------------------------------------------


def train_head(trainer: GlueTrainer, epochs: int) -> None:
    """Train the head on features of the frozen encoder, which are computed once, without dropout (arXiv 2202.10054).

    Kept of a row is what the head reads: the first token's last hidden state, or all tokens' where it reads more. The
    optimiser is AdamW with the run's rate of the head, its weight decay and its batch size; the rate stays constant.

    Raises:
        UsageError: where the head reads something else.
    """
    args, model, count = trainer.args, trainer.model, len(trainer.train_dataset)
    features, restore = _features(trainer)
    parameters = [p for p in head_parameters(model) if p.requires_grad]
    rate = args.learning_rate if args.head_learning_rate is None else args.head_learning_rate
    optimizer = torch.optim.AdamW(
        parameters, rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
    )
    generator = torch.Generator().manual_seed(args.seed)
    with in_mode(model, training=True):
        for _ in range(epochs):
            for rows in torch.randperm(count, generator=generator).split(effective_batch_size(args)):
                batch = _batch(trainer, rows)
                labels = batch.pop("labels")
                with _encoder_returns(model, restore([features[i] for i in rows.tolist()], batch)):
                    loss = trainer.task_loss(model(**batch), labels)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)  # a pooler may lie idle
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _features(trainer: GlueTrainer) -> tuple[list[Tensor], Callable[[list[Tensor], dict], Any]]:
    """What the head reads of every training row, (tokens, hidden), and what makes the encoder's output of some rows'
    and their batch."""
    model = trainer.model
    features: list[Tensor | None] = [None] * len(trainer.train_dataset)
    restore: Callable[[list[Tensor], dict], Any] | None = None
    first_alone = False
    order = torch.tensor(trainer.train_dataset["length"][:]).argsort(stable=True)
    with in_mode(model, training=False):
        for rows in order.split(trainer.args.per_device_eval_batch_size):
            batch = _batch(trainer, rows)
            batch.pop("labels")
            output, logits = _encoded(model, batch)
            hidden = output.last_hidden_state
            if restore is None:
                first_alone, restore = _what_is_read(model, batch, hidden, logits, type(output))
            for i, row in zip(rows.tolist(), _read(hidden, batch, first_alone), strict=True):
                features[i] = row.clone()
    return features, restore


def _encoded(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """The encoder's output and the logits."""
    seen: list[Any] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        logits = model(**batch)["logits"]
    finally:
        hook.remove()
    return seen[-1], logits


def _read(hidden: Tensor, batch: dict[str, Tensor], first_alone: bool) -> list[Tensor]:
    """Of each row the first token's hidden state, or those of all its tokens without padding, wherever that lies."""
    if first_alone:
        return [row[:1] for row in hidden]
    return [row[mask] for row, mask in zip(hidden, batch["attention_mask"].bool(), strict=True)]


def _what_is_read(
    model: nn.Module, batch: dict[str, Tensor], hidden: Tensor, logits: Tensor, kind: type
) -> tuple[bool, Callable[[list[Tensor], dict], Any]]:
    """Whether the first token's hidden state alone gives the same logits, and what restores the encoder's output."""
    for first_alone in (True, False):
        restore = _restore(model.base_model, kind, first_alone)
        with _encoder_returns(model, restore(_read(hidden, batch, first_alone), batch)):
            try:
                again = model(**batch)["logits"]
            except (RuntimeError, IndexError, TypeError, AttributeError):
                continue  # it looks for tokens that are not there
        if again.shape == logits.shape and torch.allclose(logits.float(), again.float(), rtol=1e-3, atol=1e-3):
            return first_alone, restore
    raise UsageError(
        f"--head_first_epochs: the head of {type(model).__name__} reads more than the last hidden states: leave it out"
    )


def _restore(encoder: nn.Module, kind: type, first_alone: bool) -> Callable[[list[Tensor], dict], Any]:
    """What makes the encoder's output from what :func:`_read` gives; a pooler is part of the head, and trains."""
    pooler = getattr(encoder, "pooler", None)

    def restore(rows: list[Tensor], batch: dict[str, Tensor]) -> Any:
        if first_alone:
            hidden = torch.stack(rows)
        else:
            mask = batch["attention_mask"].bool()
            hidden = rows[0].new_zeros(*mask.shape, rows[0].shape[-1])
            hidden[mask] = torch.cat(rows)
        return kind(last_hidden_state=hidden, **({} if pooler is None else {"pooler_output": pooler(hidden)}))

    return restore


@contextmanager
def _encoder_returns(model: nn.Module, output: Any) -> Iterator[None]:
    """The encoder returns ``output`` in place of computing anything."""
    encoder = model.base_model
    encoder.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del encoder.forward


# ---- learning rates ------------------------------------------------------------------------------------------------


def own_rates(applied: AppliedMethod, args: Any) -> list[tuple[list[str], float]]:
    """Names of the parameters that have their own rate, in multiples of the learning rate.

    A rate may depend on how the factors start, so checkpoints hold them.
    """
    rates = applied.own_rates()
    if args.head_learning_rate is not None:
        rates.append((head_parameters(applied.model), args.head_learning_rate / args.learning_rate))
    names = {id(parameter): name for name, parameter in applied.model.named_parameters()}
    return [([names[id(parameter)] for parameter in parameters], ratio) for parameters, ratio in rates]


def set_own_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, rates: list[tuple[list[str], float]]
) -> torch.optim.Optimizer:
    """Move the parameters of :func:`own_rates` to further groups of the optimiser, in place."""
    parameters = dict(model.named_parameters())
    for names, ratio in rates:
        apart = {id(parameters[name]) for name in names}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in apart]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in apart]
                optimizer.add_param_group({**group, "params": own, "lr": ratio * group["lr"]})
    return optimizer
