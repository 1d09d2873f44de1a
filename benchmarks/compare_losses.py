"""Compare the first losses of every method between two commits of this repository.

    python benchmarks/compare_losses.py main~3 main                     # every method
    python benchmarks/compare_losses.py main~3 main --methods lora,lora2

Each commit is checked out into a temporary folder, and trained there by this interpreter with this file's
benchmarks/losses.py. Exit code 0: all losses are equal; 1: some differ, which the lines printed name; 2: bad arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nlu.errors import RunError, UsageError, exit_code

ROOT = Path(__file__).resolve().parents[1]


def differences(one: dict[str, list[float]], other: dict[str, list[float]], tolerance: float = 0.0) -> list[str]:
    """A line for each method whose losses differ by more than ``tolerance``, or that one side lacks."""
    lines = [f"{name}: only in one of the two" for name in sorted(one.keys() ^ other.keys())]
    for name in one.keys() & other.keys():
        gaps = [abs(a - b) for a, b in zip(one[name], other[name], strict=True)]
        first = next((step for step, gap in enumerate(gaps, 1) if not gap <= tolerance), None)
        if first is not None:
            lines.append(f"{name}: from step {first} on, by at most {max(gaps):.2e}")
    return sorted(lines)


def measure(commit: str, methods: list[str]) -> dict[str, list[float]]:
    """The losses of a commit.

    Raises:
        UsageError: it has no method of such a name. RunError: its code cannot train the problem.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), commit], check=True, capture_output=True)
        try:
            command = [sys.executable, str(ROOT / "benchmarks/losses.py"), *methods]
            environment = os.environ | {"PYTHONPATH": str(tree)}
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True, capture_output=True)
    if done.returncode:
        kind = UsageError if done.returncode == 2 else RunError
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise kind(f"{commit}: its losses cannot be measured ({said.splitlines()[-1]})")
    return json.loads(done.stdout)["losses"]


def _resolve(commit: str) -> str:
    git = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(git, capture_output=True, text=True)
    if found.returncode:
        raise UsageError(f"{commit} is no commit of this repository: see git log")
    return found.stdout.strip()


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--methods", default="", help="names, separated by commas (all)")
    arguments = parser.parse_args(argv)
    try:
        commits = [_resolve(commit) for commit in arguments.commits]
        one, other = (measure(commit, list(filter(None, arguments.methods.split(",")))) for commit in commits)
    except (UsageError, RunError) as error:
        return exit_code(error)
    lines = differences(one, other)
    print("\n".join(lines) or f"{len(one)} methods: every loss is equal")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
