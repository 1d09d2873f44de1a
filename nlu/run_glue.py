"""Fine-tune an encoder on a GLUE task, or on your own data, with LoRA² or another method.

    python nlu/run_glue.py --model_name_or_path microsoft/deberta-v3-base --task_name cola --method lora2 \\
        --learning_rate 1e-3 --do_train --do_eval --root_output_dir output/cola

``--help`` lists every argument. The run writes results.json, adapter/, model/ and log/ to root_output_dir (and, if it
prunes, rank_pattern.json); the same command continues an interrupted run from its last checkpoint.
``nlu/fine_tuning.py`` has the steps of a run; this file turns errors and signals into exit codes.
"""

from __future__ import annotations

import logging
import sys
import time

from nlu.command_line import parse_arguments, resolved_lines
from nlu.errors import exit_code
from nlu.runs.processes import end_processes, is_first, start_processes
from nlu.runs.signals import Interrupted, stopped_by_signals
from nlu.startup import quick_imports


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit code, with one line on stderr unless it is 0.

    2: bad arguments or input. 1: a run that cannot continue. 128 + the signal's number: stopped by a signal; the same
    command continues the run.
    """
    if not is_first():  # the first process warns for all
        logging.getLogger("nlu").setLevel(logging.ERROR)
    arguments = None
    with stopped_by_signals():
        try:
            arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
            if arguments.dry_run:
                print("\n".join(resolved_lines(arguments) if is_first() else ()))
                return 0
            # Imports that take seconds come only now, so that bad arguments are reported at once.
            with quick_imports():
                start_processes(arguments.use_cpu)  # from here on an error in one process ends the others' wait for it
                from nlu.data.splits import load_data

                data = load_data(arguments)
                from nlu.fine_tuning import run

            run(arguments, data)
        except BaseException as error:
            # Every process has the same command and stops; only the first reports it.
            if not is_first() and (arguments is None or isinstance(error, Interrupted)):
                return 128 + error.signum if isinstance(error, Interrupted) else 2
            return exit_code(error)
    return 0


if __name__ == "__main__":
    code = main()
    if code == 0:  # after an error the other processes may never get here
        end_processes()
    elif code == 2 and not is_first():
        time.sleep(5)  # torchrun ends all processes when one has ended, and the first is to say what is wrong
    sys.exit(code)
