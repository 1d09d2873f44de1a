"""Adapters for other tools: as a peft adapter, merged into a plain checkpoint, or from a peft adapter.

    python -m loralib.export ADAPTER --to peft OUT          (ours, or an AdaLoRA or LoRA² of peft: a LoRA)
    python -m loralib.export ADAPTER --to merged OUT --base MODEL
    python -m loralib.export PEFT_ADAPTER --to loralib OUT --base MODEL [--kind lora2 --r 8 --widths 8]

A merged weight is W + ΔW, rounded to the checkpoint's precision. In float32 the logits stay within 1e-5; in bfloat16
(--dtype bfloat16) a weight has 8 significant bits. docs/adapters.md has the differences that were measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from loralib.adapter import name_on_hub, save_adapter
from loralib.adapter_folder import (
    CARD_FILE,
    AdapterConfig,
    copy_tokenizer,
    has_tokenizer,
    new_files,
    read_adapter_config,
    refuse_files,
)
from loralib.injection import KINDS
from loralib.interop.peft_format import TASK_TYPES, export_peft, import_peft, is_peft, read_pairs
from loralib.merging import merge_into
from loralib.model_card import HOW_TO_LOAD, label_order

# ---- transformers ---------------------------------------------------------------------------------------------------


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Show no warning that the head is new, which is meant to be so, and outside a terminal no bars."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    hide_bars = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    logging.set_verbosity_error()
    if hide_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hide_bars:
            logging.enable_progress_bar()


def load_base(source: str, architecture: str, **options: Any) -> nn.Module:
    """A transformers model in float32, for evaluation.

    Args:
        source: name or path. architecture: name of a class of transformers. options: for its ``from_pretrained``.

    Raises:
        ValueError: if transformers lacks the class, or the model cannot be loaded.
    """
    import transformers

    model_class: Any = getattr(transformers, architecture, None)  # the name may come from a stranger's folder
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known and (model_class is None or not architecture.startswith("AutoModel")):
        raise ValueError(
            f"transformers has no model class {architecture}: load the model yourself and use merge_into()"
        )
    with quiet_transformers():
        try:
            # Without trust_remote_code=False transformers would ask whether to run a checkpoint's own code.
            model = model_class.from_pretrained(source, dtype=torch.float32, trust_remote_code=False, **options)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file raises whatever its reader runs into
            raise _not_loaded(source, error) from None
    return model.eval()


def _not_loaded(base: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return ValueError(f"--base {base} cannot be loaded: {reason}")


def load_base_of(config: AdapterConfig, source: str) -> nn.Module:
    """The base model of an adapter of ours, with the adapter's class and labels; ``source`` is a name or path.

    Raises:
        ValueError: as :func:`load_base`.
    """
    options: dict[str, Any] = config.head_options() | revision_of(config, source)
    # The adapter brings its own head, with as many labels as it has.
    return load_base(source, config.architecture, ignore_mismatched_sizes=True, **options)


def revision_of(config: AdapterConfig, source: str) -> dict[str, str]:
    """The option ``revision`` of ``from_pretrained``, where ``source`` is the hub's name that an adapter records."""
    return _revision(config.base_model, config.base_revision, source)


def _revision(name: str | None, revision: Any, source: str) -> dict[str, str]:
    """As :func:`revision_of`, of a ``revision`` that was recorded with the ``name``."""
    return {"revision": str(revision)} if revision and name == source and not Path(source).exists() else {}


def export_merged(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    allow_other_base: bool = False,
) -> None:
    """Write a plain transformers checkpoint with the adapter's label names, card and tokenizer (else the base's).

    Its ``config.json`` also has the card's ``text_fields`` (the columns with the text) and ``max_seq_length``.

    Args:
        base: name or path of the base model. dtype: of the written weights; the merge itself is in float32.

    Raises:
        ValueError: as :func:`loralib.load_adapter`, or for a base that cannot be loaded, or a folder with other files.
    """
    config = read_adapter_config(adapter)
    if not dist.is_initialized():  # before the base is loaded; of a group's processes another may be done already
        refuse_files(folder)
    model = load_base_of(config, base)
    merge_into(model, adapter, allow_other_base=allow_other_base)
    processor = _processor(base, revision_of(config, base), needed=not has_tokenizer(adapter))
    for name in ("text_fields", "max_seq_length"):  # what a reader of data needs to know
        if name in config.card:
            setattr(model.config, name, config.card[name])
    with new_files(folder, "config.json") as new, quiet_transformers():
        model.to(dtype).save_pretrained(new)
        if processor is not None:
            processor.save_pretrained(new)
        copy_tokenizer(adapter, new)
        card = Path(adapter) / CARD_FILE
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        (new / CARD_FILE).write_text(_card(text), encoding="utf-8")


def _card(adapter: str) -> str:
    """Of a plain checkpoint: the text of the adapter's own card, without what loads an adapter."""
    described = adapter.partition("\n# ")[2].partition(HOW_TO_LOAD)[0].strip() or "Adapter"
    return (
        f"---\nlibrary_name: transformers\n---\n\n# {described}\n\n"
        "The adapter is merged into its base: this is a plain checkpoint, which transformers loads by itself.\n"
    )


