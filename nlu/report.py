"""Make a page of your measured runs: each experiment has its answer, a table and a figure.

    python nlu/report.py                                       # output/measured → output/report.md, tables/, figures/
    python nlu/report.py --measured_dir DIR --output_dir DIR

It reads MEASURED_DIR/*.jsonl, which runs and sweeps write, one file an experiment. The same lines and versions give the
same files, byte for byte. All numbers, to six digits, go to tables/*.csv.

To follow a run while it trains (TensorBoard, wandb, trackio), give nlu/run_glue.py --report_to.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nlu.errors import OneLineParser, program


@program
def main(words: Sequence[str]) -> None:
    """Write the report."""
    args = build_parser().parse_args(words)
    from nlu.experiments.page import write_report  # takes seconds, so wrong flags are refused first

    write_report(args.measured_dir, args.output_dir or args.measured_dir.absolute().parent)


def build_parser() -> argparse.ArgumentParser:
    """The command line of the report."""
    parser = OneLineParser(prog="report.py", description=__doc__)
    add = parser.add_argument
    add("--measured_dir", type=Path, default=Path("output/measured"), help="the runs' lines (output/measured)")
    add("--output_dir", type=Path, help="where the report goes (the folder that holds MEASURED_DIR)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
