import platform
import resource

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from nlu.fast import disable_fast_attention, speed_up
from nlu.fast.dropout import disable_fast_dropout
from nlu.fast.first_token import disable_first_token
from nlu.fast.memory import keep_freed_memory


def test_freed_memory_is_used_again_without_page_faults():
    if platform.libc_ver()[0] != "glibc":
        assert not keep_freed_memory()
        return
    assert keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(8 << 20)  # 32 MiB: 8192 pages, which a mapping of its own would fault in each time
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 8192


def test_speed_up_says_how_many_attentions_and_is_undone():
    config = DebertaV2Config(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                             intermediate_size=8, relative_attention=True, pos_att_type=["c2p"])  # fmt: skip
    model = DebertaV2ForSequenceClassification(config)
    kinds = [type(module) for module in model.modules()]
    assert speed_up(model, fast_attention=False) == 0
    assert speed_up(model) == 2
    assert disable_first_token(model) and disable_fast_attention(model) == 2 and disable_fast_dropout(model) > 2
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
@pytest.mark.parametrize("fast", [False, True])
def test_fast_dropout_inside_attention_is_switched_with_the_rest(kind, fast, monkeypatch):
    drawn = []
    monkeypatch.setattr("nlu.fast.deberta_attention.drop_mask", lambda x, p: drawn.append(p) or torch.zeros_like(x))
    config = AutoConfig.for_model(kind, vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
                                  intermediate_size=8, attention_probs_dropout_prob=0.3)  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).train()
    speed_up(model, fast_dropout=fast)
    ids = torch.ones(2, 5, dtype=torch.long)
    model(input_ids=ids, attention_mask=ids)
    assert (len(drawn) > 0) == fast
