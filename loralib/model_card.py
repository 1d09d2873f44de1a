"""README.md of an adapter folder."""

from __future__ import annotations

from loralib.adapter_files import AdapterConfig, LayerGroup

_SHOWN = ("task", "method", "metric", "score", "notes")
_NAMES = {"lora": "LoRA", "adalora": "AdaLoRA", "lora2": "LoRA²", "multiscale": "multi-scale LoRA²"}


def model_card(config: AdapterConfig, counts: dict[str, int]) -> str:
    """Markdown: what the adapter is, its score, its size, and how to load it.

    Args:
        counts: stored values of the "adapter" (low-rank factors) and of the "head" (everything else trained).
    """
    base = config.base_model or "not recorded"
    names = {_name(group) for group in config.groups} or {"Parameter"}
    lines = ["---", "library_name: loralib", "tags:", "- lora2", "- adapter", "---", ""]
    lines += [f"# {' and '.join(sorted(names))} adapter for a {config.architecture}", ""]
    rows = [("base model", base), ("base revision", config.base_revision or "not recorded")]
    rows += [(key, _cell(config.card[key])) for key in _SHOWN if key in config.card]
    rows += [("adapter parameters", f"{counts['adapter']:,}"), ("other trained parameters", f"{counts['head']:,}")]
    for group in config.groups:
        live = [flags.count("1") for flags in group.rank_pattern.values()]
        scales = f", widths {', '.join(map(str, group.widths))}" if group.widths else ""
        rows.append(
            (
                f"{len(live)} layers",
                f"{_name(group)}, initial rank {group.r}{scales}, alpha {group.lora_alpha:g}; stored ranks "
                f"{min(live)} to {max(live)}, {sum(live)} in all",
            )
        )
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""]
    lines += [
        "## How to load",
        "",
        "Load the base model with its own library, with a head of the same size, then:",
        "",
        "```python",
        "import loralib",
        "",
        'loralib.load_adapter(model, "path/to/this/folder")',
        "```",
        "",
        "`python -m loralib.export path/to/this/folder --to peft OUT` makes a peft adapter of it, and `--to merged` a",
        "plain checkpoint.",
        "",
    ]
    return "\n".join(lines)


def _name(group: LayerGroup) -> str:
    return _NAMES["lora2" if group.kind == "multiscale" and len(group.widths) == 1 else group.kind]


def _cell(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
