"""Adapters in peft's format: write ours as a LoRA of peft, read a LoRA of peft as ours. Neither needs peft.

An adapter with singular values becomes an ordinary LoRA pair of its true rank. The thin QR decompositions B₀ = Q_b R_b
and A₀ᵀ = Q_a R_a give ΔW = Q_b (R_b · core · R_aᵀ) Q_aᵀ, and the singular value decomposition of the small matrix in
the middle gives ΔW = U diag(σ) Vᵀ in float64. Values of σ below the rounding of the stored float32 are dropped. The
pair is (U √σ, √σ Vᵀ), and peft's scaling lora_alpha / r is 1.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from loralib.adapter import install_adapter
from loralib.adapter_checks import check_adapter
from loralib.adapter_files import (
    CARD_FILE,
    CONFIG_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    AdapterConfig,
    LayerGroup,
    copy_tokenizer,
    read_adapter,
    read_json_object,
    read_tensors,
)
from loralib.files import FolderWriter
from loralib.layers import GAUSSIAN_STD

PREFIX = "base_model.model."
TASK_TYPES = {
    "SequenceClassification": "SEQ_CLS",
    "CausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
_HEADS = {"classifier", "score", "qa_outputs"}
_CARD = """---
library_name: peft
base_model: {base}
---

# LoRA adapter for a {architecture}

```python
from peft import PeftModel
from transformers import {architecture}

model = {architecture}.from_pretrained({arguments})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```
"""

Decomposition = tuple[Tensor, Tensor, Tensor]  # U (out, ρ), σ (ρ,) descending, Vᵀ (ρ, in), float64


# ---- decomposition --------------------------------------------------------------------------------------------------


def decompose(left: Tensor, core: Tensor, right: Tensor) -> Decomposition:
    """Singular value decomposition of left · core · right at its numerical rank ρ; the product is not formed.

    Args:
        left: (out, p). core: (p, q). right: (q, in).
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, sigma, vt = torch.linalg.svd(r_left @ core.double() @ r_right.T, full_matrices=False)
    floor = float(sigma.max()) * torch.finfo(torch.float32).eps if len(sigma) else 0.0
    rank = int((sigma > floor).sum())
    return q_left @ u[:, :rank], sigma[:rank], vt[:rank] @ q_right.T


def layer_pair(group: LayerGroup, name: str, tensors: dict[str, Tensor], tied: dict[str, str]) -> tuple[Tensor, Tensor]:
    """(B, A) of one module with ΔW = B A, shapes (out, ρ) and (ρ, in), float32; ρ may be 0.

    Plain LoRA keeps its A as it is, and its scaling goes into B.
    """

    def stored(part: str) -> Tensor:
        return tensors[tied.get(f"{name}.{part}", f"{name}.{part}")].double()

    if "1" not in group.rank_pattern[name]:
        return torch.zeros(0, 0), torch.zeros(0, 0)
    scaling = group.lora_alpha / group.r
    left, right = stored("lora_B.0"), stored("lora_A.0")
    if group.kind == "lora":
        return (left * scaling).float(), right.float()
    core = torch.diag(stored("lora_E") * scaling)
    for i in range(len(group.widths), 0, -1):
        core = stored(f"lora_B.{i}") @ core @ stored(f"lora_A.{i}")
    u, sigma, vt = decompose(left, core, right)
    root = sigma.sqrt()
    return (u * root).float(), (root[:, None] * vt).float()


