import platform
import resource

import torch
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from nlu.fast.deberta_attention import disable_fast_attention
from nlu.fast.dropout import disable_fast_dropout
from nlu.fast.first_token import disable_first_token
from nlu.fast.speed import keep_freed_memory, speed_up


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
