"""Fine-tuning encoders on GLUE. Programs: run_glue.py, predict.py, compare.py, sweep.py, report.py, submission.py."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent  # the checkout, with scripts/ and results/; an installed package has none
# configs/ is inside an installed package, and beside nlu/ in a checkout.
CONFIGS = next(path for path in (_PACKAGE / "configs", ROOT / "configs") if path.is_dir())
METHOD_FOLDER, TASK_FOLDER = CONFIGS / "methods", CONFIGS / "tasks"