def _processor(base: str, revision: dict[str, str], needed: bool) -> Any:
    """What reads the base's inputs; None for a model of neither text nor images, and a tokenizer that is not needed."""
    import transformers

    empty = os.path.isdir(base) and not has_tokenizer(base)  # transformers makes a tokenizer that knows no word
    try:
        processor = transformers.AutoProcessor.from_pretrained(base, trust_remote_code=False, **revision)
    except Exception as error:
        if needed and has_tokenizer(base):
            raise _not_loaded(base, error) from None
        return None
    is_tokenizer = isinstance(processor, transformers.PreTrainedTokenizerBase)
    return None if is_tokenizer and (empty or not needed) else processor


# ---- command line ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help shows the arguments)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m loralib.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder of the adapter")
    parser.add_argument("out", help="folder to write: new or empty; an adapter there is replaced by an adapter")
    parser.add_argument("--to", required=True, choices=("peft", "merged", "loralib"), help="what to write")
    parser.add_argument("--base", help="name or path of the base model; --to peft only records it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="merged: dtype of the weights")
    parser.add_argument("--allow_other_base", action="store_true", help="merged: accept a base with other weights")
    parser.add_argument("--kind", choices=tuple(KINDS), help="loralib: lora (default, exact); others by truncated SVD")
    parser.add_argument("--r", type=int, help="loralib: rank after the truncated SVD (8)")
    parser.add_argument(
        "--widths", type=int, nargs="+", metavar="K", help="loralib: widths of its scales, outermost first"
    )
    parser.add_argument("--lora_alpha", type=float, help="loralib: alpha after the truncated SVD (16)")
    return parser


_BELONGS_TO = {
    "dtype": "merged", "allow_other_base": "merged",
    "kind": "loralib", "r": "loralib", "widths": "loralib", "lora_alpha": "loralib",
}  # fmt: skip


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises ValueError with one line for bad arguments or input."""
    arguments = _parser().parse_args(argv)
    for name, target in _BELONGS_TO.items():
        value = getattr(arguments, name)
        if value is not None and value is not False and arguments.to != target:
            raise ValueError(f"--{name} belongs to --to {target}: leave it out")
    if arguments.to == "peft":
        ranks = export_peft(arguments.adapter, arguments.out, arguments.base)
        least, most = min(ranks.values()), max(ranks.values())
        print(f"{arguments.out}: peft adapter, {len(ranks)} modules of rank {least} to {most}")
        if not is_peft(arguments.adapter):
            _print_labels(arguments.adapter, " (load the base with these names, see README.md there)")
        return
    if arguments.base is None:
        raise ValueError(f"--to {arguments.to} needs the base model: give --base NAME_OR_PATH")
    if arguments.to == "merged":
        dtype = getattr(torch, arguments.dtype or "float32")
        export_merged(
            arguments.adapter, arguments.out, arguments.base,
            dtype=dtype, allow_other_base=arguments.allow_other_base,
        )  # fmt: skip
        print(f"{arguments.out}: plain {str(dtype).removeprefix('torch.')} checkpoint")
        _print_labels(arguments.adapter)
        return
    _run_import(arguments)


def _print_labels(adapter: str, hint: str = "") -> None:
    config = read_adapter_config(adapter)
    if labels := label_order(config):
        print(f"labels: {labels}{hint}")


def _run_import(arguments: argparse.Namespace) -> None:
    kind = arguments.kind or "lora"
    given = {name: getattr(arguments, name) for name in ("r", "widths", "lora_alpha")}
    options = {name: value for name, value in given.items() if value is not None}
    if kind == "lora" and options:
        raise ValueError(f"--{next(iter(options))} is for truncated SVD: give --kind lora2, adalora or multiscale")
    if kind in ("lora2", "multiscale"):
        options.setdefault("widths", [8])
    values, _, head = read_pairs(arguments.adapter)
    name = name_on_hub(values.get("base_model_name_or_path"))
    revision = _revision(name, values.get("revision"), arguments.base)
    architecture = _class_for(values.get("task_type"), arguments.base, revision)
    model = load_base(arguments.base, architecture, **_label_count(head), **revision)
    import_peft(model, arguments.adapter, kind, **options)
    save_adapter(
        model, arguments.out, base_model=name, base_revision=revision.get("revision"),
        save_tokenizer=lambda new: copy_tokenizer(arguments.adapter, new),
    )  # fmt: skip
    print(f"{arguments.out}: {kind} adapter")


def _class_for(task_type: str | None, base: str, revision: dict[str, str]) -> str:
    """The model class that belongs to a peft adapter's task type."""
    import transformers

    ending = next((ending for ending, name in TASK_TYPES.items() if name == task_type), None)
    if ending is not None:
        return f"AutoModelFor{ending}"
    if task_type == "FEATURE_EXTRACTION":  # the encoder of a checkpoint that may have a head
        return "AutoModel"
    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, **revision)
    except Exception as error:
        raise _not_loaded(base, error) from None
    return (config.architectures or ["AutoModel"])[0]


def _label_count(head: dict[str, Tensor]) -> dict[str, int]:
    """``num_labels``: the rows of the classifier's last matrix, if the peft adapter has a classifier."""
    matrices = [n for n in sorted(head) if n.endswith(".weight") and {"classifier", "score"} & set(n.split("."))]
    return {"num_labels": head[matrices[-1]].shape[0]} if matrices else {}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 2, with one line on stderr, for what is wrong with arguments, input, disk or memory; 130
    after Ctrl-C."""
    try:
        run(argv)
    except ModuleNotFoundError as error:  # the library alone is installed
        print(f"error: this needs the package {error.name}: in a clone, pip install '.[glue]'", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped: what was there before is whole", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, SafetensorError) as error:
        print(f"error: {error or 'there is not enough memory for the base model'}", file=sys.stderr)
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
