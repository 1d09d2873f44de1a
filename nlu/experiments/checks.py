"""What an experiment may name: arguments without this machine's paths, and folders that its runs can have."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nlu.errors import UsageError

# Of these only the last part of a path is compared and recorded: records name no folder of this machine.
PATH_ARGUMENTS = ("model_name_or_path", "lora_path", "train_file", "validation_file", "test_file", "peft_config")
LONGEST_NAME = 200  # most file systems allow 255 bytes, and a log's suffix or a temporary file's prefix is added
SET_BY_THE_SWEEP = ("root_output_dir", "output_dir", "overwrite_output_dir")


def place_free(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, with only the last part of every path."""
    return {
        key: Path(value).name if key in PATH_ARGUMENTS and isinstance(value, str) else value
        for key, value in arguments.items()
    }


def check_folders(folders: Iterable[str]) -> None:
    """Refuse folders that two runs would share or that cannot be made.

    Raises:
        UsageError: one line.
    """
    seen: set[str] = set()
    for folder in folders:
        name = folder.rpartition("/")[2]
        if name.startswith("."):
            raise UsageError(f"a run's folder would be {folder}: give its axes labels that begin with no dot")
        if len(name) > LONGEST_NAME:
            raise UsageError(
                f"a run's folder would be {name[:40]}…, {len(name)} characters long: give its axes shorter labels, "
                f"{LONGEST_NAME} characters in all"
            )
        if folder.lower() in seen:  # some file systems do not tell upper from lower case
            raise UsageError(
                f"two runs would share the folder {folder}; give their axes labels that differ in more than case, in "
                "A-Z, 0-9 and . + = , - (other characters become _, and of a path the last part stays)"
            )
        seen.add(folder.lower())
