"""Architectures besides BERT, RoBERTa and DeBERTaV3: what they cannot do is refused, and the rest works."""

import json
import shutil

import pytest

from nlu.arguments import parse_arguments
from nlu.model import load_config, without_weights
from nlu.run_glue import main
from nlu.tasks import TASKS
from tests.nlu.tiny import SHAPES, changed, make_encoder, tiny_run


@pytest.mark.parametrize("kind, flags, says", [
    ("mpnet", ["--cls_dropout", "0.3"], "mpnet has no dropout of its own in the head"),
    ("llama", ["--method", "bitfit"], "has no biases to train"),
])  # fmt: skip
def test_what_an_architecture_cannot_do_is_refused(kind, flags, says, tiny_glue, tmp_path, monkeypatch, capsys):
    """Before its weights are read: there are none."""
    monkeypatch.setitem(SHAPES, kind, {"pad_token_id": 0})
    folder = make_encoder(tmp_path / "encoder", kind)
    (folder / "model.safetensors").unlink()
    flags = [*tiny_run(folder, tiny_glue, tmp_path / "run"), *flags]
    if "--method" not in flags:
        flags += ["--method", "lora", "--lora_module", ".*layer.*"]
    flags = changed(flags, lora_r=None, lora_alpha=None) if "lora" not in flags else flags
    assert main(flags) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_dropout_of_albert_s_head_has_another_name(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "albert", {"embedding_size": 8})
    folder = make_encoder(tmp_path / "encoder", "albert")
    arguments = parse_arguments([*tiny_run(folder, tmp_path, tmp_path / "run"), "--cls_dropout", "0.37"])
    model = without_weights(arguments, load_config(arguments, TASKS["cola"])[0])
    assert model.dropout.p == 0.37


def test_a_base_that_returns_tuples_trains_all_the_same(encoder, tiny_glue, tmp_path):
    base = shutil.copytree(encoder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"return_dict": False, "chunk_size_feed_forward": 4}))
    run = tiny_run(base, tiny_glue, tmp_path / "run")
    assert main([*run, "--pad_to_max_length", "True", "--max_seq_length", "32"]) == 0
