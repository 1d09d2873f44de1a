"""Convert an adapter: to a peft adapter, to a plain checkpoint with the adapter merged, or from a peft adapter.

    python -m loralib.export ADAPTER --to peft OUT          (a loralib adapter, or peft's AdaLoRA or LoRA², to a LoRA)
    python -m loralib.export ADAPTER --to merged OUT --base MODEL
    python -m loralib.export PEFT_ADAPTER --to loralib OUT --base MODEL

A merged weight is W + ΔW, rounded to the checkpoint's precision. In float32 the logits change by less than 1e-5. In
bfloat16 (--dtype bfloat16) a weight has 8 significant bits. docs/adapters.md lists measured differences.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from loralib.adapter import load_adapter, name_on_hub, save_adapter
from loralib.adapter_folder import CARD_FILE, copy_tokenizer, has_tokenizer, read_adapter_config
from loralib.files import new_files, refuse_files
from loralib.interop.peft_format import TASK_TYPES, export_peft, import_peft, read_pairs, refuse_other_format
from loralib.interop.transformers_models import (
    load_base,
    load_base_of,
    processor_of,
    quiet_transformers,
    revision_of,
)
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

    The tokenizer is the adapter's, or else the base's. ``config.json`` gets the card's text_fields and max_seq_length.

    Args:
        base: name or path of the base model. dtype: of the written weights; the merge itself is done in float32.

    Raises:
        ValueError: as :func:`loralib.load_adapter`; also if the base cannot be loaded or the folder has other files.
    """
    config = read_adapter_config(adapter)
    if not dist.is_initialized():  # checked before the slow load; in a group another process may have written already
        refuse_files(folder)
    model = load_base_of(config, base)
    load_adapter(model, adapter, allow_other_base=allow_other_base)
    merge_and_unload(model)
    processor = None if has_tokenizer(adapter) else processor_of(config, base)
    for name in ("text_fields", "max_seq_length"):  # what its inputs were in training
        if name in config.card:
            setattr(model.config, name, config.card[name])
    # In a process group transformers saves on rank 0 only, so that another rank's checkpoint would lack the weights.
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
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
    add("adapter", help="folder of the adapter")
    add("out", help="folder to write: a new one, or (peft, loralib) that of an earlier adapter of this format")
    add("--to", required=True, choices=("peft", "merged", "loralib"), help="what to write")
    add("--base", default=None, help="name or path of the base model; --to peft only records it")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="with --to merged: dtype of the weights (float32)")
    add("--allow_other_base", action="store_true", help="with --to merged: accept a base with other weights")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError with one line for bad input."""
    options = vars(_parser().parse_args(argv))
    adapter, out, to, base = (options.pop(name) for name in ("adapter", "out", "to", "base"))
    if options and to != "merged":
        raise ValueError(f"--{min(options)} has no meaning with --to {to}: leave it out")
    if to == "peft":
        ranks = export_peft(adapter, out, base)
        least, most = min(ranks.values()), max(ranks.values())
        print(f"{out}: peft adapter, {len(ranks)} modules of rank {least} to {most}")
    elif base is None:
        raise ValueError(f"--to {to} needs the base model: give --base NAME_OR_PATH")
    elif to == "merged":
        dtype = options.pop("dtype", "float32")
        export_merged(adapter, out, base, dtype=getattr(torch, dtype), **options)
        print(f"{out}: plain {dtype} checkpoint")
    else:
        _import(adapter, out, base)


def _import(adapter: str, out: str, base: str) -> None:
    refuse_other_format(out, peft=False)
    values, _, head = read_pairs(adapter)
    name = name_on_hub(values.get("base_model_name_or_path"))
    revision = revision_of(name, values.get("revision"), base)
    model = load_base(base, _class_for(values.get("task_type"), base, revision), **_label_count(head), **revision)
    import_peft(model, adapter)
    save_adapter(
        model, out, base_model=name, base_revision=revision.get("revision"),
        save_tokenizer=lambda new: copy_tokenizer(adapter, new),
    )  # fmt: skip
    print(f"{out}: lora adapter")


def _class_for(task_type: str | None, base: str, revision: dict[str, str]) -> str:
    """The model class that belongs to a peft adapter's task type."""
    import transformers

    ending = next((ending for ending, name in TASK_TYPES.items() if name == task_type), None)
    if ending is not None:
        return f"AutoModelFor{ending}"
    if task_type == "FEATURE_EXTRACTION":  # the encoder of a checkpoint that may have a head
        return "AutoModel"
    config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, **revision)
    return (config.architectures or ["AutoModel"])[0]


def _label_count(head: dict[str, Tensor]) -> dict[str, int]:
    """``num_labels``: the rows of the classifier's last matrix, if the peft adapter has a classifier."""
    matrices = [n for n in sorted(head) if n.endswith(".weight") and {"classifier", "score"} & set(n.split("."))]
    return {"num_labels": head[matrices[-1]].shape[0]} if matrices else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 2, with one line on stderr, for bad input or a disk error; 130 after
    Ctrl-C. argparse itself reports unknown arguments."""
    try:
        run(argv)
        return 0
    except KeyboardInterrupt:
        print("stopped: no file is left half-written", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:  # loralib is installed without the extra "glue"
        reason = f"this needs the package {error.name}: in a clone, pip install '.[glue]'"
    except (ValueError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
    print(f"error: {reason}", file=sys.stderr)
    return 2
