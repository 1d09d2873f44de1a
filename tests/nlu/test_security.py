"""What SECURITY.md promises: no code and no pickle from data, adapters, models or checkpoints is ever run."""

import ast
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from nlu import ROOT
from nlu.run_glue import main
from tests.nlu.killed_runs import run_broken_off

FOLDERS = ("loralib", "nlu", "scripts", "benchmarks", "examples")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def breaches(source: str) -> list[str]:
    """Calls that load a pickle or a model's own code, which no rule of ruff forbids."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        loads = re.search(r"\bAuto\w+\.from_(pretrained|config)$", name) and None not in options
        if name == "torch.load" and options.get("weights_only") != "True":
            found.append(ast.unparse(call))
        if options.get("trust_remote_code", "None" if loads else "False") != "False":
            found.append(ast.unparse(call))
    return found


def test_no_source_file_loads_a_pickle_or_code():
    assert [breach for path in SOURCES for breach in breaches(path.read_text(encoding="utf-8"))] == []
    for line in (
        "torch.load(x)", "torch.load(x, weights_only=False)", "AutoModel.from_pretrained(x)",
        "load(x, trust_remote_code=y)", "transformers.AutoModel.from_config(x, trust_remote_code=True)",
    ):  # fmt: skip
        assert breaches(line), line


# ---- code ------------------------------------------------------------------------------------------------------------


def test_model_with_code_of_its_own_is_refused_without_asking(encoder, base_flags, tmp_path, monkeypatch):
    trap = tmp_path / "trapped"  # written if untrusted code ever runs
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run the code"))
    folder = shutil.copytree(encoder, tmp_path / "model")
    (folder / "code.py").write_text(f"open({str(trap)!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForSequenceClassification"), "code.C")
    (folder / "config.json").write_text(json.dumps(config))
    assert main([*base_flags, "--model_name_or_path", str(folder)]) == 2 and not trap.exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low_rank.pt", "optimizer.pt"])
def test_a_checkpoint_with_a_pickle_is_refused(base_flags, tmp_path, capsys, name):
    trap = tmp_path / "trapped"  # written if untrusted code ever runs
    run_broken_off(base_flags, 4)
    for checkpoint in (tmp_path / "run/model").glob("checkpoint-*"):
        torch.save({"x": Bomb(trap)}, checkpoint / name)
    assert main(base_flags) == 2
    assert not trap.exists()
    pickle.loads(pickle.dumps(Bomb(trap)))
    assert trap.exists()  # so the trap works
    assert "checkpoint" in capsys.readouterr().err
