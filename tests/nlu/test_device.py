"""The steps on a pretended device, in a process of their own: the device cannot be taken away again."""

import pytest

from tests.nlu.tiny import run_python


@pytest.mark.slow
def test_every_step_stays_on_the_device():
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/nlu/device_steps.py")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout
