"""Starts torchrun so that it ends with the run's last line and exit code, not with a traceback.

python scripts/launch.py --standalone --nproc_per_node 4 nlu/run_glue.py …
"""

import logging
import sys

from torch.distributed import DistNetworkError, run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(words: list[str]) -> int:
    """Run torchrun; returns 128 + a signal's number, or the exit code of the process that failed first.

    2 if the processes cannot meet.
    """
    logging.disable(logging.ERROR)  # torchrun's account of a failure; its processes are not affected
    try:
        run.main(words)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # negative: killed by a signal
    except DistNetworkError as error:  # a port in use, or another machine that does not answer
        print(f"error: {str(error).splitlines()[0]}: check MASTER_ADDR and MASTER_PORT", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
