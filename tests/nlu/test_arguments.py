"""The command line: the published flags, precedence, and one line for whatever is wrong."""

import json
import re
import shlex

import pytest

from nlu.argument_checks import REFUSED_FLAGS, fit_schedule, one_device
from nlu.arguments import RunArguments, build_parser, parse_arguments
from nlu.errors import UsageError
from nlu.runs.folder import changed_arguments
from nlu.trainer import effective_batch_size
from tests.nlu.test_published_command import PUBLISHED
from tests.nlu.tiny import run_python

BASE = "--model_name_or_path m --task_name cola --do_train --root_output_dir out"


def parse(text):
    return parse_arguments(shlex.split(text))


def test_the_published_command_means_lora2():
    arguments = parse(PUBLISHED)
    method, training = arguments.method, arguments.training
    assert (method.method, method.lora_k, method.lora_r, method.target_rank) == ("lora2", None, 8, 3)
    assert (method.init_warmup, method.final_warmup, method.mask_interval) == (8000, 50000, 100)
    assert method.rank_allocation and method.reg_orth_coef == 0.1 and method.lora_alpha == 16
    assert training.eval_strategy == "steps" and training.eval_steps == 3000 and training.save_steps == 30000
    assert training.learning_rate == 5e-4 and training.warmup_steps == 1000 and training.num_train_epochs == 7
    assert training.overwrite_output_dir and arguments.model.cls_dropout == 0.15
    assert arguments.data.max_seq_length == 256 and training.seed == 6


@pytest.mark.parametrize(
    "flags, method, allocation",
    [
        ("--apply_lora --lora_type frd", "lora", None),
        ("--apply_lora", "lora", None),
        ("--apply_lora --lora_type svd --apply_adalora", "lora2", True),
        ("--apply_lora --lora_type svd", "lora2", False),
        ("--method adalora --apply_lora --lora_type svd --apply_adalora", "adalora", True),
        ("--method lora2 --local_rank 1", "lora2", True),  # as a launcher adds it
        ("--local-rank=0", "lora2", True),
    ],
)
def test_published_flags_and_their_method(flags, method, allocation):
    parsed = parse(f"{BASE} {flags}").method
    assert parsed.method == method and (allocation is None or parsed.rank_allocation is allocation)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_an_argument_file_comes_first_and_flags_override_it(tmp_path, suffix):
    values = {"model_name_or_path": "m", "task_name": "cola", "do_train": True, "root_output_dir": "out",
              "method": "adalora", "lora_r": 6, "learning_rate": 1e-3, "cls_dropout": None}  # fmt: skip
    path = tmp_path / f"run{suffix}"
    path.write_text(json.dumps(values))  # JSON is YAML too
    parsed = parse(f"{path} --lora_r 5")
    assert parsed.method.lora_r == 5 and parsed.method.method == "adalora"
    assert parsed.training.learning_rate == 1e-3 and parsed.training.do_train
    assert parse(f"{path} --method lora2").method.method == "lora2"


def test_the_default_target_is_half_the_rank():
    assert parse(f"{BASE} --lora_r 8").method.target_rank == 4
    assert parse(f"{BASE} --lora_r 1").method.target_rank == 1


