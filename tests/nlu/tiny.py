"""Tiny encoders and tiny tasks on disk, so that a whole run takes a second or two."""

import json
import os
import random
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, BertTokenizerFast

REPOSITORY = Path(__file__).resolve().parents[2]
GLUE = Path(os.environ.get("GLUE_TEST_DIR", REPOSITORY.parent / "shared" / "data" / "glue"))

WORDS = "the a cat dog sat ran on under mat tree big small red old it was not very good bad".split()  # noqa: SIM905
TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip
SHAPES = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "max_position_embeddings": 66},
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": "p2c|c2p", "type_vocab_size": 0, "max_relative_positions": -1, "position_biased_input": False,
    },
}  # fmt: skip


def make_encoder(folder: Path, model_type: str = "bert") -> Path:
    """A random encoder of that shape with a word-level tokenizer, saved as from_pretrained wants it."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=60)
    if model_type != "bert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY | {"vocab_size": len(vocabulary)} | SHAPES[model_type])
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tiny_bert() -> torch.nn.Module:
    """A random BERT classifier of two layers, in memory."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", **TINY | {"vocab_size": 30})
    return AutoModelForSequenceClassification.from_config(config)
