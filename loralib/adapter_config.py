"""What ``adapter_config.json`` says: the low-rank layers of an adapter, its head, and the base it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VERSION = "0.3.0"  # of loralib
FORMAT_VERSION = 1


@dataclass
class LayerGroup:
    """Low-rank layers with the same settings.

    Attributes:
        kind: lora, adalora, lora2 or multiscale. r: initial rank; lora_alpha / r is the scaling.
        widths: from the outermost inward. init: of the factors, for layers with singular values.
        fan_in_fan_out: whether the modules store their weight as (in, out), as GPT-2's ``Conv1D`` does.
        rank_pattern: module name -> one character for each singular value (LoRA: rank) of the layer: "1" if it is live
            and stored, "0" if it is pruned.
    """

    kind: str
    r: int
    widths: list[int]
    lora_alpha: float
    lora_dropout: float
    init: str
    fan_in_fan_out: bool
    rank_pattern: dict[str, str]

    def live(self, name: str) -> list[int]:
        """Indices of the live singular values of a module."""
        return [i for i, flag in enumerate(self.rank_pattern[name]) if flag == "1"]


@dataclass
class AdapterConfig:
    """The content of ``adapter_config.json``.

    Attributes:
        kind: the kind of all layers, "mixed", or "parameters" if there are no layers (BitFit, full fine-tuning).
        groups: the low-rank layers.
        tied: parameter name -> name of the stored tensor that is the same parameter (shared outer factors).
        head: names of the other trained parameters, and of the saved buffers of their modules.
        architecture: class of the model. base_config: labels and problem type from the model's ``config``; they are
            needed to build the base again. base_model, base_revision: its name and revision on the hub; may be None.
        base_fingerprint: see :func:`loralib.base_fingerprint`.
        card: anything that the caller added: task, metric, score, …; and "peft_lacks", a second name of something that
            was trained, under which peft's format cannot hold it.
        library_version: of loralib. weights_sha256: of the tensors' file.
    """

    kind: str
    groups: list[LayerGroup]
    tied: dict[str, str]
    head: list[str]
    architecture: str
    base_config: dict[str, Any]
    base_model: str | None
    base_revision: str | None
    base_fingerprint: str
    card: dict[str, Any]
    library_version: str
    weights_sha256: str
    library: str = field(default="loralib")
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def modules(self) -> dict[str, LayerGroup]:
        """Module name -> its group."""
        return {name: group for group in self.groups for name in group.rank_pattern}

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> live rank."""
        return {name: len(group.live(name)) for name, group in self.modules.items()}

    def head_options(self) -> dict[str, Any]:
        """Arguments of transformers' ``from_pretrained`` with which the base has the labels that the adapter's head
        was trained for: id2label, label2id and problem_type. Empty for a model of another library."""
        if not self.base_config:
            return {}
        id2label = {int(number): name for number, name in self.base_config["id2label"].items()}
        label2id = {name: number for number, name in id2label.items()}
        return {"id2label": id2label, "label2id": label2id, "problem_type": self.base_config["problem_type"]}
