"""torchrun with the exit code of the program: several processes end as one does.

    python nlu/launch.py --standalone --nproc_per_node 2 nlu/run_glue.py --flag value …

It takes torchrun's arguments. torchrun itself ends with a traceback and exit code 1 when it is told to stop, or when a
worker refuses its arguments; here the code is 128 + the signal's number, or that of the first worker that failed. It
kills workers that have not ended 30 seconds after a signal; here they have ten minutes to end their step and save it,
or as many seconds as TORCH_ELASTIC_SHUTDOWN_TIMEOUT says.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from nlu.errors import packages_missing, reason

if packages_missing():
    sys.exit(2)

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

_PATIENCE = 600  # seconds for a step and its checkpoint after a signal, before a worker is killed


def main(argv: list[str] | None = None) -> int:
    """Run torchrun; returns the exit code. The workers have said in one line why they ended."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_PATIENCE))
    logging.disable(logging.ERROR)  # torchrun reports at length what the workers have said
    try:
        torchrun(argv)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # a worker that a signal killed has minus its number
    except DistError as error:  # a port in use, a machine that is not there
        print(f"error: {reason(error, 300)}: check --master_addr and --master_port", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
