"""What --lora_module selects: layers of the encoder, by any pattern, and never the head."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from nlu import run_glue
from nlu.arguments import parse_arguments
from nlu.methods.method import head_parameters
from nlu.methods.registry import apply_method
from tests.nlu.tiny import TINY


@pytest.mark.parametrize("modules, expected", [
    ("dense", 6), (".*", 12), (r"bert\.encoder\.layer\.\d{1,2}\.attention\.self\.query,value", 4),
])  # fmt: skip
@pytest.mark.parametrize("method", ["lora2", "sora", "dora"])
def test_patterns_select_layers_of_the_encoder_and_never_the_head(method, modules, expected):
    """``.*`` matches the pooler and the classifier too, which train whole: they get no update."""
    flags = ["--model_name_or_path", "m", "--task_name", "cola", "--do_train", "--root_output_dir", "out"]
    arguments = parse_arguments([*flags, "--method", method, "--lora_module", modules]).method
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **TINY, vocab_size=30))
    apply_method(model, arguments, 10)
    layers = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(layers) == expected and all(".encoder." in name for name in layers)
    assert [p.numel() for p in head_parameters(model)] == [16 * 2, 2, 16 * 16, 16]


def test_a_pattern_that_selects_only_the_head_is_refused(base_flags, capsys):
    assert run_glue.main([*base_flags, "--lora_module", "query,classifier"]) == 2
    assert "'classifier' selects only the head" in capsys.readouterr().err
