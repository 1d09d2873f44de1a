"""Architectures besides BERT, RoBERTa and DeBERTaV3."""

import json
import shutil

from nlu.arguments import parse_arguments
from nlu.model import load_config, without_weights
from nlu.run_glue import main
from nlu.tasks import TASKS
from tests.nlu.tiny import SHAPES, make_encoder, tiny_run


def test_a_dropout_that_a_head_lacks_is_refused(tiny_glue, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "mpnet", {"pad_token_id": 0})
    folder = make_encoder(tmp_path / "encoder", "mpnet")
    assert main([*tiny_run(folder, tiny_glue, tmp_path / "run"), "--method", "lora", "--cls_dropout", "0.3"]) == 2
    assert "mpnet has no dropout of its own in the head" in capsys.readouterr().err


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
