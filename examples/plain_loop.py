"""LoRA² in a plain PyTorch loop on your own model: a network that knows the digits 0 to 4 learns 5 to 9.

python examples/plain_loop.py
"""

import argparse
import copy
import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import loralib


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    low, high = (labels < 5).nonzero().flatten(), (labels >= 5).nonzero().flatten()

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(args.steps):  # the pretraining
        rows = low[torch.randint(0, len(low), (64,))]
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def accuracy() -> float:
        with torch.no_grad():
            return (model(images[high]).argmax(-1) == labels[high] - 5).float().mean().item()

    base, before = copy.deepcopy(model), accuracy()
    loralib.inject(model, "lora2", ["0", "2", "4"], r=8, k=8)
    low_rank = loralib.LowRankTraining(model, args.steps, target_rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(args.steps):
        rows = high[torch.randint(0, len(high), (64,))]
        loss = F.cross_entropy(model(images[rows]), labels[rows] - 5) + low_rank.penalty()
        loss.backward()
        low_rank.step(optimizer)  # also clears the gradients
    after = accuracy()
    print(f"accuracy on 5 to 9: {before:.3f} before, {after:.3f} after; ranks {list(loralib.compact(model).values())}")

    with tempfile.TemporaryDirectory() as folder:
        loralib.save_adapter(model, f"{folder}/adapter")
        loralib.load_adapter(base, f"{folder}/adapter")
        assert torch.equal(base(images), model(images))  # on another copy of the base
    return before, after


if __name__ == "__main__":
    main()
