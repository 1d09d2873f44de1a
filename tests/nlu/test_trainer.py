"""What the trainer takes from transformers' private methods, and the versions in which they are as expected."""

import inspect
from types import SimpleNamespace

import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import Trainer

from loralib.recipes.trainer import LowRankTrainerMixin
from nlu.runs.checkpoints import WholeCheckpoints
from nlu.trainer import GlueTrainer, StepClock
from tests.nlu.tiny import REPOSITORY

# The oldest and the newest transformers with which these tests, those of run_glue.py and those of nlu/fast have passed;
# in between 5.19 and 5.20 were tried. Along with 5.12 pip takes older tokenizers and huggingface_hub.
TRIED = ("5.12.0", "5.24.0")
KINDS = (LowRankTrainerMixin, WholeCheckpoints, GlueTrainer)
OVERRIDDEN = {
    "_get_output_dir": "trial",
    "_get_train_sampler": "train_dataset",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_maybe_log_save_evaluate": "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_optimizer_and_scheduler": "output_dir",
}


def test_the_trainers_private_methods_are_those_that_were_tried():
    installed, (oldest, newest) = Version(transformers.__version__), map(Version, TRIED)
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    allowed = next(Requirement(line) for line in lines if line.startswith("transformers"))
    assert oldest in allowed.specifier and Version(f"{oldest.major}.{oldest.minor - 1}") not in allowed.specifier
    assert oldest <= installed < Version(f"{newest.major}.{newest.minor + 1}"), "try this version and name it in TRIED"
    own = {n for kind in KINDS for n in vars(kind) if not n.startswith("__")}
    assert {n for n in own if n.startswith("_") and hasattr(Trainer, n)} == set(OVERRIDDEN)
    for name, parameters in OVERRIDDEN.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == ["self", *parameters.split()]
        overrides = [vars(kind)[name] for kind in KINDS if name in vars(kind)]
        assert all(method.__doc__.startswith("Overridden ") for method in overrides)


def test_the_times_of_the_steps_add_up_without_what_lies_between(monkeypatch):
    clock = iter([10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr("nlu.trainer.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer = SimpleNamespace(train_seconds=5.0)  # of an earlier part of the run
    progress = StepClock(trainer)
    for _ in range(2):
        progress.on_step_begin(None, None, None)
        progress.on_step_end(None, None, None)
    assert trainer.train_seconds == 5 + 1 + 2