def start_factors(
    decomposition: Decomposition, r: int, widths: Sequence[int], scaling: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Factors of a layer with singular values whose update is the best approximation of the decomposed matrix.

    By the theorem of Eckart and Young it keeps the min(ρ, r, *widths) largest σ: e = σ / scaling, B₀ = U, A₀ = Vᵀ, and
    the inner factors are identities. The other entries are drawn from N(0, 0.02²) with e = 0, as at any start.

    Returns:
        "lora_B.0" … "lora_E", "lora_A.0" … → tensor, float32.
    """
    u, sigma, vt = decomposition
    rank = min([len(sigma), r, *widths])
    inner = [*widths, r]
    factors: dict[str, Tensor] = {}
    for i, size in enumerate(inner):
        for side, outer, size_outside in (("B", u[:, :rank], u.shape[0]), ("A", vt[:rank].T, vt.shape[1])):
            rows = size_outside if i == 0 else inner[i - 1]
            factor = torch.randn(rows, size, generator=generator) * GAUSSIAN_STD
            factor[:, :rank] = outer.float() if i == 0 else torch.eye(rows, rank)
            factors[f"lora_{side}.{i}"] = factor if side == "B" else factor.T.contiguous()
    factors["lora_E"] = torch.zeros(r)
    factors["lora_E"][:rank] = (sigma[:rank] / scaling).float()
    return factors


# ---- write a peft adapter -------------------------------------------------------------------------------------------


def export_peft(
    adapter: str | os.PathLike[str], folder: str | os.PathLike[str], base_model: str | None = None
) -> dict[str, int]:
    """Write an adapter of ours as a LoRA adapter in peft's format.

    Each module gets its own rank (``rank_pattern``, ``alpha_pattern``). Modules that were pruned whole are left out.
    The head goes to ``modules_to_save``, and the adapter's tokenizer goes along. peft's format has no place for label
    names: they are the base model's, and README.md shows the call that loads it with the adapter's names.

    Args:
        adapter: folder of :func:`loralib.save_adapter`. folder: new, empty, or a peft adapter's, which is replaced.
        base_model: for ``base_model_name_or_path``; by default the one that the adapter records.

    Returns:
        Module name -> rank.

    Raises:
        ValueError: for a damaged adapter, one without a low-rank update, or trained parameters that peft cannot hold.
    """
    config, tensors = read_adapter(adapter)
    pairs = {
        name: layer_pair(group, name, tensors, config.tied) for group in config.groups for name in group.rank_pattern
    }
    ranks = {name: right.shape[0] for name, (_, right) in pairs.items() if right.shape[0]}
    if not ranks:
        raise ValueError(f"{adapter} holds no low-rank update: peft's LoRA format cannot express it")
    for name in config.head:
        if name.rpartition(".")[0] in config.ranks:
            raise ValueError(f"{name} was trained beside its low-rank update: peft's LoRA format cannot hold it")
    state = {PREFIX + name: tensors[name] for name in config.head}
    for name in ranks:
        left, right = pairs[name]
        state[f"{PREFIX}{name}.lora_A.weight"] = right.contiguous()
        state[f"{PREFIX}{name}.lora_B.weight"] = left.contiguous()
    base_model = base_model or config.base_model
    with FolderWriter(folder, {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, *TOKENIZER_FILES}, CONFIG_FILE) as new:
        copy_tokenizer(adapter, new)
        text = json.dumps(_peft_config(config, ranks, base_model), indent=2) + "\n"
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")
        (new / CARD_FILE).write_text(_peft_card(config, base_model), encoding="utf-8")
        (new / WEIGHTS_FILE).write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
    return ranks


def _peft_card(config: AdapterConfig, base_model: str | None) -> str:
    arguments = [repr(base_model or "BASE"), *(f"{n}={value!r}" for n, value in config.head_options().items())]
    return _CARD.format(base=json.dumps(base_model), architecture=config.architecture, arguments=", ".join(arguments))


def _peft_config(config: AdapterConfig, ranks: dict[str, int], base_model: str | None) -> dict[str, Any]:
    task_type = next((t for ending, t in TASK_TYPES.items() if config.architecture.endswith(ending)), None)
    if task_type in ("SEQ_CLS", "TOKEN_CLS") and not any(_HEADS & set(name.split(".")) for name in config.head):
        task_type = None  # with it peft insists on finding the head in the file
    most = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != most}
    dropout = max(group.lora_dropout for group in config.groups)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": config.base_revision,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": dropout,
        "target_modules": list(ranks),
        "modules_to_save": _modules_to_save(config.head, task_type) or None,
        "fan_in_fan_out": all(group.fan_in_fan_out for group in config.groups),
        "bias": "none",
    }


def _modules_to_save(head: list[str], task_type: str | None) -> list[str]:
    """The modules that own the head's parameters. For SEQ_CLS and TOKEN_CLS peft itself saves a whole classifier."""
    modules: dict[str, None] = {}
    for name in head:
        parts = name.split(".")[:-1]
        whole = [i for i, part in enumerate(parts) if part in _HEADS]
        modules[".".join(parts[: whole[0] + 1] if task_type and whole else parts)] = None
    return list(modules)


# ---- read a peft adapter --------------------------------------------------------------------------------------------


def import_peft(model: nn.Module, folder: str | os.PathLike[str], kind: str = "lora", **options: Any) -> None:
    """Put a LoRA adapter of peft on the plain base ``model`` as layers of ours, in place.

    Args:
        kind, options: see :func:`read_peft`.

    Raises:
        ValueError: as :func:`read_peft`, or for a base that the adapter does not fit; the model is unchanged then.
    """
    groups, tensors, head = read_peft(folder, kind, **options)
    config = AdapterConfig(kind, groups, {}, head, "", {}, None, None, "", {}, "", "")
    check_adapter(model, config, tensors, allow_other_base=True)
    install_adapter(model, config, tensors)


def read_peft(
    folder: str | os.PathLike[str],
    kind: str = "lora",
    r: int = 8,
    widths: Sequence[int] = (),
    lora_alpha: float = 16.0,
    seed: int = 0,
) -> tuple[list[LayerGroup], dict[str, Tensor], list[str]]:
    """Groups, tensors and names of head parameters of a LoRA adapter of peft.

    Args:
        kind: ``"lora"`` keeps the pairs unchanged. The other kinds start from the truncated singular value
            decomposition of each pair, see :func:`start_factors`.
        r, widths, lora_alpha: settings of the other kinds; widths is (k,) for ``"lora2"``.
        seed: of the factors that are drawn at random.

    Raises:
        ValueError: for a damaged adapter, or one that is more than LoRA (DoRA, biases, embeddings, convolutions).
    """
    scales = {"adalora": (0,), "lora2": (1,)}.get(kind, range(100))
    if kind != "lora" and len(widths) not in scales:
        raise ValueError(f"kind {kind!r} takes {scales[0]} widths, got {list(widths)}: see multiscale for any number")
    path = Path(folder) / CONFIG_FILE
    values = read_json_object(path)
    _refuse_other_than_lora(path, values)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(Path(folder) / WEIGHTS_FILE).items()}
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    generator = torch.Generator().manual_seed(seed)
    groups: dict[tuple, LayerGroup] = {}
    tensors: dict[str, Tensor] = {}
    for name in names:
        right, left = state.pop(f"{name}.lora_A.weight"), state.pop(f"{name}.lora_B.weight", None)
        rank = right.shape[0]
        if left is None or left.dim() != 2 or right.dim() != 2 or left.shape[1] != rank:
            raise ValueError(f"{folder}: {name} has no pair of matrices of one rank")
        scaling = _peft_scaling(values, name, rank)
        if kind == "lora":
            key = (kind, rank, [], scaling * rank)
            factors = {"lora_B.0": left, "lora_A.0": right}
        else:
            key = (kind, r, list(widths), float(lora_alpha))
            found = decompose(left, torch.eye(rank) * scaling, right)
            factors = start_factors(found, r, widths, lora_alpha / r, generator)
        tensors |= {f"{name}.{part}": tensor.float() for part, tensor in factors.items()}
        # peft's dropout is a setting of its training, and fan_in_fan_out follows from the base's module.
        group = groups.setdefault(str(key), LayerGroup(*key, 0.0, "gaussian", False, {}))
        group.rank_pattern[name] = "1" * key[1]
    odd = next((name for name in state if "lora_" in name), None)
    if not names or odd:
        raise ValueError(f"{folder}: {f'{odd} cannot be imported' if odd else 'there is no pair of LoRA matrices'}")
    return list(groups.values()), {**tensors, **state}, list(state)


def _refuse_other_than_lora(path: Path, values: dict[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {values.get('peft_type')!r}; only LORA can be imported")
    for key in ("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"):
        if values.get(key):
            raise ValueError(f"{path}: adapters with {key} cannot be imported")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{path}: adapters with trained biases cannot be imported")


def _peft_scaling(values: dict[str, Any], name: str, rank: int) -> float:
    """lora_alpha / r, or lora_alpha / √r with rank-stabilised scaling. Patterns match as they do in peft."""
    patterns = values.get("alpha_pattern") or {}
    try:
        matches = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({_safe(pattern)})$", name))
        alpha = next(matches, values.get("lora_alpha"))
    except (AttributeError, TypeError, re.error) as error:
        raise ValueError(f"alpha_pattern does not map patterns to numbers ({error})") from None
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha of {name} must be a positive number, got {alpha!r:.80}")
    return alpha / math.sqrt(rank) if values.get("use_rslora") else alpha / rank


def _safe(pattern: str) -> str:
    """The pattern, unless it repeats a group, which can take exponential time to match."""
    if re.search(r"\)[*+?{]", pattern):
        raise ValueError(f"alpha_pattern {pattern!r:.80} repeats a group: write it without the repetition")
    return pattern
