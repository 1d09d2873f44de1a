"""The helper for plain loops and the Trainer mix-in: the same training, step by step, and exact resumption."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import loralib

STEPS, BATCH = 8, 4


class MyTrainer(loralib.LowRankTrainerMixin, Trainer):
    pass


def injected(pretrained, kind="lora2"):
    model = pretrained.base()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    loralib.inject(model, kind, ["query", "value"], r=4)
    loralib.mark_only_lora_as_trainable(model)
    for layer in loralib.lora_layers(model).values():
        if layer.lora_E is not None:
            torch.nn.init.normal_(layer.lora_E)  # scores apart enough that rounding does not change their order
    return model


def rows(pretrained, count=STEPS * BATCH):
    inputs = pretrained.tokenizer(
        [r["sentence1"] for r in pretrained.rows[:count]], [r["sentence2"] for r in pretrained.rows[:count]],
        padding=True, truncation=True, max_length=32, return_tensors="pt",
    )  # fmt: skip
    labels = torch.tensor([r["label"] for r in pretrained.rows[:count]])
    return [{**{n: t[i] for n, t in inputs.items()}, "labels": labels[i]} for i in range(count)]


def arguments(folder, accumulate=1, **changes):
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH // accumulate,
        "gradient_accumulation_steps": accumulate, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0, "report_to": [], "train_sampling_strategy": "sequential", "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(**{**options, **changes})


def squared_error(outputs, labels, num_items_in_batch=None):
    total = (outputs["logits"].squeeze(-1) - labels).square().sum()
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def low_rank(model, **changes):
    options = {"target_rank": 1, "init_warmup": 1, "mask_interval": 1, "regu_weight": 0.3, **changes}
    return loralib.LowRankTraining(model, **options)


def adapter(model):
    return {n: t.clone() for n, t in loralib.lora_state_dict(model).items()}


def assert_same(first, second, **close):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **close)


@pytest.fixture(scope="module")
def plain_loop(pretrained):
    """(adapter, rank pattern) after a loop of our own, and what the loop's parts say at each step."""
    model = injected(pretrained).train()
    training = low_rank(model, total_steps=STEPS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    data, live = rows(pretrained), []
    for step in range(STEPS):
        part = data[step * BATCH : (step + 1) * BATCH]
        loss = model(**{n: torch.stack([row[n] for row in part]) for n in part[0]}).loss
        (loss + training.penalty()).backward()
        optimizer.step()
        training.after_step()
        optimizer.zero_grad()
        live.append(training.allocator.live_rank)
    return adapter(model), training.rank_pattern, live


def test_the_loop_prunes_to_the_target(plain_loop):
    _, pattern, live = plain_loop
    assert live[0] == 48 and live[-1] == 12 and live == sorted(live, reverse=True)
    assert sum(map(sum, pattern.values())) == 12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_with_the_mixin_does_the_same(pretrained, plain_loop, tmp_path, accumulate):
    model = injected(pretrained)
    # BERT's own loss ignores the number of rows in a step, so that it would count twice with two batches a step
    trainer = MyTrainer(model=model, args=arguments(tmp_path, accumulate), train_dataset=rows(pretrained),
                        low_rank=low_rank(model), compute_loss_func=squared_error)  # fmt: skip
    trainer.train()
    assert_same(adapter(model), plain_loop[0], atol=1e-5, rtol=1e-4)
    assert trainer.low_rank.rank_pattern == plain_loop[1]


def test_a_resumed_trainer_ends_with_the_same_bits(pretrained, tmp_path):
    def run(folder, resume=None, **changes):
        model = injected(pretrained)
        trainer = MyTrainer(model=model, args=arguments(folder, save_strategy="steps", save_steps=4, **changes),
                            train_dataset=rows(pretrained), low_rank=low_rank(model))  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return adapter(model), trainer.low_rank.state_dict()

    whole, state = run(tmp_path / "a")
    resumed, resumed_state = run(tmp_path / "b", resume=str(tmp_path / "a/checkpoint-4"))
    assert_same(whole, resumed, atol=0, rtol=0)
    assert state["step"] == resumed_state["step"] == STEPS
    assert torch.equal(state["allocator"]["mask"], resumed_state["allocator"]["mask"])


def test_the_best_checkpoint_comes_back_with_its_ranks(pretrained, tmp_path):
    falling = iter(range(100, 0, -1))
    model = injected(pretrained)
    trainer = MyTrainer(
        model=model, train_dataset=rows(pretrained), eval_dataset=rows(pretrained, 8), low_rank=low_rank(model),
        args=arguments(tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                       load_best_model_at_end=True, metric_for_best_model="order", greater_is_better=True),
        compute_metrics=lambda _: {"order": next(falling)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2") and trainer.state.global_step == STEPS
    live = {name: (layer.lora_E != 0).tolist() for name, layer in loralib.lora_layers(model).items()}
    pattern = trainer.low_rank.rank_pattern
    assert sum(map(sum, pattern.values())) > 12  # more than at the end
    assert all(not value or pattern[name][i] for name, values in live.items() for i, value in enumerate(values))


def test_evaluation_has_no_penalty(pretrained, tmp_path):
    model = injected(pretrained)
    trainer = MyTrainer(model=model, args=arguments(tmp_path), low_rank=low_rank(model))
    data = rows(pretrained, 8)
    loss = trainer.evaluate(data)["eval_loss"]
    inputs = {n: torch.stack([row[n] for row in data]) for n in data[0]}
    assert loss == pytest.approx(float(model.eval()(**inputs).loss.detach()), rel=1e-4)


def test_adalora_without_pruning_and_bad_settings(pretrained):
    model = injected(pretrained, "adalora")
    training = loralib.LowRankTraining(model, regu_weight=0.2)
    torch.testing.assert_close(training.penalty(), loralib.compute_orth_regu(model, 0.2))
    training.after_step()
    assert training.rank_pattern is None and training.step == 1
    assert loralib.LowRankTraining(model, regu_weight=0).penalty() == 0.0
    with pytest.raises(ValueError, match="same target_rank"):
        low_rank(model, total_steps=20).load_state_dict(training.state_dict())
    with pytest.raises(RuntimeError, match="start"):
        low_rank(model).after_step()
    with pytest.raises(ValueError, match="negative"):
        low_rank(model, regu_weight=-1)
    with pytest.raises(ValueError, match="leaves no step"):
        low_rank(model, total_steps=1, init_warmup=1)
    with pytest.raises(ValueError, match="no layer with singular values"):
        loralib.LowRankTraining(injected(pretrained, "lora"))


@pytest.mark.parametrize("best", [False, True])
def test_a_training_that_ends_or_is_best_between_two_maskings_leaves_its_adapter(pretrained, tmp_path, best):
    """AdamW moves pruned values between two maskings: they are in the weights, so they are in the adapter."""
    order = iter([0, 2, 1, 0, 0])
    model = injected(pretrained)
    evaluated = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6,
                 "load_best_model_at_end": True, "metric_for_best_model": "order",
                 "greater_is_better": True}  # fmt: skip
    trainer = MyTrainer(
        model=model, train_dataset=rows(pretrained), eval_dataset=rows(pretrained, 4),
        low_rank=low_rank(model, mask_interval=10, init_warmup=0, final_warmup=0),
        args=arguments(tmp_path, max_steps=23, optim="adamw_torch", **(evaluated if best else {})),
        compute_metrics=lambda _: {"order": next(order)},
    )  # fmt: skip
    trainer.train()
    live = {name: (layer.lora_E != 0).tolist() for name, layer in loralib.lora_layers(model).items()}
    folder = loralib.save_adapter(model, tmp_path / "adapter", rank_pattern=trainer.low_rank.rank_pattern)
    stored = loralib.read_adapter_config(folder).groups[0].rank_pattern
    assert {name: [flag == "1" for flag in flags] for name, flags in stored.items()} == live
    assert sum(map(sum, live.values())) == (48 if best else 12)


@pytest.mark.parametrize("options", [{"orthogonality": "retraction"}, {"precondition": "riemannian"}])
def test_a_trainer_calls_what_a_loop_calls_before_and_after_the_step(pretrained, tmp_path, options):
    results = []
    for trainer_like in (False, True):
        model = pretrained.base()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        loralib.inject(model, "lora2", ["query", "value"], r=4, init="orthogonal")
        loralib.mark_only_lora_as_trainable(model)
        training = low_rank(model, target_rank=None, **options)
        data = rows(pretrained)
        if trainer_like:
            MyTrainer(model=model, args=arguments(tmp_path), train_dataset=data, low_rank=training).train()
        else:
            model.train()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            for step in range(STEPS):
                part = data[step * BATCH : (step + 1) * BATCH]
                loss = model(**{n: torch.stack([row[n] for row in part]) for n in part[0]}).loss
                (loss + training.penalty()).backward()
                training.before_step()
                optimizer.step()
                training.after_step()
                optimizer.zero_grad()
        results.append(adapter(model))
    assert_same(*results, atol=1e-5, rtol=1e-4)
    if "orthogonality" in options:
        assert loralib.update_statistics(model).deviation < 1e-5
        assert training.regu_weight == 0


@pytest.mark.parametrize("options, message", [
    ({"orthogonality": "exact"}, "orthogonality must be"),
    ({"orthogonality": "retraction", "precondition": "riemannian"}, "no meaning"),
    ({"precondition": "natural"}, "kind must be"),
])  # fmt: skip
def test_options_that_mean_nothing_are_refused(pretrained, options, message):
    with pytest.raises(ValueError, match=message):
        loralib.LowRankTraining(injected(pretrained), **options)


def test_an_update_without_orthonormal_factors_is_not_retracted(pretrained):
    training = loralib.LowRankTraining(injected(pretrained), orthogonality="retraction")
    with pytest.raises(ValueError, match="not orthonormal"):
        training.before_step()
