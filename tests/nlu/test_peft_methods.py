"""peft's own methods: its AdaLoRA's regulariser, allocation and resume, and configs that cannot be used."""

import json

import pytest
import torch
from peft.tuners.adalora import AdaLoraModel

from loralib.interop.peft_adalora import AdaLoraTraining
from nlu.methods.method import AppliedMethod
from nlu.methods.peft_methods import inject_peft, make_peft_config
from nlu.run_glue import main
from tests.nlu.tiny import quick_peft_adalora, tiny_bert


def test_pefts_adalora_has_pefts_own_regulariser_and_allocation(tmp_path):
    values = json.loads(quick_peft_adalora(tmp_path).read_text())
    model = tiny_bert()
    tuner = inject_peft(model, make_peft_config(values, "a.json", 8), ["query", "value"])
    assert isinstance(tuner, AdaLoraModel)
    loop = AdaLoraTraining(tuner)
    inputs = {"input_ids": torch.tensor([[2, 7, 9, 3]]), "labels": torch.tensor([1])}
    model.eval()
    torch.testing.assert_close(loop.penalty(), tuner(**inputs).loss - model(**inputs).loss)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    budgets = []
    for _ in range(8):
        (model(**inputs).loss + loop.penalty()).backward()
        optimizer.step()
        loop.after_step()
        optimizer.zero_grad()
        budgets.append(sum(int(p.count_nonzero()) for n, p in model.named_parameters() if "lora_E" in n))
    assert budgets[0] == 48 and budgets[-1] == 32 and budgets == sorted(budgets, reverse=True)
    applied = AppliedMethod(model, pruned_params=loop.pruned_params)
    hidden = model.config.hidden_size
    assert applied.pruned_params() == (48 - 32) * (1 + 2 * hidden)


@pytest.mark.parametrize("content, message", [
    ('{"peft_type": "NOSUCH"}', "no peft config"),
    ('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}', "changes the input"),
    ('{"peft_type": "ADALORA", "tinit": 5, "tfinal": 5}', "tinit + tfinal = 5 + 5 = 10 leaves no step"),
    ('{"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}', "at random"),
])  # fmt: skip
def test_a_bad_peft_config_is_one_line(content, message, tmp_path, base_flags, capsys):
    (tmp_path / "config.json").write_text(content)
    flags = [f for f in base_flags if f not in ("--lora_r", "4", "--lora_alpha", "32")]
    assert main([*flags, "--method", "peft", "--peft_config", str(tmp_path / "config.json"), "--max_steps", "10"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("error: ")
    assert not (tmp_path / "run").exists()
