"""The first losses of every method equal those in tests/nlu/golden_losses.json, which change only on purpose."""

import json

import pytest
import torch

from benchmarks.losses import losses, machine, method_flags
from nlu import ROOT

GOLDEN = json.loads((ROOT / "tests/nlu/golden_losses.json").read_text())


@pytest.mark.parametrize("name", method_flags())
def test_losses_are_the_golden_ones(name):
    torch.set_num_threads(1)  # the last bits depend on the number of threads
    tolerance = 0.0 if GOLDEN["machine"] == machine() else 1e-5
    assert losses(method_flags()[name]) == pytest.approx(GOLDEN["losses"][name], rel=0, abs=tolerance), GOLDEN["renew"]
