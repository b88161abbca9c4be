"""Models whose weights are stored under other names than Transformers gives them: a wrapper with a vision tower, and a hybrid."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3Config, NemotronHConfig, PreTrainedConfig

import roundel
from e2e import tiny
from e2e.test_experts import SMALL
from roundel.artifacts.checkpoints import read
from roundel.models.load import load_model
from roundel.rounding.round import dequantized

VISION = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8}


def configuration(name: str, vocabulary: int) -> PreTrainedConfig:
    if name == "gemma3":
        text = {**SMALL, "head_dim": 16, "vocab_size": vocabulary}
        return Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=5)
    return NemotronHConfig(**SMALL, **MAMBA, head_dim=16, vocab_size=vocabulary, layers_block_type=["mamba", "attention"])


@pytest.fixture(scope="module", params=["gemma3", "nemotron-h"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, path = tiny.make_tokenizer(starts=False), tmp_path_factory.mktemp("source") / request.param
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(request.param, len(tokenizer)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(("form", "scheme"), [("compressed-tensors", "int4-g32"), ("native", "int3-g32")])
def test_written_under_the_stored_names_and_read_back(
    source: Path, form: str, scheme: str, quantize: Callable[..., roundel.Quantized], tmp_path: Path
) -> None:
    result = quantize(source, tmp_path / "out", scheme=scheme, format=form)
    towers = {name for name in result.details["skipped"] if "vision_tower" in name}
    assert bool(towers) == (source.name == "gemma3")
    assert {result.details["skipped"][name] for name in towers} <= {"not part of the language model's decoder layers"}
    assert len(result.details["layers"]) == (14 if source.name == "gemma3" else 6)
    before, after = load_file(source / "model.safetensors"), load_file(result.path / "model.safetensors")
    replaced = {row["tensor"] for row in result.details["layers"].values()}
    assert any(row["tensor"] != f"{name}.weight" for name, row in result.details["layers"].items())
    for name in before.keys() - replaced:
        assert torch.equal(before[name], after[name])
    assert {name.rpartition(".")[0] for name in after.keys() - before.keys()} <= {name.rpartition(".")[0] for name in replaced}
    stored = read(result.path)
    loaded = load_model(result.path, device=torch.device("cpu"), dtype=torch.float32)
    for name, weight in stored.rounded.items():
        module = loaded.get_submodule(name)
        assert torch.equal(module.dequantized() if form == "native" else module.weight, dequantized(weight))
    roundel.export(result.path, to="dense", output=tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert dense.keys() == before.keys()
