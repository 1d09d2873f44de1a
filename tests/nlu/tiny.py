"""Tiny encoders and tiny tasks on disk, so that a whole run takes a second or two."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModel, BertTokenizerFast

from nlu import ROOT
from nlu.command_line import method_file

GLUE = Path(os.environ.get("GLUE_TEST_DIR", ROOT.parent / "shared" / "data" / "glue"))

WORDS = "the a cat dog sat ran on under mat tree big small red old it was not very good bad".split()  # noqa: SIM905
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
}  # fmt: skip
DEBERTA = {
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": "p2c|c2p", "type_vocab_size": 0, "max_relative_positions": -1, "position_biased_input": False,
}  # fmt: skip
DEBERTA_BASE = DEBERTA | {
    "vocab_size": 128100, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072,
}  # fmt: skip
SHAPES = {
    "bert": {"max_position_embeddings": 64},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 66},
    "deberta-v2": DEBERTA | {"position_buckets": 8, "max_position_embeddings": 64},
}


def make_encoder(folder: Path, model_type: str = "bert") -> Path:
    """Save a random encoder with a word-level tokenizer for from_pretrained; returns ``folder``."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=60)
    if model_type != "bert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES | {"vocab_size": len(vocabulary)} | SHAPES[model_type])
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def make_rows(fields: tuple[str, ...], regression: bool, count: int, seed: int, labels: int = 2) -> list[dict]:
    """Rows whose label depends on a word, so that they can be learned."""
    source = random.Random(seed)
    rows = []
    for i in range(count):
        row = {field: " ".join(source.choices(WORDS, k=source.randint(2, 9))) for field in fields}
        good = sum(text.split().count("good") + text.split().count("cat") for text in row.values())
        row["label"] = min(5.0, 1.25 * good) if regression else min(labels - 1, good)
        rows.append(row | {"idx": i})
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows in the format that the suffix of the path names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def tiny_run(encoder: Path, glue: Path, folder: Path) -> list[str]:
    """Flags of a run of a few steps on tiny CoLA; a test appends the flags that it is about."""
    return [
        "--model_name_or_path", str(encoder), "--task_name", "cola", "--glue_dir", str(glue),
        "--root_output_dir", str(folder), "--do_train", "--do_eval", "--max_steps", "6",
        "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--lora_r", "4", "--lora_alpha", "32",
        "--eval_strategy", "steps", "--eval_steps", "3", "--save_strategy", "steps", "--save_steps", "2",
        "--logging_steps", "1", "--seed", "3",
    ]  # fmt: skip


def changed(flags: list[str], **values: object) -> list[str]:
    """The flags with other values; a flag whose value is None is removed."""
    flags = list(flags)
    for name, value in values.items():
        at = flags.index(f"--{name}")
        flags[at : at + 2] = [] if value is None else [f"--{name}", str(value)]
    return flags


def read(flags: list[str], name: str = "results.json") -> dict:
    """A JSON file in the folder of the run with those flags; by default its record."""
    return json.loads((Path(flags[flags.index("--root_output_dir") + 1]) / name).read_text())


def quick_peft_adalora(folder: Path) -> Path:
    """A configuration of peft's AdaLoRA that allocates in a few steps."""
    values = json.loads(method_file("peft_adalora")[1]["peft_config"])
    (folder / "adalora.json").write_text(json.dumps(values | {"tinit": 1, "tfinal": 2, "deltaT": 1}))
    return folder / "adalora.json"


PATIENCE = 600  # seconds; only a hang takes this long, however loaded the machine is
OFFLINE = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_python(*words: object, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Run Python in a new process in ``folder``; the result has its output."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, env=OFFLINE, capture_output=True, text=True, timeout=PATIENCE)


def wait_until(met: Callable[[], bool]) -> None:
    """Wait for another process until ``met()`` is true."""
    end = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def error_line(capsys):
    """The only error line on stderr, on which there must be no traceback."""
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    (line,) = [line for line in captured.splitlines() if line.startswith("error: ")]
    return line
