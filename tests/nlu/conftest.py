"""Fixtures of a whole run: an encoder, a GLUE folder, flags."""

import pytest

from tests.nlu.tiny import make_encoder, make_rows, tiny_run, write_rows


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
    return tiny_run(encoder, tiny_glue, tmp_path / "run")
