"""Fixtures of a whole run: an encoder, a GLUE folder, flags."""

import pytest

from tests.nlu.tiny import make_encoder, make_rows, write_rows


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Folder of a tiny BERT."""
    return make_encoder(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_glue(tmp_path_factory):
    """GLUE folder with tiny cola (one sentence), mrpc (pairs), stsb (regression) and mnli (two validation sets)."""
    root = tmp_path_factory.mktemp("glue")
    for task, fields, regression, labels in (
        ("cola", ("sentence",), False, 2),
        ("mrpc", ("sentence1", "sentence2"), False, 2),
        ("stsb", ("sentence1", "sentence2"), True, 1),
        ("mnli", ("premise", "hypothesis"), False, 3),
    ):
        names = {"train": 50, "validation": 20, "test": 12}
        if task == "mnli":
            names = {"train": 50, "validation_matched": 20, "validation_mismatched": 14}
        for seed, (split, count) in enumerate(names.items()):
            write_rows(root / task / f"{split}.jsonl", make_rows(fields, regression, count, seed, labels))
    return root


@pytest.fixture
def base_flags(encoder, tiny_glue, tmp_path):
    """Flags of a run of a few steps on the tiny task; append what a test is about."""
    return [
        "--model_name_or_path", str(encoder), "--task_name", "cola", "--glue_dir", str(tiny_glue),
        "--root_output_dir", str(tmp_path / "run"), "--do_train", "--do_eval", "--max_steps", "6",
        "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--lora_r", "4", "--lora_alpha", "32",
        "--eval_strategy", "steps", "--eval_steps", "3", "--save_strategy", "steps", "--save_steps", "2",
        "--logging_steps", "1", "--disable_tqdm", "True", "--seed", "3",
    ]  # fmt: skip
