"""What a checkpoint of a training holds, and how it is written and read back.

    trained.safetensors   :func:`loralib.model.trained_tensors`: the factors, the trainable parameters and the buffers
                          that training changes, under the model's own names. The frozen base is not written.
    low_rank.pt           the state of a :class:`loralib.training.Training`: the steps done, and of the pruning its
                          scores, masks and settings.

The caller saves the optimiser, and whatever else a training resumes with. The Trainer mix-in writes both files beside
the Trainer's own; :mod:`loralib.adapter` writes what others load.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loralib.model import trained_tensors
from loralib.training import Training

TRAINED_FILE, STATE_FILE = "trained.safetensors", "low_rank.pt"


def save_checkpoint(model: nn.Module, low_rank: Training, folder: str | os.PathLike[str]) -> None:
    """Write both files to ``folder``, which is made if it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in trained_tensors(model).items()}
    save_file(tensors, folder / TRAINED_FILE, metadata={"format": "pt"})
    torch.save(low_rank.state_dict(), folder / STATE_FILE)


@torch.no_grad()
def load_model(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Copy the saved tensors into ``model``, whose layers are injected and whose ``requires_grad`` flags are set.

    Raises:
        ValueError: if the model has other trainable parameters. The model is unchanged then.
    """
    saved, own = load_file(Path(folder) / TRAINED_FILE), trained_tensors(model)
    there, here = ({(name, *tensor.shape) for name, tensor in each.items()} for each in (saved, own))
    if odd := there ^ here:
        raise ValueError(f"the saved tensors are of other trainable parameters than the model's (see {min(odd)[0]})")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def load_training(low_rank: Training, folder: str | os.PathLike[str]) -> None:
    """Restore the state of a training that was made with the same settings and started with the same number of steps.
    Raises ValueError if it belongs to another training."""
    low_rank.load_state_dict(torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True))
