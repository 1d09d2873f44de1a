"""Fine-tuning encoders on GLUE. Programs: run_glue.py, predict.py, compare.py, sweep.py, report.py, submission.py."""

import os
from pathlib import Path

# How long idle threads of GNU OpenMP spin before they sleep, unless the user has set it. By default they spin for
# milliseconds, which multiplies the time of a step if other processes need the processor (docs/speed.md has the
# figures). torch reads this when it is first imported.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "20000"

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent  # the checkout, with scripts/ and results/; an installed package has none
# configs/ is inside an installed package, and beside nlu/ in a checkout.
CONFIGS = next(path for path in (_PACKAGE / "configs", ROOT / "configs") if path.is_dir())
METHOD_FOLDER, TASK_FOLDER = CONFIGS / "methods", CONFIGS / "tasks"
