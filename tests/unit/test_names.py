"""Stored names of parameters, as Transformers finds them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    NemotronHConfig,
    Qwen3VLMoeConfig,
)

from roundel.models import Checkpoint, load_model
from roundel.models.experts import split_experts
from roundel.models.names import StoredNames, stored_names
from roundel.sweeps.layers import decoder_layers

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def gemma3() -> nn.Module:
    """A wrapper whose vision tower has more weights than its language model."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4))


def mixtral() -> nn.Module:
    return AutoModelForCausalLM.from_config(MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def nemotron_h() -> nn.Module:
    pattern = {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 2, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4}
    return AutoModelForCausalLM.from_config(NemotronHConfig(**TEXT, **pattern))


@pytest.mark.parametrize(("make", "renamed"), [(gemma3, True), (mixtral, True), (nemotron_h, True)])
def test_every_parameter_is_found_with_its_values(make, renamed, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    checkpoint, tensors = Checkpoint.open(tmp_path).of(loaded), load_file(tmp_path / "model.safetensors")
    found = {name: stored for name, _ in loaded.named_parameters() if (stored := checkpoint.stored(name)) is not None}
    assert any(name != stored for name, stored in found.items()) == renamed
    for name, stored in found.items():
        assert torch.equal(loaded.get_parameter(name), tensors[stored])
    fused = checkpoint.fused_in(loaded)
    assert {name for name, _ in loaded.named_parameters()} == {*found, *fused}
    assert {*found.values(), *(piece for pieces in fused.values() for piece in pieces)} == set(tensors)
    assert bool(fused) == (make is mixtral)


def test_names_of_a_base_model_lack_the_prefix(tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_config(MixtralConfig(**TEXT, num_local_experts=2)).config
    AutoModel.from_config(config).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_config(config)
    names = stored_names(whole, Checkpoint.open(tmp_path))
    assert names.same["model.norm.weight"] == "norm.weight"
    assert stored_names(nn.Linear(2, 2), ["weight"]) == StoredNames(same={"weight": "weight"})


def test_decoder_layers_are_those_of_the_language_model() -> None:
    assert decoder_layers(gemma3()) == ["model.language_model.layers.0", "model.language_model.layers.1"]


@pytest.mark.parametrize("turned", [False, True])
def test_experts_that_are_stored_transposed(turned: bool, tmp_path: Path) -> None:
    """As Qwen3-VL's mixtures are; Transformers turns them back if their shape says so."""
    text = {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32})
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    experts = {name for name in tensors if ".experts." in name}
    assert len(experts) == 4
    if turned:
        tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in experts}
        save_file(tensors, file, metadata={"format": "pt"})
    loaded = load_model(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    split_experts(loaded)
    checkpoint = Checkpoint.open(tmp_path).of(loaded)
    linears = [f"{name}.weight" for name, module in loaded.named_modules() if isinstance(module, nn.Linear) and ".experts." in name]
    assert len(linears) == 2 * 4 * 3
    for name in linears:
        assert torch.equal(checkpoint.read(str(checkpoint.stored(name))), loaded.get_parameter(name))
