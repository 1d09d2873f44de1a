"""What peft saves of a model's head beside its adapter, by the model's class and the names of its modules."""

from __future__ import annotations

from collections.abc import Iterable

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
