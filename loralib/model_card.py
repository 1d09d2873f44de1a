"""The README.md of an adapter's folder, and of the folders that an export writes."""

from __future__ import annotations

from loralib.adapter_folder import AdapterConfig

_SHOWN = ("task", "method", "metric", "score", "notes")
_CARD = """---
library_name: {library}
tags:
- lora2
- adapter
---

# Adapter ({kind}) for a {architecture}

| | |
|---|---|
{rows}

## How to load

{how_to_load}
"""
_LOAD = """Load the base model with its own library, with a head of the same size, then:

```python
import loralib

loralib.load_adapter(model, "path/to/this/folder")
```

Or export it, if the format can hold it:

    python -m loralib.export path/to/this/folder --to peft OUT                    # a LoRA adapter of peft
    python -m loralib.export path/to/this/folder --to merged OUT --base BASE      # a plain transformers checkpoint"""


def adapter_card(config: AdapterConfig, library: str = "loralib", how_to_load: str | None = None) -> str:
    """Markdown: what the adapter is, its base, score, labels and ranks, and how to load it.

    Args:
        library: the one that loads the folder. how_to_load: by default the card's entry of this name, or else the
            text for an adapter of loralib.
    """
    rows: dict[str, object] = {
        "base model": config.base_model or "not recorded",
        "base revision": config.base_revision or "not recorded",
        **{key: config.card[key] for key in _SHOWN if key in config.card},
    }
    labels = config.head_options().get("id2label", {}) if config.head else {}  # without a head they are the base's own
    if len(labels) > 1:
        rows["labels"] = ", ".join(f"{number} {name}" for number, name in sorted(labels.items()))
    if ranks := config.ranks.values():
        rows["low-rank layers"] = f"{len(ranks)}, stored ranks {min(ranks)} to {max(ranks)}, {sum(ranks)} in all"
    return _CARD.format(
        library=library,
        kind=config.kind,
        architecture=config.architecture,
        rows="\n".join(f"| {key} | {_cell(value)} |" for key, value in rows.items()),
        how_to_load=how_to_load or str(config.card.get("how_to_load", _LOAD)),
    )


def _cell(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
