"""The helper for plain loops and the Trainer mix-in: the same training, step by step, and exact resumption."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import Trainer, TrainingArguments

import loralib
from tests.loralib.small import INPUTS, Net, adapted, blocks, model_to_prune, random_step, randomise, refused
from tests.nlu.tiny import tiny_bert

STEPS, BATCH = 8, 4
ROWS = [{"input_ids": torch.tensor([2, 5 + i % 15, 7, 3]), "labels": torch.tensor(i % 2)} for i in range(STEPS * BATCH)]


class MyTrainer(loralib.LowRankTrainerMixin, Trainer):
    pass


def injected(kind="lora2", init="gaussian", **options):
    model = tiny_bert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    loralib.inject(model, kind, ["query", "value"], r=4, init=None if kind == "lora" else init, **options)
    loralib.mark_only_lora_as_trainable(model)
    for layer in loralib.lora_layers(model).values():
        if layer.lora_E is not None and init == "gaussian":
            torch.nn.init.normal_(layer.lora_E)  # scores apart enough that rounding does not change their order
    return model


def arguments(folder, accumulate=1, **changes):
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH // accumulate,
        "gradient_accumulation_steps": accumulate, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0, "report_to": [], "train_sampling_strategy": "sequential", "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(**{**options, **changes})


def loss_of(outputs, labels, num_items_in_batch=None):
    total = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def low_rank(model, **changes):
    options = {"target_rank": 1, "init_warmup": 1, "mask_interval": 1, "regu_weight": 0.3, **changes}
    return loralib.LowRankTraining(model, **options)


def adapter(model):
    return {n: t.clone() for n, t in loralib.lora_state_dict(model).items()}


def loop(model, training):
    """A loop of our own. Returns the live singular values after each step."""
    training.start(STEPS)
    optimizer, live = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], lr=0.1), []
    for step in range(STEPS):
        part = ROWS[step * BATCH : (step + 1) * BATCH]
        loss = model(**{n: torch.stack([row[n] for row in part]) for n in part[0]}).loss
        (loss + training.penalty()).backward()
        training.before_step()
        optimizer.step()
        training.after_step()
        optimizer.zero_grad()
        live.append(sum(int(layer.lora_E.count_nonzero()) for layer in loralib.lora_layers(model).values()))
    return live


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_with_the_mixin_does_what_a_loop_does(tmp_path, accumulate):
    models = [injected() for _ in range(2)]
    trainings = [low_rank(model) for model in models]
    live = loop(models[0], trainings[0])
    assert live[0] == 16 and live[-1] == 4 and live == sorted(live, reverse=True)
    # BERT's own loss ignores the number of rows in a step, so that it would count twice with two batches a step
    MyTrainer(model=models[1], args=arguments(tmp_path, accumulate), train_dataset=ROWS, low_rank=trainings[1],
              compute_loss_func=loss_of).train()  # fmt: skip
    torch.testing.assert_close(adapter(models[1]), adapter(models[0]), atol=1e-5, rtol=1e-4)
    assert trainings[1].rank_pattern == trainings[0].rank_pattern


@pytest.mark.parametrize("scaled", [None, False, True])
def test_the_penalty_counts_once_whatever_a_trainer_says_of_its_own_loss(tmp_path, scaled):
    class OwnTrainer(MyTrainer):
        loss_is_scaled_for_ga = scaled

    model, untouched = injected(init="orthogonal"), injected(init="orthogonal")
    for each in (model, untouched):
        loralib.mark_only_lora_as_trainable(each)
        randomise(each, 0.5)
    options = {"total_steps": 1, "regu_weight": 0.3}
    args = arguments(tmp_path, 4, max_steps=1)
    # A loss of 0 leaves the penalty alone in the step.
    OwnTrainer(model=model, args=args, train_dataset=ROWS, low_rank=loralib.LowRankTraining(model, **options),
               compute_loss_func=lambda outputs, labels, **_: 0 * outputs["logits"].sum()).train()  # fmt: skip
    optimizer = torch.optim.SGD([p for p in untouched.parameters() if p.requires_grad], lr=0.1)
    loralib.LowRankTraining(untouched, **options).penalty().backward()
    optimizer.step()
    torch.testing.assert_close(adapter(model), adapter(untouched), atol=1e-6, rtol=1e-5)


def test_each_training_starts_anew_with_the_trainers_steps(tmp_path):
    model = injected()
    training = low_rank(model, total_steps=100)
    trainer = MyTrainer(model=model, args=arguments(tmp_path), train_dataset=ROWS, low_rank=training)
    for _ in range(2):
        trainer.train()
        assert (training.step, training.total_steps, training.allocator.total_step) == (STEPS,) * 3


@pytest.mark.parametrize("options", [{"orthogonality": "retraction"}, {"precondition": "riemannian"}])
def test_a_trainer_calls_what_a_loop_calls_before_and_after_the_step(tmp_path, options):
    models = [injected(init="orthogonal") for _ in range(2)]
    for model in models if "precondition" in options else []:
        randomise(model, 0.5)  # with e = 0 the inverses would be 1/δ and multiply rounding
    weight = 0.0 if "precondition" in options else 0.3
    trainings = [loralib.LowRankTraining(model, regu_weight=weight, **options) for model in models]
    loop(models[0], trainings[0])
    MyTrainer(model=models[1], args=arguments(tmp_path), train_dataset=ROWS, low_rank=trainings[1]).train()
    torch.testing.assert_close(adapter(models[1]), adapter(models[0]), atol=1e-5, rtol=1e-4)
    if "orthogonality" in options:
        assert loralib.update_statistics(models[1]).deviation < 1e-5 and trainings[1].regu_weight == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_resumed_trainer_ends_with_the_same_bits_and_evaluates_without_penalty(tmp_path, shared):
    def run(folder, resume=None, **changes):
        model = injected(share_outer=shared)
        trainer = MyTrainer(model=model, args=arguments(folder, save_strategy="steps", save_steps=4, **changes),
                            train_dataset=ROWS, low_rank=low_rank(model))  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer, trainer.low_rank.state_dict()

    whole, state = run(tmp_path / "a")
    resumed, resumed_state = run(tmp_path / "b", resume=str(tmp_path / "a/checkpoint-4"))
    torch.testing.assert_close(adapter(whole.model), adapter(resumed.model), atol=0, rtol=0)
    assert state["step"] == resumed_state["step"] == STEPS
    assert torch.equal(state["allocator"]["mask"], resumed_state["allocator"]["mask"])
    inputs = {n: torch.stack([row[n] for row in ROWS[:8]]) for n in ROWS[0]}
    expected = float(whole.model.eval()(**inputs).loss.detach())
    assert whole.evaluate(ROWS[:8])["eval_loss"] == pytest.approx(expected, rel=1e-4)
    other = MyTrainer(model=(model := injected(share_outer=shared)), args=arguments(tmp_path / "e"), train_dataset=ROWS,
                      low_rank=low_rank(model, total_steps=100))  # fmt: skip
    other.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))  # the Trainer's number of steps counts
    torch.testing.assert_close(adapter(other.model), adapter(whole.model), atol=0, rtol=0)
    run(tmp_path / "c", save_only_model=True)
    with pytest.raises(ValueError, match="written without save_only_model"):
        run(tmp_path / "d", resume=str(tmp_path / "c/checkpoint-4"))


@pytest.mark.parametrize("best", [False, True])
def test_a_training_that_ends_or_is_best_between_two_maskings_leaves_its_adapter(tmp_path, best):
    """AdamW moves pruned values between two maskings: they are in the weights, so they are in the adapter."""
    order = iter([0, 2, 1, 0, 0])
    model = injected()
    evaluated = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6,
                 "load_best_model_at_end": True, "metric_for_best_model": "order",
                 "greater_is_better": True}  # fmt: skip
    trainer = MyTrainer(
        model=model, train_dataset=ROWS, eval_dataset=ROWS[:4],
        low_rank=low_rank(model, mask_interval=10, init_warmup=0, final_warmup=0),
        args=arguments(tmp_path, max_steps=23, optim="adamw_torch", **(evaluated if best else {})),
        compute_metrics=lambda _: {"order": next(order)},
    )  # fmt: skip
    trainer.train()
    live = {name: (layer.lora_E != 0).tolist() for name, layer in loralib.lora_layers(model).items()}
    folder = loralib.save_adapter(model, tmp_path / "adapter")
    stored = loralib.read_adapter_config(folder).groups[0].rank_pattern
    assert {name: [flag == "1" for flag in flags] for name, flags in stored.items()} == live
    assert sum(map(sum, live.values())) == (16 if best else 4)
    again = tiny_bert()
    config, inputs = loralib.load_adapter(again, folder), {"input_ids": ROWS[0]["input_ids"][None]}
    assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)
    assert loralib.compact(model) == config.ranks


def test_a_helper_made_for_another_model_is_refused(tmp_path):
    options = {"args": arguments(tmp_path), "train_dataset": ROWS, "low_rank": low_rank(injected())}
    trainer = MyTrainer(model_init=lambda trial: injected(), **options)
    with pytest.raises(ValueError, match="another model than the Trainer trains"):
        trainer.train()


def test_adalora_without_pruning_and_settings_that_are_refused():
    model = injected("adalora")
    training = loralib.LowRankTraining(model, regu_weight=0.2)
    torch.testing.assert_close(training.penalty(), loralib.compute_orth_regu(model, 0.2))
    with pytest.warns(UserWarning, match="no gradient reached 4 of 4 low-rank layers"):
        training.after_step()
    assert training.rank_pattern is None and training.step == 1
    assert loralib.LowRankTraining(model, regu_weight=0).penalty() == 0.0
    with pytest.raises(RuntimeError, match="start"):
        low_rank(model).after_step()
    for call, says in [
        (lambda: low_rank(model, total_steps=20).load_state_dict(training.state_dict()), "same target_rank"),
        (lambda: low_rank(model, regu_weight=-1), "≥ 0, got -1"),
        (lambda: low_rank(model, regu_weight=float("inf")), "≥ 0, got inf"),
        (lambda: low_rank(model, regu_weight=float("nan")), "≥ 0, got nan"),
        (lambda: low_rank(model, regu_weight=True), "≥ 0, got True"),
        (lambda: low_rank(model, total_steps=1, init_warmup=1), "leaves no step"),
        (lambda: loralib.LowRankTraining(injected("lora")), "no layer with singular values"),
        (lambda: low_rank(model, orthogonality="exact"), "orthogonality must be"),
        (lambda: low_rank(model, orthogonality="retraction", precondition="riemannian"), "no meaning"),
        (lambda: low_rank(model, precondition="natural"), "precondition must be"),
        (lambda: low_rank(model, precondition="riemannian"), "needs regu_weight=0"),
        (lambda: low_rank(model, target_rank=None, target_total_rank=2.5), "target_total_rank must be a whole number"),
        (lambda: low_rank(model, target_total_rank=2), "give one of them"),
        (lambda: low_rank(model, total_steps=20.0), "total_steps must be a whole number"),
        (lambda: loralib.LowRankTraining(model, init_warmup=2), "init_warmup has no meaning without"),
        (lambda: low_rank(model, target_rank=99), "larger than lora_r"),
        (loralib.LowRankTraining(model, orthogonality="retraction").before_step, "not orthonormal"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    for unknown in ("mask_intervall", "lora_r", "total_step"):
        for pruning in ({"target_rank": 2}, {}):
            with pytest.raises(TypeError, match=f"unknown option {unknown}"):
                loralib.LowRankTraining(model, **pruning, **{unknown: 3})


@pytest.mark.parametrize("prune_by", ["importance", "value"])
def test_layers_may_lie_on_several_devices(monkeypatch, prune_by):
    """As a large model split over GPUs: fake tensors know their device, and refuse to meet one of another."""
    monkeypatch.setattr("loralib.allocator.most_important", lambda scores, _: (scores > 0, None))  # slicing needs CUDA
    with FakeTensorMode():
        model = blocks("lora2", std=1.0, r=4, k=3)
        for number, layer in enumerate(loralib.lora_layers(model).values()):
            for tensor in layer.parameters():
                tensor.fake_device = torch.device("cuda", number)
        training = loralib.LowRankTraining(model, 10, target_rank=2, mask_interval=1, prune_by=prune_by)
        for layer in loralib.lora_layers(model).values():
            layer.lora_E.grad = torch.zeros_like(layer.lora_E)
        for _ in range(9):
            with torch.no_grad():  # autograd would look for CUDA's streams
                assert training.penalty().device == torch.device("cuda", 0)
            training.after_step()
        assert training.allocator._mask.device == torch.device("cuda", 0)


def test_a_step_that_was_loaded_before_the_start_is_gone_on_from():
    training = loralib.LowRankTraining(model_to_prune())
    training.load_state_dict({"step": 7, "allocator": None})
    assert training.step == 7
    training.start(20)
    assert training.step == 7
    training = loralib.LowRankTraining(model_to_prune())
    with refused("same target_rank"):
        training.load_state_dict(low_rank(model_to_prune(), total_steps=20).state_dict())
    training.start(20)
    assert training.step == 0


def test_the_defaults_of_a_training():
    training = loralib.LowRankTraining(model_to_prune(), 100, target_rank=2)
    made = training.allocator
    assert (made.init_warmup, made.final_warmup, made.mask_interval, made.beta1, made.beta2) == (10, 50, 10, 0.85, 0.85)
    torch.testing.assert_close(training.penalty(), loralib.compute_orth_regu(training.model, 0.1))
    random_step(training.model, torch.Generator())
    training.after_step()
    training.start(40)  # another training of the same model
    assert (training.step, training.allocator.init_warmup, training.allocator.final_warmup) == (0, 4, 20)


def test_a_step_for_each_accumulated_batch_is_warned_of():
    training = loralib.LowRankTraining(model_to_prune(), 2, regu_weight=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            random_step(training.model, torch.Generator())
            training.after_step()
    with pytest.warns(UserWarning, match="more than total_steps \\(2\\) times"):
        training.after_step()
    training.load_state_dict({"step": 9, "allocator": None})
    with pytest.warns(UserWarning, match="called more than total_steps"):
        training.after_step()


def test_a_resumed_training_has_as_many_steps_as_its_pruning_was_planned_over():
    saved = loralib.LowRankTraining(model_to_prune(), 12, target_rank=2).state_dict()
    training = loralib.LowRankTraining(model_to_prune(), 18, target_rank=2)
    with pytest.raises(ValueError, match="planned over 12 optimiser steps, and now the training has 18: go on with as"):
        training.load_state_dict(saved)


@pytest.mark.parametrize("total, options", [(1, {}), (2, {}), (10, {"final_warmup": 9, "mask_interval": 1})])
def test_however_short_a_training_its_scores_decide(total, options):
    """Without a score, layers would lose their singular values in the order of their names."""
    training = loralib.LowRankTraining(model_to_prune(), total, target_rank=1, init_warmup=0, **options)
    layers = loralib.lora_layers(training.model)
    for step in range(1, total + 1):
        random_step(training.model, torch.Generator().manual_seed(step))
        for layer in layers.values():
            nn.init.ones_(layer.lora_E)
            layer.lora_E.grad.fill_(1e-3)
        for factor in layers["layer.0.q"].lora_parameters():
            factor.grad.fill_(10.0)
        training.after_step()
    assert sum(training.rank_pattern["layer.0.q"]) == training.allocator.live_rank == 3


def test_the_budget_is_what_is_live_after_a_masking():
    training = loralib.LowRankTraining(model_to_prune(), 20, target_rank=1, mask_interval=1, final_warmup=2)
    for step in range(1, 21):
        random_step(training.model, torch.Generator().manual_seed(step))
        training.after_step()
        assert training.budget == training.allocator.live_rank


def test_a_target_for_all_layers_together():
    training = loralib.LowRankTraining(model_to_prune(), 20, target_total_rank=5, mask_interval=1, final_warmup=2)
    for step in range(1, 21):
        random_step(training.model, torch.Generator().manual_seed(step))
        training.after_step()
    assert training.allocator.live_rank == training.budget == 5  # no whole number for each of the layers


def test_a_frozen_adapter_is_neither_pruned_nor_regularised():
    model = model_to_prune()
    first, *_ = loralib.lora_layers(model).values()
    for parameter in first.lora_parameters():
        parameter.requires_grad_(False)
    training = loralib.LowRankTraining(model, 4, target_rank=1, init_warmup=0, final_warmup=2, mask_interval=1)
    assert training.allocator.initial_total_rank == 8 and set(training.rank_pattern) == {"layer.1.q", "layer.2.q"}
    before = training.penalty()
    with torch.no_grad():
        first.lora_B[1].mul_(2)
    assert torch.equal(training.penalty(), before)


class Reader(nn.Module):
    """Reads the weight of one of its layers itself, as WavLM's attention does."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def trained_once(model, training, clear=False):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (model(INPUTS).square().sum() + training.penalty()).backward()
    optimizer.step()
    if clear:
        optimizer.zero_grad()
    training.after_step()


