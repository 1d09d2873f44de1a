"""Convert an adapter to a peft adapter, or to a plain checkpoint with the adapter merged.

    python -m loralib.export ADAPTER --to peft OUT          (a loralib adapter, or peft's AdaLoRA or LoRA², to a LoRA)
    python -m loralib.export ADAPTER --to merged OUT --base MODEL

A merged weight is W + ΔW, rounded to the checkpoint's precision. In float32 the logits change by less than 1e-5. In
bfloat16 (--dtype bfloat16) a weight has 8 significant bits. docs/adapters.md lists measured differences.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from loralib.adapter import load_adapter
from loralib.adapter_folder import CARD_FILE, adapter_in, copy_tokenizer, has_tokenizer, read_adapter_config
from loralib.files import new_files, refuse_files
from loralib.interop.peft_format import export_peft
from loralib.interop.transformers_models import load_base_of, processor_of, quiet_transformers
from loralib.merging import merge_and_unload
from loralib.model_card import adapter_card


def export_merged(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
) -> None:
    """Merge an adapter into its base, and write a plain transformers checkpoint with its label names and model card.

    The tokenizer is the adapter's, or else the base's.

    Args:
        base: name or path of the base model. dtype: of the written weights; the merge itself is done in float32.

    Raises:
        ValueError: as :func:`loralib.load_adapter`; also if the base cannot be loaded or the folder has other files.
    """
    config = read_adapter_config(adapter)
    refuse_files(folder)  # before the slow load
    model = load_base_of(config, base)
    load_adapter(model, adapter, allow_other_base=allow_other_base)
    merge_and_unload(model)
    processor = None if has_tokenizer(adapter) else processor_of(config, base)
    with new_files(folder, "config.json") as new, quiet_transformers():
        model.to(dtype).save_pretrained(new)
        if processor is not None:
            processor.save_pretrained(new)
        copy_tokenizer(adapter, new)
        how_to_load = "The adapter is merged into its base: transformers loads this plain checkpoint by itself."
        (new / CARD_FILE).write_text(adapter_card(config, "transformers", how_to_load), encoding="utf-8")


# ---- command line ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loralib.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("adapter", help="folder of the adapter, or of a run that has it in adapter/")
    add("out", help="folder to write: a new one, or for peft that of an earlier peft adapter")
    add("--to", required=True, choices=("peft", "merged"), help="what to write")
    add("--base", default=None, help="name or path of the base model; --to peft only records it")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="with --to merged: dtype of the weights (float32)")
    add("--allow_other_base", action="store_true", help="with --to merged: accept a base with other weights")
    return parser


def _export(adapter: str, out: str, to: str, base: str | None, **options: Any) -> str:
    """Does what the command's arguments say, and returns the line to print. Raises ValueError for bad input."""
    folder = adapter_in(adapter)
    if options and to != "merged":
        raise ValueError(f"--{min(options)} has no meaning with --to {to}: leave it out")
    if to == "peft":
        ranks = export_peft(folder, out, base).values()
        return f"{out}: peft adapter, {len(ranks)} modules of rank {min(ranks)} to {max(ranks)}"
    if base is None:
        raise ValueError(f"--to {to} needs the base model: give --base NAME_OR_PATH")
    dtype = options.pop("dtype", "float32")
    export_merged(folder, out, base, dtype=getattr(torch, dtype), **options)
    return f"{out}: plain {dtype} checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 2, with one line on stderr, for bad input or a disk error."""
    options = vars(_parser().parse_args(argv))
    try:
        print(_export(**options))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
