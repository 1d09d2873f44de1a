"""Write the study's page from the committed records: results/README.md with its tables and figures.

    python results/study/make.py                    # results/measured → results/
    python results/study/make.py --output_dir DIR   # the same, elsewhere

The same lines and versions give the same files, byte for byte (figures: with the same matplotlib).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nlu import ROOT
from nlu.errors import OneLineParser, program
from results.study.page import write_study


@program
def main(words: Sequence[str]) -> None:
    """Write the page."""
    args = build_parser().parse_args(words)
    write_study(args.measured_dir, args.output_dir, args.questions)


def build_parser() -> argparse.ArgumentParser:
    """The command line of the study."""
    parser = OneLineParser(prog="make.py", description=__doc__)
    add = parser.add_argument
    add("--measured_dir", type=Path, default=ROOT / "results/measured", help="the runs' lines (results/measured)")
    add("--output_dir", type=Path, default=ROOT / "results", help="where the page goes (results)")
    add(
        "--questions",
        type=Path,
        default=Path(__file__).with_name("questions.yaml"),
        help="questions and claims (results/study/questions.yaml)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
