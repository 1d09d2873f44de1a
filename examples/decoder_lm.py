"""LoRA² on a decoder language model: Llama-, Qwen- or GPT-2-shaped (whose Conv1D layers store their weight turned).

    python examples/decoder_lm.py --shape gpt2
    python examples/decoder_lm.py --model path/or/name --text notes.txt --out adapter

Without --model a tiny random model learns the bytes of this repository's licence.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import loralib

LICENCE = Path(__file__).resolve().parents[1] / "LICENSE"
LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"llama": LLAMA_LIKE, "qwen2": LLAMA_LIKE, "qwen3": LLAMA_LIKE, "gpt2": ["c_attn", "c_proj", "c_fc"]}


def tiny(shape: str) -> torch.nn.Module:
    sizes = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
    if shape == "gpt2":
        sizes |= {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        sizes |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "intermediate_size": 128, "head_dim": 16}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape, **sizes), trust_remote_code=False)


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=TARGETS, default="llama", help="of the tiny model")
    parser.add_argument("--model", help="a pretrained model instead")
    parser.add_argument("--text", default=str(LICENCE), help="what to learn")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", help="folder for the trained adapter")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    text = Path(args.text).read_text(encoding="utf-8")
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
        ids = torch.tensor(AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)(text)["input_ids"])
    else:
        model, ids = tiny(args.shape), torch.tensor(list(text.encode()))

    loralib.inject(model, "lora2", TARGETS[model.config.model_type], r=8, k=8, init="orthogonal")
    loralib.mark_only_lora_as_trainable(model)
    low_rank = loralib.LowRankTraining(model, args.steps, target_rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(args.steps):
        starts = torch.randint(0, len(ids) - 32, (8,))
        batch = torch.stack([ids[start : start + 32] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        (loss + low_rank.penalty()).backward()
        optimizer.step()
        low_rank.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {low_rank.allocator.live_rank} singular values live")

    if args.out:
        loralib.save_adapter(model, args.out, rank_pattern=low_rank.rank_pattern)
    loralib.merge_adapter(model.eval())  # as fast as the base from here on
    prompt = ids[:8][None]
    print(model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[0].tolist())
    return losses


if __name__ == "__main__":
    main()