@pytest.mark.parametrize("kind", ["lora", "lora2"])
def test_layers_that_the_model_does_not_call_are_named_once(kind):
    model = Reader()
    loralib.inject(model, kind, ["called", "read"], r=2)
    loralib.mark_only_lora_as_trainable(model)
    training = loralib.LowRankTraining(model, 9, regu_weight=0.0 if kind == "lora" else 0.1)
    with pytest.warns(UserWarning, match="no gradient reached 1 of 2 low-rank layers, read among them") as seen:
        trained_once(model, training)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained_once(model, training)


def test_pruning_without_gradients_is_refused():
    """All scores would be 0, and modules would be pruned by their names."""
    model = adapted(r=4)
    training = loralib.LowRankTraining(model, 9, target_rank=2, mask_interval=1)
    with (
        pytest.warns(UserWarning, match="cleared"),
        pytest.raises(ValueError, match="before the gradients are cleared"),
    ):
        trained_once(model, training, clear=True)
    assert training.rank_pattern["layers.2.q"] == [True] * 4


@pytest.mark.parametrize("options", [
    {"precondition": "riemannian", "regu_weight": 0.0}, {"orthogonality": "retraction"},
])  # fmt: skip
def test_importance_is_of_the_gradients_before_they_are_changed(options):
    model = Net()
    loralib.inject(model, "lora2", ["q", "v"], r=3, k=3, init="orthogonal")
    loralib.mark_only_lora_as_trainable(model)
    training = loralib.LowRankTraining(model, 20, target_rank=1, init_warmup=5, **options)
    for layer in loralib.lora_layers(model).values():
        nn.init.ones_(layer.lora_E)
    model(INPUTS).square().sum().backward()
    raw = {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}
    training.before_step()
    for layer in loralib.lora_layers(model).values():
        for factor in layer.lora_parameters():
            nn.init.ones_(factor)  # the step
    training.after_step()
    scores = training.allocator._scores
    assert any(not torch.equal(p.grad, raw[id(p)]) for group in scores for p in group.parameters)
    for group in scores:
        expected = torch.stack([(p.detach() * raw[id(p)]).abs() for p in group.parameters])
        torch.testing.assert_close(group.sensitivity, 0.15 * expected)


def test_a_training_is_copied_with_its_model():
    """The copy trains and prunes the copied model, and leaves the first one alone."""
    model = blocks("multiscale", 2, (12, 9), std=0.3, r=4, widths=(4,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"total_steps": 8, "target_rank": 2, "init_warmup": 1, "final_warmup": 4, "mask_interval": 1}
    trained, low_rank = copy.deepcopy((model, loralib.LowRankTraining(model, **options)))
    for _ in range(8):
        (low_rank.penalty() + sum(p.square().sum() for p in trained.parameters() if p.requires_grad)).backward()
        low_rank.before_step()
        low_rank.after_step()
    assert sum(int(layer.lora_E.count_nonzero()) for layer in loralib.lora_layers(trained).values()) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
