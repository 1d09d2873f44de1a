"""The steps on a pretended device, in a process of their own: the device cannot be taken away again."""

import subprocess
import sys
from pathlib import Path

STEPS = Path(__file__).with_name("device_steps.py")


def test_every_step_stays_on_the_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(STEPS)]
    done = subprocess.run(command, cwd=STEPS.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout
