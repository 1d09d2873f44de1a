"""LoRA² on a Llama, Qwen or GPT-2 decoder language model (GPT-2's Conv1D layers store the weight transposed).

    python examples/decoder_lm.py --out decoder
    python examples/decoder_lm.py --shape gpt2 --sst2 DATA/sst2/train.jsonl --out decoder
    python examples/decoder_lm.py --model path/or/name --text notes.txt --quantise int8 --out decoder

The training text is SST-2's sentences, each followed by its label, or a text file (default: this repository's licence).
Without --model, the base is a tiny random model that reads bytes. --out gets adapter/ and, for peft, peft_adapter/.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import loralib
from loralib.interop.peft_format import export_peft

LICENCE = Path(__file__).resolve().parents[1] / "LICENSE"
LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"llama": LLAMA_LIKE, "qwen2": LLAMA_LIKE, "qwen3": LLAMA_LIKE, "gpt2": ["c_attn", "c_proj", "c_fc"]}


class Bytes:
    """A tokenizer that needs no file: each byte is a token."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def tiny(shape: str) -> torch.nn.Module:
    sizes = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
    if shape == "gpt2":
        sizes |= {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        sizes |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "intermediate_size": 128, "head_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape, **sizes), trust_remote_code=False)


def load_base(args: argparse.Namespace) -> torch.nn.Module:
    """The model without an adapter; if requested, its linear layers' weights are in int8, except the output layer's."""
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    else:
        model = tiny(args.shape)
    if args.quantise:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        output = model.get_output_embeddings()
        quantize_(model, Int8WeightOnlyConfig(), lambda m, _: isinstance(m, torch.nn.Linear) and m is not output)
    return model.eval()


def read_text(args: argparse.Namespace) -> str:
    if not args.sst2:
        return Path(args.text).read_text(encoding="utf-8")
    with open(args.sst2, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return "".join(f"{row['sentence'].strip()} => {('bad', 'good')[row['label']]}\n" for row in rows)


@torch.no_grad()
def generate(model: torch.nn.Module, prompt: torch.Tensor) -> list[int]:
    """The 16 tokens that greedy decoding adds to the prompt."""
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    return model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=TARGETS, default="llama", help="the tiny model's architecture (llama)")
    parser.add_argument("--model", help="name or folder of a pretrained model, instead of the tiny one")
    parser.add_argument("--sst2", help="SST-2's train.jsonl: train on its sentences and labels")
    parser.add_argument("--text", default=str(LICENCE), help="text file to train on without --sst2")
    parser.add_argument("--quantise", choices=["int8"], help="store frozen weights in int8 with torchao; not for GPT-2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", required=True, help="folder for the trained adapter")
    args = parser.parse_args(argv)
    kind = AutoConfig.from_pretrained(args.model, trust_remote_code=False).model_type if args.model else args.shape
    if kind not in TARGETS:
        parser.exit(2, f"error: --model: {kind} is not supported: choose one of {', '.join(TARGETS)}\n")
    if args.quantise and kind == "gpt2":
        parser.exit(2, "error: torchao quantises nn.Linear, but GPT-2 has Conv1D: choose another model\n")
    if args.quantise and find_spec("torchao") is None:
        parser.exit(2, "error: --quantise needs torchao: install it with pip install torchao\n")

    base = load_base(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False) if args.model else Bytes()
    ids = torch.tensor(tokenizer.encode(read_text(args)))
    if len(ids) < 320:
        parser.exit(2, f"error: the text has {len(ids)} tokens; at least 320 are needed (a tenth is held out)\n")
    held_out, ids = ids.tensor_split([min(2048, len(ids) // 10)])

    model = load_base(args).train()
    loralib.inject(model, "lora2", TARGETS[kind], r=8, k=8, init="orthogonal")
    low_rank = loralib.LowRankTraining(model, args.steps, target_rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(args.steps):
        starts = torch.randint(0, len(ids) - 32, (8,))
        batch = torch.stack([ids[start : start + 32] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        (loss + low_rank.penalty()).backward()
        low_rank.step(optimizer)  # also clears the gradients
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; {low_rank.ranks.live} singular values left")

    folder = loralib.save_adapter(model, Path(args.out) / "adapter")
    export_peft(folder, Path(args.out) / "peft_adapter", args.model)
    model.eval()
    batch = held_out[: len(held_out) // 32 * 32].view(-1, 32)
    for name, which in (("without the adapter", base), ("with it", model)):
        with torch.no_grad():
            loss = which(input_ids=batch, labels=batch).loss.item()
        print(f"{name}: held-out loss {loss:.2f}, generates {tokenizer.decode(generate(which, held_out[None, :8]))!r}")
    return losses


if __name__ == "__main__":
    main()
