"""A stand-in for nlu/run_glue.py in the sweep's tests: the same record, no training, behaviour by its flags.

`--weight_decay` says how it behaves: 0 finishes, 1 fails with a record, 2 exits with code 2, its last line the error, 3
dies by SIGKILL, 4 runs until SIGTERM, then leaves an interrupted record and exits 143, but finishes when started again,
5 fails after its record has finished, 6 leaves a record that is cut off.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nlu.runs.digests import content_digests


def main(argv: list[str]) -> int:
    args = {
        word[2:].partition("=")[0]: _value(word.partition("=")[2])
        for word in argv
        if word.startswith("--") and "=" in word
    }
    args["overwrite_output_dir"] = "--overwrite_output_dir" in argv
    folder = Path(argv[argv.index("--root_output_dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    resumed = path.exists() and not args["overwrite_output_dir"]
    # Highest at 2e-3, so that a selection has something to find.
    score = 0.7 - abs(math.log(args.get("learning_rate", 1e-3) / 2e-3)) / 100
    record = {
        "format_version": 1,
        "task": args.get("task_name", "custom"),
        "method": args["method"],
        "seed": args["seed"],
        "digests": content_digests(args),
        "metric": "accuracy",
        "last": score,
        "steps": 10,
        "evaluations": [{"step": 10, "loss": 0.5, "accuracy": score}],
        "adapter_params": 1000,
        "resumes": int(resumed),
        "arguments": args,
    }

    def write(status: str, error: str | None = None) -> None:
        path.write_text(json.dumps({**record, "status": status, "error": error}))

    behaviour = int(args.get("weight_decay", 0))
    if behaviour == 2:
        print("a warning", file=sys.stderr)
        print("error: target_rank 9 is larger than lora_r 8", file=sys.stderr)
        return 2
    if behaviour == 1:
        write("failed", "the loss is nan at step 3")
        return 1
    write("running")
    if behaviour == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == 4 and not resumed:
        signal.signal(signal.SIGTERM, lambda *_: (write("interrupted"), sys.exit(143)))
        (folder / "started").touch()
        time.sleep(600)  # a signal ends it
    (folder / "rank_pattern.json").write_text(json.dumps({"encoder.query": [True, False]}))
    write("finished")
    if behaviour == 6:
        os.truncate(path, 100)
    if behaviour == 5:
        print("error: the adapter cannot be uploaded", file=sys.stderr)
    return int(behaviour == 5)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
