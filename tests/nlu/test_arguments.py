"""The command line: the published flags, precedence, ranges, the batch and the schedule."""

import inspect
import json
import shlex
from dataclasses import fields

import pytest
from transformers import TrainingArguments

import loralib
from nlu import fine_tuning, run_glue
from nlu.arguments import TRAINING_FLAGS
from nlu.command_line import fit_schedule, parse_arguments
from nlu.errors import UsageError
from nlu.methods.low_rank import PRUNING_FLAGS
from nlu.trainer import trainer_arguments
from tests.nlu.tiny import make_encoder, make_rows, write_rows

# The published flags; the values that depend on the number of rows are filled in by format().
TEMPLATE = """--model_name_or_path microsoft/deberta-v3-base --task_name mnli --apply_adalora --apply_lora
    --lora_type svd --target_rank 3 --lora_r 8 --reg_orth_coef 0.1 --init_warmup {init} --final_warmup {final}
    --mask_interval {mask} --beta1 0.85 --beta2 0.85
    --lora_module query,key,value,intermediate,layer.output,attention.output
    --lora_alpha 16 --do_train --do_eval --max_seq_length 256 --per_device_train_batch_size 32 --learning_rate 5e-4
    --num_train_epochs 7 --warmup_steps {warmup} --cls_dropout 0.15 --weight_decay 0 --evaluation_strategy steps
    --eval_steps {eval} --save_strategy steps --save_steps {save} --logging_steps {log} --seed 6
    --root_output_dir ./output/glue/mnli --overwrite_output_dir"""
PUBLISHED = TEMPLATE.format(init=8000, final=50000, mask=100, warmup=1000, eval=3000, save=30000, log=500)
BASE = "--model_name_or_path m --task_name cola --do_train --learning_rate 1e-3 --root_output_dir out"


def parse(text):
    return parse_arguments(shlex.split(text))


