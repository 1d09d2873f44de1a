"""Small models with and without adapters, and helpers that several test files share."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import nn

import loralib
from loralib.recipes.trainer_mixin import LowRankTrainerMixin
from tests.nlu.tiny import SIZES

INPUTS = torch.arange(18, dtype=torch.float64).view(3, 6).cos().float()
# Settings of an allocator over 40 steps.
SCHEDULE = {"init_warmup": 5, "final_warmup": 8, "mask_interval": 3, "beta1": 0.85, "beta2": 0.7, "total_steps": 40}
# Every kind of layer, with options of each.
KINDS = [
    ("lora", {}),
    ("adalora", {"init": "orthogonal"}),
    ("lora2", {"k": 1}),
    ("lora2", {"k": 2, "share_outer": True, "init": "orthogonal"}),
    ("multiscale", {"widths": (4, 2), "lora_dropout": 0.1}),
]


class Net(nn.Module):
    """Three blocks of two linear layers, and a classifier. No random number generator sets the weights."""

    def __init__(self, width=6, labels=2):
        super().__init__()
        layers = ({"q": nn.Linear(width, 5), "v": nn.Linear(5, width)} for _ in range(3))
        self.layers = nn.ModuleList(map(nn.ModuleDict, layers))
        self.classifier = nn.Linear(width, labels)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                values = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
                parameter.copy_((3 * values + number).sin() / 2)
        self.eval()

    def forward(self, x):
        for block in self.layers:
            x = x + block["v"](torch.tanh(block["q"](x)))
        return self.classifier(x)


def adapted(kind="lora2", modules=("q", "v"), r=3, model=None, head="classifier", **options):
    """Random factors and a trainable head; one singular value of the first layer and all of the second are pruned."""
    model = Net() if model is None else model
    loralib.inject(model, kind, list(modules), r=r, **options)
    model.get_submodule(head).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable(model):
        nn.init.normal_(parameter, generator=generator)
    for pruned, layer in zip(([1], range(r)), loralib.lora_layers(model).values(), strict=False):
        if layer.lora_E is not None:
            layer.lora_E.data[list(pruned)] = 0
    return model.eval()


def state_of(model):
    """Everything that a refused call must not change: modules, tensors and ``requires_grad`` flags."""
    return (
        {name: (type(module), id(module)) for name, module in model.named_modules()},
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [parameter.requires_grad for parameter in model.parameters()],
    )


def assert_unchanged(model, before):
    modules, state, flags = state_of(model)
    assert modules == before[0] and flags == before[2] and state.keys() == before[1].keys()
    assert all(tensor.is_meta or torch.equal(state[name], tensor) for name, tensor in before[1].items())


@contextmanager
def refused(says=None, model=None):
    """Expect a one-line ValueError that matches ``says``, and no change of ``model``."""
    before = None if model is None else state_of(model)
    with pytest.raises(ValueError, match=says) as error:
        yield
    assert "\n" not in str(error.value)
    if model is not None:
        assert_unchanged(model, before)


def model_to_prune(widths=(3,), count=3, share_outer=False):
    """``count`` linear layers with random factors of rank 4."""
    return blocks("multiscale", count, (6, 5), std=1.0, r=4, widths=widths, share_outer=share_outer)


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def random_step(model, generator, skip=()):
    """Stands for backward and an optimiser step. Parameters with an entry of ``skip`` in their name get no gradient."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if any(s in name for s in skip) else gradient
            with torch.no_grad():
                p.sub_(0.05 * gradient)


def gpt2(layers=1):
    """A tiny decoder, whose linear layers are ``Conv1D`` and whose output layer is tied to its embedding."""
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 16}
    return decoder("gpt2", sizes, bos_token_id=1, eos_token_id=2)


def encoder(model_type="bert", sizes=SIZES, **settings):
    """A transformers sequence classifier with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **settings})
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def decoder(model_type, sizes, **settings):
    """A transformers language model with random weights. By default its output layer is tied to its embedding."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{"tie_word_embeddings": True, **sizes, **settings})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


class LowRankTrainer(LowRankTrainerMixin, transformers.Trainer):
    """transformers' Trainer with the mix-in and nothing else."""


def training_arguments(folder, **changes):
    """Arguments of a Trainer on the CPU that by default saves and shows nothing."""
    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return transformers.TrainingArguments(str(folder), **quiet | changes)


def blocks(kind, count=3, features=(9, 7), std=None, seed=0, **options):
    """``count`` linear layers "layer.N.q" of one shape with factors, which are redrawn if ``std`` is given."""
    torch.manual_seed(seed)
    layers = (nn.ModuleDict({"q": nn.Linear(*features)}) for _ in range(count))
    model = nn.ModuleDict({"layer": nn.ModuleList(layers)})
    loralib.inject(model, kind, ["q"], **options)
    return model if std is None else randomise(model, std)


def randomise(model, std=1.0, seed=0):
    """Draw every factor from N(0, std²), a shared one once."""
    generator = torch.Generator().manual_seed(seed)
    factors = {id(p): p for layer in loralib.lora_layers(model).values() for p in layer.lora_parameters()}
    for factor in factors.values():
        nn.init.normal_(factor, std=std, generator=generator)
    return model


def matrices_of(model):
    return [f for layer in loralib.lora_layers(model).values() for f in [*layer.lora_B, *layer.lora_A]]
