"""LoRA² on a vision transformer, with a new head: handwritten digits (scikit-learn's, 8×8 pixels).

python examples/vision_transformer.py
python examples/vision_transformer.py --model path/or/name
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import loralib


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a pretrained ViT (default: a tiny random one)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", help="folder for the trained adapter")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    if args.model:
        model = ViTForImageClassification.from_pretrained(
            args.model, num_labels=10, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    else:
        model = ViTForImageClassification(ViTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=8,
            patch_size=2, num_labels=10, hidden_dropout_prob=0.0, initializer_range=0.2,
        ))  # fmt: skip
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=model.config.image_size).expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)

    loralib.inject(model, "lora2", "all-linear", r=8, k=8, init="orthogonal")
    model.classifier.requires_grad_(True)
    low_rank = loralib.LowRankTraining(model, args.steps, target_rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(args.steps):
        rows = torch.randint(0, 1500, (32,))
        loss = model(pixel_values=images[rows], labels=labels[rows]).loss + low_rank.penalty()
        loss.backward()
        low_rank.step(optimizer)  # also clears the gradients

    model.eval()
    with torch.no_grad():
        found = model(pixel_values=images[1500:]).logits.argmax(-1)
    accuracy = (found == labels[1500:]).float().mean().item()
    print(f"accuracy on {len(found)} test digits: {accuracy:.3f}")
    if args.out:
        loralib.save_adapter(model, args.out)
    return accuracy


if __name__ == "__main__":
    main()
