"""One command for all programs: ``lora2-glue train …`` or ``python -m nlu train …``."""

from __future__ import annotations

import importlib
import sys

PROGRAMS = {
    "train": ("nlu.run_glue", "fine-tune on a GLUE task or on your own data"),
    "predict": ("nlu.predict", "predict new rows with a trained adapter or a merged model"),
    "compare": ("nlu.compare", "compare methods on one task: table and figure"),
    "sweep": ("nlu.sweep", "run every combination that an experiment file names"),
    "submit": ("nlu.submission", "gather test predictions into the zip for GLUE's server"),
    "report": ("nlu.report", "make tables and figures from the records of runs"),
    "export": ("loralib.export", "export an adapter to peft, merge it into its base, or import one from peft"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the named program with the arguments after its name; returns its exit code, 2 for an unknown name."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: lora2-glue PROGRAM [arguments]\n")
        for program, (_, purpose) in PROGRAMS.items():
            print(f"  {program:<9}{purpose}")
        print("\nlora2-glue PROGRAM --help explains the arguments of one program.")
        return 0
    if name not in PROGRAMS:
        print(f"error: unknown program {name!r}: choose from {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    return importlib.import_module(PROGRAMS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
