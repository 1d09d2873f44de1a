"""Make tables and figures of runs that have ended, each under the question that it answers.

To follow a run in TensorBoard, Weights & Biases or trackio, give run_glue.py --report_to instead.

    python nlu/report.py                                    # output/measured → output/README.md, tables/, figures/
    python nlu/report.py --measured_dir results/measured    # the repository's own records → results/

It reads MEASURED_DIR/*.jsonl, which runs and sweeps write, and configs/experiments/claims.yaml. The same lines and
versions give the same files, byte for byte. All numbers, to six digits, go to tables/*.csv.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nlu import CONFIGS
from nlu.errors import OneLineParser, program


@program
def main(words: Sequence[str]) -> None:
    """Write the report."""
    args = build_parser().parse_args(words)
    from nlu.experiments.page import write_report  # takes seconds, so wrong flags are refused first

    write_report(args.measured_dir, args.output_dir or args.measured_dir.absolute().parent, args.claims)


def build_parser() -> argparse.ArgumentParser:
    """The command line of the report."""
    parser = OneLineParser(prog="report.py", description=__doc__)
    add = parser.add_argument
    add("--measured_dir", type=Path, default=Path("output/measured"), help="the runs' lines (output/measured)")
    add("--output_dir", type=Path, help="where the report goes (the folder that holds MEASURED_DIR)")
    add("--claims", type=Path, default=CONFIGS / "experiments/claims.yaml",
        help="questions and claims (configs/experiments/claims.yaml)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