WRONG = {
    BASE: [
        ("--target_rank 9 --lora_r 8", "target_rank (9) is larger than lora_r (8)"),
        ("--task_name nope", "unknown task"),
        ("--task_name ax", "ax has a test set only"),
        (
            "--task_name ax --do_train False --do_eval False --eval_strategy no --do_predict --holdout_fraction 0.1",
            "ax has a test set only",
        ),
        ("--method ../methods/lora", "unknown method"),
        ("--method lora --lora_type svd", "contradicts"),
        ("--lora_type frd --apply_adalora", "svd"),
        ("--lora_type other", "lora_type"),
        ("--lora_r 0", "lora_r"),
        ("--lora_r two", "lora_r"),
        ("--lora_k 0", "lora_k"),
        ("--reg_orth_coef -1", "reg_orth_coef"),
        ("--value_lr_ratio 0", "positive"),
        ("--value_lr_ratio fast", "value_lr_ratio"),
        ("--method hadapter --adapter_size 0", "--adapter_size"),
        ("--method sora --sora_lambda -1", "--sora_lambda"),
        ("--lora_k 8 --lora_widths 4,4", "exclude"),
        ("--lora_widths 4,x", "lora_widths"),
        ("--lora_dropout 1", "lora_dropout"),
        ("--lora_init zeros", "lora_init"),
        ("--orth_terms PP", "terms"),
        ("--method lora --target_rank 3", "no meaning with --method lora"),
        ("--no_such_flag 1", "no_such_flag"),
        ("--learning-rat 1", "unknown argument --learning_rat: did you mean --learning_rate?"),
        ("--total_batch_size 32 --gradient_accumulation_steps 2", "follows from --total_batch_size"),
        ("--warmup_ratio 1.0", "warmup_ratio"),
        ("--max_seq_length 0", "max_seq_length"),
        ("--max_steps 0", "step"),
        ("--learning_rate 0", "learning_rate"),
        ("--holdout_fraction 1", "holdout_fraction"),
        ("--cls_dropout 1.5", "cls_dropout"),
        ("--train_file x.csv", "exclude each other"),
        ("--evaluation_strategy sometimes", "sometimes"),
        ("--bf16 --fp16", "fp16 and bf16"),
        ("--report_to tensorbord", "tensorbord"),
        ("--resume_from_checkpoint out/model/checkpoint-3", "same command continues"),
        ("--push_to_hub", "--hub_model_id OWNER/NAME"),
        ("--hub_model_id me/adapter", "without --push_to_hub"),
        ("--report_to wandb", "pip install wandb"),
        ("--early_stopping_patience 2", "--eval_strategy steps"),
        ("--early_stopping_threshold 0.1", "without --early_stopping_patience"),
        ("--save_strategy best", "--save_strategy best needs evaluations"),
        ("--load_best_model_at_end --save_strategy no", "--load_best_model_at_end needs evaluations"),
        ("--lr_scheduler_type reduce_lr_on_plateau --do_eval --eval_strategy epoch", "does not watch a metric"),
        (
            "--do_eval --eval_strategy steps --load_best_model_at_end --eval_steps 2 --save_steps 4",
            "one value, not 4 and 2",
        ),
        (
            "--do_eval --eval_strategy epoch --save_strategy epoch --load_best_model_at_end --eval_on_start",
            "--eval_on_start",
        ),
        ("--bf16_full_eval", "with --bf16"),
        ("--fp16_full_eval", "with --fp16"),
        ("--ignore_data_skip", "not supported"),
        ("--lr_scheduler_type greedy --do_eval --eval_strategy epoch", "does not watch a metric"),
        ("--accelerator_config {}", "change the batch"),
        ("--save_only_model", "a checkpoint holds"),
        ("--torch_compile_backend foo", "foo is unknown; usual ones: "),
        ("--use_liger_kernel", "not supported"),
        ("--skip_memory_metrics False", "peak memory"),
        ("--deepspeed ds.json", "configs/accelerate/fsdp.yaml"),
        ("--optim_args betas=0.8", "no meaning with --optim adamw_torch"),
        ("--debug underflow_overflow", "not supported"),
    ],
    "": [
        ("--task_name cola --do_train --root_output_dir o", "model_name_or_path"),
        ("--model_name_or_path m --do_train --root_output_dir o", "no data: give --task_name"),
        ("--model_name_or_path m --do_predict --test_file t --root_output_dir o", "or --train_file, whose labels"),
        ("--model_name_or_path m --task_name cola --root_output_dir o", "nothing to do"),
        ("--model_name_or_path m --train_file a.csv --do_train --do_eval --root_output_dir o", "--validation_file"),
        ("--model_name_or_path m --train_file a.csv --do_train --eval_strategy epoch --root_output_dir o", "evaluate"),
        ("--model_name_or_path m --train_file a.csv --do_predict --root_output_dir o", "--test_file"),
        ("--model_name_or_path m --task_name cola --do_train", "root_output_dir"),
        ("missing.yaml --do_train", "missing.yaml"),
    ],
}


