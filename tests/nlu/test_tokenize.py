"""Tokens: right ids, lengths and labels, nothing written, the same each time."""

import datasets
import pytest
from glue_samples import sample_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import OPTConfig, OPTModel, PreTrainedTokenizerFast

from nlu.data.glue import load_task_data
from nlu.data.own_files import load_own_files
from nlu.data.tokens import longest_input, tokenize
from nlu.errors import UsageError
from nlu.tasks import TASKS

WORDS = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "a": 4, "b": 5, "c": 6}


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    options = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def rows(task, texts, labels) -> dict[str, datasets.Dataset]:
    columns = {field: [text[i] for text in texts] for i, field in enumerate(task.text_fields)}
    return {"train": datasets.Dataset.from_dict({**columns, "label": labels, "idx": list(range(len(texts)))})}


def test_single_sentences():
    tokens = tokenize(rows(TASKS["cola"], [["a b"], ["c"]], [1, 0]), TASKS["cola"], make_tokenizer(), 32)["train"]
    assert tokens["input_ids"][:] == [[1, 4, 5, 2], [1, 6, 2]]
    assert tokens["attention_mask"][:] == [[1] * 4, [1] * 3]
    assert tokens["length"][:] == [4, 3] and tokens["labels"][:] == [1, 0] and tokens["idx"][:] == [0, 1]
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "token_type_ids", "length", "labels", "idx"}


def test_pairs_in_order_cut_and_padded():
    task = TASKS["stsb"]
    splits = rows(task, [["a b", "c"], ["a a a a", "b b b b"]], [0.5, 5.0])
    tokens = tokenize(splits, task, make_tokenizer(), 7, pad_to_max_length=True)["train"]
    assert tokens["input_ids"][:] == [[1, 4, 5, 2, 6, 2, 0], [1, 4, 4, 2, 5, 5, 2]]
    assert tokens["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 0]
    assert tokens["length"][:] == [6, 7] and tokens["labels"][:] == [0.5, 5.0]
    limited = tokenize(splits, task, make_tokenizer(model_max_length=5), 7)["train"]
    assert limited["length"][:] == [5, 5]
    (padded,) = tokenize(rows(TASKS["cola"], [["a"]], [1]), TASKS["cola"], make_tokenizer(), 6, True)["train"]
    assert padded["input_ids"] == [1, 4, 2, 0, 0, 0] and padded["length"] == 3


def test_no_room_for_text():
    with pytest.raises(UsageError, match="--max_seq_length 3 has no room for text: 3 tokens are special"):
        tokenize(rows(TASKS["rte"], [["a", "b"]], [0]), TASKS["rte"], make_tokenizer(), 3)
    tokens = tokenize(rows(TASKS["cola"], [["a b"]], [0]), TASKS["cola"], make_tokenizer(), 3)["train"]
    assert tokens["input_ids"][:] == [[1, 4, 2]]  # one text has two of them


@pytest.mark.parametrize("names", [["input_ids", "attention_mask"], ["input_ids"]])
def test_a_tokenizer_without_token_types_or_masks(names):
    tokenizer = make_tokenizer(model_input_names=names)
    tokens = tokenize(rows(TASKS["rte"], [["a", "b"]], [0]), TASKS["rte"], tokenizer, 8)["train"]
    assert "token_type_ids" not in tokens.column_names and tokens["attention_mask"][:] == [[1] * 5]


def test_gpt2s_table_of_positions_limits_its_input():
    assert longest_input(nn.ModuleDict({"wte": nn.Embedding(9, 2), "wpe": nn.Embedding(32, 2)})) == 32
    opt = OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8, max_position_embeddings=30,
                    vocab_size=50, word_embed_proj_dim=8)  # fmt: skip
    assert longest_input(OPTModel(opt)) == 30


def test_hidden_labels_are_left_out_and_shown_ones_stay(tmp_path):
    task = TASKS["mrpc"]
    hidden = datasets.Dataset.from_list(sample_rows(task, "test"))
    shown = datasets.Dataset.from_list(sample_rows(task, "validation"))
    tokens = tokenize({"test": hidden, "validation": shown}, task, make_tokenizer(), 16)
    assert "labels" not in tokens["test"].column_names and "labels" in tokens["validation"].column_names
    assert "labels" in tokenize({"test": shown}, task, make_tokenizer(), 16)["test"].column_names
    partly = datasets.concatenate_datasets([shown, hidden])
    scores = rows(TASKS["stsb"], [["a", "b"]], [-1.0])["train"]
    for of, dataset in ((task, partly), (TASKS["stsb"], scores)):
        assert "labels" not in tokenize({"test": dataset}, of, make_tokenizer(), 16)["test"].column_names
    for split, labels in (("train", "0.5 -2.5"), ("test", "-1.5 3")):
        lines = [f"a b,{label}" for label in labels.split()]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    (tmp_path / "hidden.csv").write_text("text\na\n")
    for name, there in (("test", True), ("hidden", False)):
        task, splits = load_own_files(tmp_path / "train.csv", test_file=tmp_path / f"{name}.csv")
        tokens = tokenize(splits, task, make_tokenizer(), 16)
        assert ("labels" in tokens["test"].column_names) == there


def test_nothing_is_written_and_twice_is_the_same(tmp_path):
    task = TASKS["rte"]
    (tmp_path / "rte").mkdir()
    datasets.Dataset.from_list(sample_rows(task, "train")).to_parquet(tmp_path / "rte" / "train.parquet")
    before = sorted(tmp_path.rglob("*"))
    splits = load_task_data(task, tmp_path, need=["train"])
    first, second = (tokenize(splits, task, make_tokenizer(), 16)["train"] for _ in range(2))
    assert first.to_dict() == second.to_dict() and first.cache_files == []
    assert sorted(tmp_path.rglob("*")) == before