def test_the_published_command_runs_and_is_lora2(tmp_path, monkeypatch, capsys):
    """Only its schedule is shortened to fit 60 rows; the original schedule is refused before a model is loaded."""
    make_encoder(tmp_path / "microsoft" / "deberta-v3-base", "deberta-v2")
    for seed, (split, count) in enumerate({"train": 60, "validation_matched": 10, "validation_mismatched": 8}.items()):
        rows = make_rows(("premise", "hypothesis"), False, count, seed, labels=3)
        write_rows(tmp_path / "glue" / "mnli" / f"{split}.jsonl", rows)

    monkeypatch.setenv("GLUE_DIR", str(tmp_path / "glue"))
    monkeypatch.chdir(tmp_path)
    flags = TEMPLATE.format(init=200, final=400, mask=200, warmup=200, eval=7, save=7, log=1).split()
    flags += ["--local-rank=0", "--schedule_steps", "1400"]  # the first as torch.distributed.launch adds it
    assert run_glue.main(flags) == 0
    record = json.loads((tmp_path / "output/glue/mnli/results.json").read_text())
    assert (record["status"], record["method"], record["steps"]) == ("finished", "lora2", 14)
    assert "accuracy" in record["evaluations"][-1]
    assert record["live_budget"] == 12 * 3
    expected = {
        "method": "lora2", "lora_k": 8, "lora_r": 8, "target_rank": 3, "reg_orth_coef": 0.1, "lora_alpha": 16,
        "rank_allocation": True, "init_warmup": 200, "final_warmup": 400, "mask_interval": 200, "warmup_steps": 200,
        "max_seq_length": 256, "learning_rate": 5e-4, "num_train_epochs": 7, "cls_dropout": 0.15, "seed": 6,
        "eval_strategy": "steps", "eval_steps": 7, "save_steps": 7, "overwrite_output_dir": True,
    }  # fmt: skip
    assert {name: record["arguments"][name] for name in expected} == expected
    assert (tmp_path / "output/glue/mnli/adapter/adapter_config.json").is_file()

    monkeypatch.setattr(fine_tuning, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert run_glue.main(PUBLISHED.split()) == 2
    error = capsys.readouterr().err
    assert "8000 + 50000 = 58000" in error and "the training has 14" in error and "--schedule_steps" in error
    assert json.loads((tmp_path / "output/glue/mnli/results.json").read_text()) == record


@pytest.mark.parametrize("flags, method, allocation", [
    ("--apply_lora --lora_type frd", "lora", None),
    ("--apply_lora", "lora", None),
    ("--apply_lora --lora_type svd", "lora2", False),
    ("--method lora2 --local_rank 1", "lora2", True),  # as a launcher adds it
])  # fmt: skip
def test_parse_arguments_maps_published_flags_to_a_method(flags, method, allocation):
    parsed = parse(f"{BASE} {flags}")
    assert parsed.method == method and (allocation is None or parsed.rank_allocation is allocation)


@pytest.mark.parametrize("flags, rate, rank, seed", [
    ("", 1.2e-3, 4, 6),
    ("--method full", 2e-5, 8, 6),  # the method's file wins over the published settings
    ("--method full --learning_rate 3e-3 --seed 4", 3e-3, 8, 4),  # and a flag over both
    ("--method adalora", 1.2e-3, 2, 6),  # AdaLoRA's own
    ("--method adalora_r8 --lora_r 10", 1.2e-3, 10, 6),
])  # fmt: skip
def test_method_file_and_flags_override_the_published_settings(flags, rate, rank, seed):
    arguments = parse(f"--published deberta-v3-base --task_name rte --do_train {flags}")
    found = arguments.learning_rate, arguments.lora_r, arguments.seed
    assert found == (rate, rank, seed)
    folder = f"output/glue/deberta-v3-base/rte/{arguments.method_config}/seed-{seed}"
    assert arguments.root_output_dir == folder
    own = parse(f"--model_name_or_path models/m --train_file data/x.csv --do_train --learning_rate 1 {flags}")
    assert own.root_output_dir == f"output/own/m/x/{own.method_config}/seed-{own.seed}"


def test_load_best_model_at_end_saves_a_checkpoint_at_every_evaluation():
    training = parse(f"{BASE} --eval_strategy steps --eval_steps 2 --save_steps 4 --load_best_model_at_end")
    assert (training.save_strategy, training.save_steps) == ("steps", 2)
    assert parse(f"{BASE} --eval_strategy epoch --load_best_model_at_end").save_strategy == "epoch"
    assert parse(f"{BASE} --eval_strategy steps --logging_steps 3").eval_steps == 3
    assert parse(f"{BASE} --eval_steps 7").eval_strategy == "steps" and parse(f"{BASE} --eval_steps 7").do_eval


# If accepted, each of these would silently give a wrong number or a run other than the one asked for.
WRONG = """
--method lora --lora_type svd | --lora_type chooses a method too
--lora_type frd --apply_adalora | svd
--learning_rate nan | must be above 0
--max_steps 0 | must be at least 1
--method lora --target_rank 3 | --target_rank has no meaning with --method lora
--method bitfit --lora_path x | --lora_path has no meaning with --method bitfit
--method lora2_plus --target_rank 3 | --target_rank has no meaning with --rank_allocation False
--optim schedule_free_adamw | an average of the weights
--method lora2_plus --optim schedule_free_sgd | an average of the weights
--method rslora --peft_config {} | a peft_config of its own
--learning_rat 1 | unknown argument --learning_rat: did you mean --learning_rate?
--total_batch_size 32 --gradient_accumulation_steps 2 | follows from --total_batch_size
--train_file x.csv | for your own files
--bf16 --fp16 | exclude each other
--report_to trackio | pip install trackio
--load_best_model_at_end | need evaluations
--predict_task ax | goes with --task_name mnli
""".strip().splitlines()


@pytest.mark.parametrize("line", WRONG)
def test_parse_arguments_refuses_wrong_flags_in_one_line(line):
    flags, message = line.split(" | ")
    with pytest.raises(UsageError) as error:
        parse(f"{BASE} {flags}")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_factors_are_not_split_by_accelerates_configuration(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")  # as `accelerate launch` sets it
    with pytest.raises(UsageError, match=f"{name} .accelerate's configuration.*use torchrun"):
        parse(BASE)


# ---- the Trainer's arguments ---------------------------------------------------------------------------------------


def test_training_flags_have_the_trainers_defaults():
    theirs = {field.name: field.default for field in fields(TrainingArguments)}
    ours = {flag.name: flag.default for flag in TRAINING_FLAGS if flag.name in theirs}
    different = {name for name, default in ours.items() if (default or None) != (theirs[name] or None)}
    chosen_here = {"learning_rate", "logging_steps", "per_device_eval_batch_size", "save_total_limit"}
    assert different == chosen_here


def test_pruning_flags_have_the_librarys_defaults():
    theirs = inspect.signature(loralib.RankAllocator).parameters
    ours = {flag.name: flag.default for flag in PRUNING_FLAGS if flag.name != "target_rank"}  # half of lora_r
    assert ours == {name: theirs[name].default for name in ours}
    assert parse(f"{BASE} --method adalora --lora_r 6").target_rank == 3


def test_trainer_arguments_has_every_value_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch` may set it
    text = (
        f"{BASE} --root_output_dir {tmp_path} --eval_strategy steps --max_steps 7 --warmup_ratio 0.1 --adam_epsilon 0.1"
    )
    arguments = parse(f"{text} --bf16 --use_cpu")
    training = trainer_arguments(arguments, "matthews_correlation")
    for name in {flag.name for flag in TRAINING_FLAGS} & vars(training).keys() - {"bf16", "report_to"}:
        assert getattr(training, name) == getattr(arguments, name), name
    assert training.max_steps == 7 and training.report_to == [] and training.output_dir == str(tmp_path / "model")
    assert training.metric_for_best_model == "eval_matthews_correlation" and training.greater_is_better
    # LoRA²'s layers and the head stay in float32 without autocast.
    assert not training.bf16 and training.mixed_precision == "no"
    assert trainer_arguments(parse(f"{text} --bf16 --use_cpu --method full"), "matthews_correlation").bf16


# ---- the batch and the schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, at_once, accumulated", [
    ("", 8, 1), ("--per_device_train_batch_size 3", 2, 4), ("--per_device_train_batch_size 16", 8, 1),
])  # fmt: skip
def test_total_batch_size_is_kept_for_any_number_of_processes(flags, at_once, accumulated, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    training = parse(f"{BASE} --total_batch_size 32 {flags}")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (at_once, accumulated)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="does not divide among 3 processes"):
        parse(f"{BASE} --total_batch_size 32")


SCHEDULE = "--warmup_steps 200 --init_warmup 600 --final_warmup 1800 --mask_interval 10"


@pytest.mark.parametrize("flags, steps, expected", [
    (SCHEDULE, 100, (200, 600, 1800, 10)),  # without --schedule_steps the numbers are used as they are
    (f"{SCHEDULE} --schedule_steps 4000", 1000, (50, 150, 450, 2)),
    (f"{SCHEDULE} --schedule_steps 4000", 100, (5, 15, 45, 1)),  # the interval is at least 1
    (f"{SCHEDULE} --schedule_steps 4000", 9000, (200, 600, 1800, 10)),  # a longer training does not stretch it
    ("--warmup_ratio=0.1 --schedule_steps 4000", 1000, (0.1, None, None, 2)),  # a warm-up ratio fits any length
    ("--schedule_steps 4000", 0, (0, None, None, 10)),  # nothing is trained
])  # fmt: skip
def test_fit_schedule_shrinks_in_proportion_and_keeps_the_arguments(flags, steps, expected):
    arguments = parse(f"{BASE} {flags}")
    before = dict(arguments.values)
    fitted = fit_schedule(arguments, steps)
    assert (fitted.warmup_steps, fitted.init_warmup, fitted.final_warmup, fitted.mask_interval) == expected
    assert all(getattr(arguments, name) == before[name] for name in ("init_warmup", "mask_interval"))