@pytest.mark.parametrize("start, flags, words", [(start, *case) for start, cases in WRONG.items() for case in cases])
def test_what_is_wrong_or_missing_is_said_in_one_line(start, flags, words):
    with pytest.raises(UsageError) as error:
        parse(f"{start} {flags}")
    message = str(error.value)
    assert words in message and "\n" not in message and len(message) < 400


@pytest.mark.parametrize("content", ["- a\n- b", "lora_r: [1, 2]", "a: b: c"])
def test_a_malformed_argument_file_is_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        parse(f"{path} {BASE}")
    assert "run.yaml" in str(error.value) and "\n" not in str(error.value)


def test_an_argument_that_an_older_record_lacks_counts_as_its_default():
    new = parse(f"{BASE} --max_steps 3").record
    old = {name: value for name, value in new.items() if name not in ("value_lr_ratio", "lora_k")}
    assert changed_arguments(old, new) == []
    assert changed_arguments(old, new | {"value_lr_ratio": 2.0}) == ["value_lr_ratio"]
    assert changed_arguments({k: v for k, v in new.items() if k != "max_steps"}, new) == ["max_steps"]
    assert "task_name" in changed_arguments({}, new)
    assert changed_arguments({"head_first_epochs": 0}, {}) == []  # a flag of an older version


def test_one_process_uses_one_device_so_that_the_batch_is_the_one_asked_for():
    training = parse(f"{BASE} --per_device_train_batch_size 32").training
    training._n_gpu = 8  # what transformers finds on a machine with eight GPUs, without torchrun
    assert training.train_batch_size == 256
    one_device(training)
    assert training.n_gpu == 1 and training.train_batch_size == effective_batch_size(training) == 32


# ---- the batch and the schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes, flags, at_once, accumulated", [
    (4, "", 8, 1), (4, "--per_device_train_batch_size 2", 2, 4), (4, "--per_device_train_batch_size 16", 8, 1),
])  # fmt: skip
def test_the_total_batch_stays_however_many_processes_share_it(processes, flags, at_once, accumulated, monkeypatch):
    monkeypatch.setattr(RunArguments, "world_size", processes)
    training = parse(f"{BASE} --total_batch_size 32 {flags}").training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (at_once, accumulated)
    assert effective_batch_size(training) == 32


@pytest.mark.parametrize("processes, flags, words", [
    (3, "", "does not divide among 3 processes: start one of 1, 2, 4, 8, 16, 32 processes"),
    (2, "--per_device_train_batch_size 3", "does not divide the 16 rows of a process: give one of 1, 2, 4, 8, 16"),
])  # fmt: skip
def test_a_batch_that_cannot_be_shared_is_refused(processes, flags, words, monkeypatch):
    monkeypatch.setattr(RunArguments, "world_size", processes)
    with pytest.raises(UsageError, match=words):
        parse(f"{BASE} --total_batch_size 32 {flags}")


SCHEDULE = "--warmup_steps 200 --init_warmup 600 --final_warmup 1800 --mask_interval 10"


@pytest.mark.parametrize("flags, steps, expected", [
    (SCHEDULE, 100, (200, 600, 1800, 10)),  # without --schedule_steps they are taken literally
    (f"{SCHEDULE} --schedule_steps 4000", 1000, (50, 150, 450, 2)),
    (f"{SCHEDULE} --schedule_steps 4000", 100, (5, 15, 45, 1)),  # every step at least
    (f"{SCHEDULE} --schedule_steps 4000", 9000, (200, 600, 1800, 10)),  # a longer training stretches nothing
    ("--warmup_ratio=0.1 --schedule_steps 4000", 1000, (0.1, None, None, 2)),  # a share is one of any length
    ("--schedule_steps 4000", 0, (0, None, None, 10)),  # nothing is trained
])  # fmt: skip
def test_a_shorter_training_shrinks_the_schedule_in_proportion(flags, steps, expected):
    arguments = parse(f"{BASE} {flags}")
    fit_schedule(arguments.training, arguments.method, steps)
    method = arguments.method
    found = (arguments.training.warmup_steps, method.init_warmup, method.final_warmup, method.mask_interval)
    assert found == expected


