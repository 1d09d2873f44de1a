"""Loads bases, tokenizers and image processors from transformers, which is imported when a function is called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralib.adapter_folder import AdapterConfig, has_tokenizer, name_on_hub


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings (a new head is intended), and hide its progress bars outside a terminal."""
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


def load_base_of(config: AdapterConfig, source: str) -> nn.Module:
    """Load the base of a loralib adapter, with its class and number of labels, in float32, in evaluation mode.

    Args:
        source: name or path.

    Raises:
        ValueError: if transformers lacks the class, or the model cannot be loaded.
    """
    import transformers

    options: dict[str, Any] = revision_of(config.base_model, config.base_revision, source)
    if config.base_config:
        options["num_labels"] = len(config.base_config["id2label"])
    with quiet_transformers():
        try:
            # The adapter's head replaces the checkpoint's, which may have another size. Without trust_remote_code=False
            # transformers would ask whether to run a checkpoint's own code.
            model = getattr(transformers, config.architecture).from_pretrained(
                source, dtype=torch.float32, ignore_mismatched_sizes=True, trust_remote_code=False, **options
            )
            return model.eval()
        except Exception as error:  # a damaged file can raise any kind of exception
            raise ValueError(f"--base {source} cannot be loaded: {why_not_loaded(source, error)}") from None


def why_not_loaded(source: str, error: Exception) -> str:
    """The reason why a model could not be loaded, as one line.

    Args:
        source: name or path. error: of transformers, whose text alone does not say that there is no such folder.
    """
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if Path(source).exists():
        return reason
    asked = name_on_hub(source) == source
    return "there is no such folder" + (f", and the hub gave no model: {reason}" if asked else "")


def revision_of(name: str | None, revision: Any, source: str) -> dict[str, str]:
    """The option ``revision`` of ``from_pretrained``, if ``source`` is the hub name with which it was recorded."""
    return {"revision": str(revision)} if revision and name == source and not Path(source).exists() else {}


def model_folder(source: str, **options: Any) -> Path:
    """The folder with a model's files: ``source``, or in the hub's cache the folder that has the commit as its name."""
    from transformers.utils import cached_file

    config = cached_file(source, "config.json", **options)  # None for a peft adapter, which transformers loads too
    return Path(config).parent if config else Path(source)


def processor_of(config: AdapterConfig, source: str) -> Any:
    """The base's tokenizer or image processor; None if it has none (transformers may then make an empty tokenizer)."""
    import transformers

    revision = revision_of(config.base_model, config.base_revision, source)
    try:
        processor = transformers.AutoProcessor.from_pretrained(source, trust_remote_code=False, **revision)
    except Exception:
        return None
    is_tokenizer = isinstance(processor, transformers.PreTrainedTokenizerBase)
    return None if is_tokenizer and not has_tokenizer(model_folder(source, **revision)) else processor
