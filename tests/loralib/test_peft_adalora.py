"""peft's AdaLoRA with our helpers: problems that its users reported, checked against peft's own code."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model

from loralib.export import main
from loralib.interop.peft_adalora import AdaLoraTraining
from tests.loralib.small import LowRankTrainer, encoder, trainable, training_arguments

IDS = torch.tensor([[2, 7, 9, 3], [2, 4, 4, 3]])
ROWS = [{"input_ids": [2, 5 + i, 7, 3], "labels": i % 2} for i in range(8)]
SCHEDULE = {"init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 3, "deltaT": 1, "total_step": 1000}


def adalora(**options):
    torch.manual_seed(0)
    settings = SCHEDULE | {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | options
    return get_peft_model(encoder(), AdaLoraConfig(**settings))


def train(model, folder, resume=None, metrics=None, **options):
    torch.manual_seed(1)
    arguments = training_arguments(folder, max_steps=8, per_device_train_batch_size=2, learning_rate=0.05, **options)
    data = {"train_dataset": ROWS, "eval_dataset": ROWS, "compute_metrics": metrics}
    trainer = LowRankTrainer(model=model, low_rank=AdaLoraTraining(model), args=arguments, **data)
    trainer.train(resume_from_checkpoint=resume)
    model.eval()
    return trainer


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def ranks(model):
    return [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name]


def test_a_budget_that_prunes_nothing_masks_nothing():
    """peft's issue 2337: its own allocator raises there, because kthvalue rejects k = 0."""
    training = AdaLoraTraining(model := adalora(target_r=4))
    training.start(8)
    for factor in trainable(model):
        torch.nn.init.ones_(factor)
    for _ in range(8):
        training.after_step()
    assert ranks(model) == [4] * 4


def test_regulariser_is_the_penalty_and_no_longer_in_the_loss():
    """In the loss it would count once for each accumulated batch and each process, and not with label smoothing."""
    losses = []
    for weight in (0.0, 5.0):
        model = adalora(orth_reg_weight=weight).eval()
        losses.append(model(input_ids=IDS, labels=torch.tensor([0, 1])).loss)
    penalty = AdaLoraTraining(model).penalty()
    torch.testing.assert_close(penalty, losses[1] - losses[0])
    assert penalty > 1 and torch.equal(model(input_ids=IDS, labels=torch.tensor([0, 1])).loss, losses[0])


def test_trainer_equals_the_loop_of_pefts_documentation(tmp_path):
    """peft's issues 432 and 1801: the Trainer alone never calls the allocator. With the mix-in, the number of steps,
    the ranks and the weights are those of a plain loop with peft's allocator."""
    theirs, ours = adalora(total_step=8), adalora()
    for module in [*theirs.modules(), *ours.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = train(ours, tmp_path, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant",
                    train_sampling_strategy="sequential")  # fmt: skip
    optimizer = torch.optim.SGD(trainable(theirs), lr=0.05)
    for step in range(8):
        batch = [ROWS[(2 * step + i) % 8] for i in range(2)]
        inputs = {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")}
        theirs(**inputs).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    assert ranks(theirs) == ranks(ours) and sum(ranks(ours)) == 4
    assert ours.peft_config["default"].total_step == trainer.low_rank.steps_done == 8
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_resume_from_a_checkpoint_gives_the_same_logits_and_ranks(tmp_path):
    train(whole := adalora(), tmp_path, save_strategy="steps", save_steps=3)
    for step in (3, 6):  # before and after the last masking, at step 5
        train(resumed := adalora(), tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
        assert torch.equal(logits(resumed), logits(whole)) and ranks(resumed) == ranks(whole), step


def test_training_of_another_model_and_too_few_or_other_steps_are_refused():
    kind = type(other := get_peft_model(encoder(), LoraConfig(target_modules=["query"])).base_model)
    with pytest.raises(AttributeError):
        AdaLoraTraining(other)
    assert type(other) is kind
    training = AdaLoraTraining(adalora())
    with pytest.raises(ValueError, match="optimiser lacks"):
        training.before_step(torch.optim.SGD(trainable(adalora()), lr=1.0))
    with pytest.raises(ValueError, match=r"1 \+ 3 = 4 leaves no step to prune in: the training has 4"):
        training.start(4)
    training.start(8)
    longer = AdaLoraTraining(adalora())
    longer.start(16)
    with pytest.raises(ValueError, match="8 steps"):
        longer.load_state_dict(training.state_dict())


@pytest.mark.parametrize(("scores", "live"), [([3, 1, 1], None), ([1, 3, 1], 4)])
def test_best_checkpoint_is_saved_with_its_own_ranks(tmp_path, scores, live):
    """The best weights of step 3 have singular values that the last masking, at step 5, would prune."""
    values = iter(scores)
    model = adalora()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    every = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    train(model, tmp_path, metrics=lambda _: {"score": next(values)}, **every, **best)
    pattern = model.peft_config["default"].rank_pattern
    assert pattern is None if live is None else sum(map(sum, pattern.values())) == live
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(encoder(), tmp_path / "saved").eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)


def test_layers_of_rank_0_are_saved_loaded_merged_and_converted(tmp_path, capsys):
    """peft's issue 1539."""
    loop = AdaLoraTraining(model := adalora().eval())
    generator, pattern = torch.Generator().manual_seed(3), {}
    for (name, layer), kept in zip(loop.layers.items(), [(), (0, 2), (), (1, 2, 3)], strict=True):
        for factors in (layer.lora_A, layer.lora_B, layer.lora_E):
            torch.nn.init.normal_(factors["default"], generator=generator)
        pattern[f"{name}.lora_E.default"] = flags = [i in kept for i in range(4)]
        layer.lora_E["default"].data[[not flag for flag in flags]] = 0
    model.peft_config["default"].rank_pattern, model.peft_config["default"].revision = pattern, "r1"
    expected = logits(model)
    model.save_pretrained(tmp_path / "ada")
    again = PeftModel.from_pretrained(encoder(), tmp_path / "ada").eval()
    torch.testing.assert_close(logits(again), expected)
    assert main([str(tmp_path / "ada"), "--to", "peft", str(tmp_path / "lora"), "--base", "some/base"]) == 0
    assert "2 modules of rank 2 to 3" in capsys.readouterr().out
    lora = PeftModel.from_pretrained(encoder(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(lora), expected, atol=1e-5, rtol=1e-5)
    config = lora.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("some/base", None)
    assert "classifier" in config.modules_to_save and config.task_type == "SEQ_CLS"
    torch.testing.assert_close(logits(lora.merge_and_unload()), logits(again.merge_and_unload()), atol=1e-5, rtol=1e-5)