@pytest.mark.parametrize("before, after, rate, rank", [
    ("--learning_rate 1e-3", "--method full", 1e-3, 8),  # without the switch the command line wins
    ("--learning_rate 1e-3 --method full --method_file_wins", "", 2e-5, 8),
    ("--learning_rate 1e-3 --method full --method_file_wins", "--learning_rate 3e-3", 3e-3, 8),
    ("--lora_r 2 --target_rank 1 --method_file_wins", "--method adalora_r8 --lora_r 10", 5e-5, 10),
])  # fmt: skip
def test_settings_of_a_script_give_way_to_the_methods_file(before, after, rate, rank):
    arguments = parse(f"{BASE} {before} {after}")
    assert (arguments.training.learning_rate, arguments.method.lora_r) == (rate, rank)


@pytest.mark.parametrize("written", ["{0}=True", "{0} False", "{0} --seed 1 {0}"])
def test_the_place_is_all_that_method_file_wins_says(written):
    with pytest.raises(UsageError, match="give --method_file_wins once, between two flags and without a value"):
        parse(f"{BASE} {written.format('--method_file_wins')}")


def test_the_last_warm_up_wins_and_one_that_is_ignored_is_named(caplog):
    assert parse(f"{BASE} --warmup_steps 5 --warmup_ratio 0.25").training.warmup_steps == 0.25
    assert not caplog.records
    parse(f"{BASE} --warmup_steps 5 --lr_scheduler_type constant")
    assert "constant ignores the warm-up" in caplog.text


def test_a_flag_may_replace_what_a_script_sets_in_another_way():
    arguments = parse(f"{BASE} --lora_r 4 --target_rank 3 --method_file_wins --target_total_rank 20")
    assert arguments.method.target_total_rank == 20
    with pytest.raises(UsageError, match="no meaning with --method lora"):
        parse(f"{BASE} --target_rank 3 --method_file_wins --method lora")


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_fits_a_screen_and_help_all_lists_what_is_not_refused(capsys):
    actions = build_parser()._actions
    spelled = {a.dest: {flag for flag in a.option_strings if "-" not in flag[2:]} for a in actions}
    refused = set().union(*(spelled[name] for name in REFUSED_FLAGS))
    usable = set().union(*spelled.values()) - refused - {"-h", "--help"}
    shown = {}
    for wanted in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as ended:
            parse_arguments([wanted])
        page = capsys.readouterr().out
        shown[wanted] = set(re.findall(r"(?<![\w-])--[a-z]\w+", page))
        assert ended.value.code == 0
        if wanted == "--help":
            assert len(page.splitlines()) <= 48 and max(map(len, page.splitlines())) <= 120
    assert shown["--help"] - {"--help_all", "--flag"} <= usable
    assert usable <= shown["--help_all"] and not refused & set(re.findall(r"^  (--\w+)", page, re.MULTILINE))


# ---- the packages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, package",
    [("run_glue", "accelerate"), ("predict", "pyarrow"), ("sweep", "torch"), ("compare", "torch"), ("report", "pandas"),
     ("launch", "torch")],
)  # fmt: skip
def test_help_without_an_installed_package_says_what_to_run(program, package):
    hide = f"""
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)
sys.modules[{package!r}] = None
sys.argv = [{program!r}, "--help"]
runpy.run_path("nlu/{program}.py", run_name="__main__")
"""
    result = run_python("-c", hide)
    assert result.returncode == 2
    assert result.stderr == f"error: the package {package} is not installed: run bash scripts/setup.sh first\n"
