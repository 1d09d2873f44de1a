"""Imports of peft adapters: the same logits, starts by truncated SVD, and what is more than LoRA is refused."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import loralib
from loralib.interop.decomposition import decompose, start_factors
from loralib.interop.export import main
from loralib.interop.peft_format import export_peft, import_peft
from tests.loralib.small import Net, adapted, encoder, refused
from tests.loralib.test_adapter_folder import FOLDER

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def peft_adapter(pretrained, tmp_path, request):
    """A LoRA of peft's own on real weights, two ranks, with the logits peft gives."""
    torch.manual_seed(5)
    settings = LoraConfig(task_type="SEQ_CLS", r=6, lora_alpha=9, target_modules=["query", "value"],
                          use_rslora=getattr(request, "param", False), rank_pattern={"value": 3},
                          alpha_pattern={r"layer\.1\..*value": 5})  # fmt: skip
    theirs = get_peft_model(pretrained.base(), settings)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", pretrained.logits(theirs)


def test_an_adapter_without_a_head_goes_to_peft_and_back(tmp_path):
    base = encoder()
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(10, 16)[None]
    model = adapted(modules=["query"], k=2, model=encoder())
    model.classifier = copy.deepcopy(base.classifier).requires_grad_(False)
    loralib.save_adapter(model, tmp_path / "a", base_model=str(tmp_path / "base"))
    export_peft(tmp_path / "a", tmp_path / "peft")
    theirs = PeftModel.from_pretrained(encoder(), tmp_path / "peft").eval()
    assert theirs.peft_config["default"].task_type is None
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    command = [str(tmp_path / "peft"), "--to", "loralib", str(tmp_path / "back"), "--base", str(tmp_path / "base")]
    assert main(command) == 0
    loralib.load_adapter(back := encoder(), tmp_path / "back")
    torch.testing.assert_close(back(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("peft_adapter", [False, True], indirect=True, ids=["", "rank-stabilised"])
def test_a_peft_lora_imports_with_the_same_logits(pretrained, peft_adapter, tmp_path, capsys):
    folder, logits = peft_adapter
    out = tmp_path / "ours"
    assert main([str(folder), "--to", "loralib", str(out), "--base", str(pretrained.path)]) == 0
    model = pretrained.base()
    config = loralib.load_adapter(model, out)
    assert config.kind == "lora" and set(config.ranks.values()) == {3, 6} and config.base_model == pretrained.path.name
    torch.testing.assert_close(pretrained.logits(model), logits, **CLOSE)
    export_peft(out, tmp_path / "back")  # and back
    back = PeftModel.from_pretrained(pretrained.base(), tmp_path / "back")
    torch.testing.assert_close(pretrained.logits(back), logits, **CLOSE)


@pytest.mark.parametrize(
    "change, tensor, says",
    [
        ({"alora_invocation_tokens": [3]}, "", "alora_invocation_tokens"),
        ({"init_lora_weights": "PiSSA_niter_4"}, "", "path_initial_model_for_weight_conversion"),
        ({"lora_alpha": "x"}, "", "layers.0.q cannot be read"),
        ({"init_lora_weights": "lora_ga"}, "", "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "orthogonal"}, "classifier.base_layer.weight", "save_embedding_layers=False"),
        ({}, "layers.0.q.lora_magnitude_vector", "lora_magnitude_vector cannot be imported"),
        ({}, "other.weight", "other.weight is missing .* model: the adapter was made for a model that peft adapted"),
    ],
)
def test_a_peft_adapter_that_is_more_than_lora_is_refused(tmp_path, change, tensor, says):
    folder, model = shutil.copytree(FOLDER / "peft", tmp_path / "a"), Net()
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    save_file(load_file(weights) | ({f"base_model.model.{tensor}": torch.ones(2)} if tensor else {}), weights)
    with refused(says, model):
        import_peft(model, folder)


@pytest.mark.parametrize("kind, r, widths", [("lora2", 4, (2,)), ("adalora", 4, ()), ("multiscale", 8, (7, 6))])
def test_a_start_by_svd_is_the_best_approximation(pretrained, peft_adapter, kind, r, widths):
    exact, start = pretrained.base(), pretrained.base()
    import_peft(exact, peft_adapter[0])
    import_peft(start, peft_adapter[0], kind, r=r, widths=widths, lora_alpha=4.0)
    kept = min(r, *widths, 99)
    for name, layer in loralib.lora_layers(start).items():
        whole = exact.get_submodule(name).delta_weight().detach()
        sigma = torch.linalg.svdvals(whole.double())
        error = torch.linalg.matrix_norm((whole - layer.delta_weight()).double())
        torch.testing.assert_close(error, sigma[kept:].square().sum().sqrt(), atol=1e-5, rtol=1e-4)
    if kept >= 6:
        torch.testing.assert_close(pretrained.logits(start), peft_adapter[1], **CLOSE)
    if widths == (2,):  # and it trains and prunes
        assert len(pretrained.train(start, steps=6, lr=1e-3)) == 12


def test_decomposition_against_a_dense_svd():
    torch.manual_seed(0)
    left, right = torch.randn(20, 5), torch.randn(4, 9)
    core = torch.randn(5, 4) @ torch.diag(torch.tensor([1.0, 0, 2, 1]))
    u, sigma, vt = decompose(left, core, right)
    dense = left.double() @ core.double() @ right.double()
    assert len(sigma) == 3
    torch.testing.assert_close(u * sigma @ vt, dense)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(dense)[:3])
    factors = start_factors((u, sigma, vt), 6, (5, 4), 2.0, torch.Generator().manual_seed(0))
    chain = factors["lora_B.0"] @ factors["lora_B.1"] @ factors["lora_B.2"] @ torch.diag(factors["lora_E"])
    chain = chain @ factors["lora_A.2"] @ factors["lora_A.1"] @ factors["lora_A.0"] * 2
    torch.testing.assert_close(chain, dense.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recorded, kept", [("microsoft/deberta-v3-base", "microsoft/deberta-v3-base"),
                                            ("C:\\me\\model", "model"), ("../me/theirs/", "theirs")])  # fmt: skip
def test_an_import_keeps_the_base_s_name_on_the_hub(pretrained, peft_adapter, tmp_path, recorded, kept):
    config = json.loads((peft_adapter[0] / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": recorded, "revision": "r1"}
    (peft_adapter[0] / "adapter_config.json").write_text(json.dumps(config))
    assert main([str(peft_adapter[0]), "--to", "loralib", str(tmp_path / "ours"), "--base", str(pretrained.path)]) == 0
    ours = loralib.read_adapter_config(tmp_path / "ours")
    assert (ours.base_model, ours.base_revision) == (kept, None)  # the folder need not be that revision


def test_singular_values_below_the_rounding_of_float32_are_left_out():
    left, core = torch.eye(5, 3), torch.diag(torch.tensor([1.0, 1e-3, 1e-9]))
    torch.testing.assert_close(decompose(left, core, left.T)[1], torch.tensor([1.0, 1e-3], dtype=torch.float64))
