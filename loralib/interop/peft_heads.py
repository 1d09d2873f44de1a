"""What peft saves of a model's head beside its adapter, by the model's class and the names of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from loralib.layers import LoRALayer

TASK_TYPES = {
    "SequenceClassification": "SEQ_CLS",
    "CausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
_HEADS = {"classifier", "score", "qa_outputs"}


def task_type_of(architecture: str, head: Iterable[str]) -> str | None:
    """peft's task type for a class of transformers; None where peft would miss the head, whose names are given."""
    task_type = next((t for ending, t in TASK_TYPES.items() if architecture.endswith(ending)), None)
    insists = task_type not in (None, "CAUSAL_LM")
    return None if insists and not any(_HEADS & set(name.split(".")) for name in head) else task_type


def modules_to_save(head: Iterable[str], task_type: str | None) -> list[str]:
    """The modules that own the head's parameters. With a task type that has a head, peft saves a whole classifier."""
    modules: dict[str, None] = {}
    for name in head:
        parts = name.split(".")[:-1]
        whole = [i for i, part in enumerate(parts) if part in _HEADS]
        modules[".".join(parts[: whole[0] + 1] if task_type and whole else parts)] = None
    return list(modules)


def lost_in_peft(
    model: nn.Module, architecture: str, layers: Mapping[str, LoRALayer], head: Mapping[str, Tensor]
) -> str | None:
    """The first name that peft would need in an adapter of this model, or would take for one of its modules.

    That is another name of an adapted module or of a trained tensor, a frozen tensor beside a trained one (peft saves a
    module whole), and a module whose name ends with that of a saved one (by which peft looks for it).
    """
    trained, owners = set(map(id, head.values())), modules_to_save(head, task_type_of(architecture, head))
    inside = tuple(f"{owner}." if owner else "" for owner in owners)
    modules = list(model.named_modules(remove_duplicate=False))
    names = [name for name, module in modules if isinstance(module, LoRALayer) and name not in layers]
    state = model.state_dict(keep_vars=True)
    names += [n for n, t in state.items() if n not in head and (id(t) in trained or n.startswith(inside))]
    ends = tuple(filter(None, owners))
    names += [n for n, _ in modules if n.endswith(ends) and n not in owners] if ends else []
    return names[0] if names else None
