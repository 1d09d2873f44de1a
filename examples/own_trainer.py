"""LoRA² in your own Trainer: inject the layers, and give the Trainer the mix-in and ``low_rank=``.

    python examples/own_trainer.py

A tiny BERT reads scikit-learn's 8×8 digits as 64 tokens, one for the darkness of each pixel.
"""

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import loralib
from loralib.recipes.trainer_mixin import LowRankTrainerMixin


class MyTrainer(LowRankTrainerMixin, Trainer):
    """The code of your own Trainer goes here."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits()
    rows = [
        {"input_ids": torch.tensor(pixels, dtype=torch.long), "labels": int(label)}
        for pixels, label in zip(digits.data, digits.target, strict=True)
    ]
    model = BertForSequenceClassification(BertConfig(
        vocab_size=17, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    ))  # fmt: skip
    loralib.inject(model, "lora2", ["query", "key", "value", "intermediate", "layer.output"], r=8, init="orthogonal")
    model.classifier.requires_grad_(True)

    with tempfile.TemporaryDirectory() as folder:
        trainer = MyTrainer(
            model=model,
            low_rank=loralib.LowRankTraining(model, target_rank=4),
            args=TrainingArguments(
                output_dir=folder, max_steps=args.steps, per_device_train_batch_size=32, learning_rate=1e-2,
                save_strategy="no", logging_steps=50, disable_tqdm=True,
            ),
            train_dataset=rows[:1500],
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )  # fmt: skip
        trainer.train()
        metrics = trainer.evaluate(rows[1500:])
    live = trainer.low_rank.ranks.live
    print(f"accuracy on {len(rows) - 1500} test digits: {metrics['eval_accuracy']:.3f}; {live} singular values left")
    return metrics


if __name__ == "__main__":
    main()
