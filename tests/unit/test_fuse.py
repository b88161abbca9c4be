"""The overlay over a checkpoint's files, and what `fuse_rotation` refuses before it looks at the model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from roundel.errors import ModelError, SchemeError
from roundel.models import Checkpoint
from roundel.models.fuse import FusedModel, fuse_rotation
from roundel.models.names import StoredNames

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def fused(overlay: dict[str, Tensor], *, tied: bool = True) -> FusedModel:
    return FusedModel(overlay=overlay, parts=("residual",), seed=0, untied=EMBEDDING if tied else None, head=HEAD, difference=0.0)


def stored(directory: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint.open(directory)


@pytest.fixture
def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {EMBEDDING: torch.randn(6, 4, generator=generator), HEAD: torch.randn(6, 4, generator=generator)}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_changed_tensors_are_read_in_the_stored_type_and_others_from_the_file(
    tmp_path: Path, values: dict[str, Tensor], kind: torch.dtype
) -> None:
    norm = torch.arange(4.0)
    checkpoint = fused(values).checkpoint(stored(tmp_path, {EMBEDDING: torch.zeros(6, 4, dtype=kind), NORM: norm}))
    assert list(checkpoint) == [EMBEDDING, NORM, HEAD]  # the head was tied and had no tensor
    for name, value in values.items():
        assert checkpoint.read(name).dtype == kind
        assert torch.equal(checkpoint.read(name), value.to(kind))
        assert torch.equal(checkpoint.exact(name), value)
        assert checkpoint.sizes[name] == 24 * kind.itemsize
    assert torch.equal(checkpoint.read(NORM), norm)
    assert torch.equal(checkpoint.exact(NORM), norm)
    assert checkpoint.weight_of("lm_head") == HEAD


def test_a_tied_checkpoint_may_hold_the_head_instead_of_the_embedding(tmp_path: Path, values: dict[str, Tensor]) -> None:
    checkpoint = fused(values).checkpoint(stored(tmp_path, {HEAD: torch.zeros(6, 4)}))
    assert all(torch.equal(checkpoint.read(name), value) for name, value in values.items())


def test_stored_names_are_found(tmp_path: Path, values: dict[str, Tensor]) -> None:
    original = replace(
        stored(tmp_path, {"embed_tokens.weight": torch.zeros(6, 4)}), names=StoredNames(same={EMBEDDING: "embed_tokens.weight"})
    )
    checkpoint = fused(values).checkpoint(original)
    assert set(checkpoint) == {"embed_tokens.weight", HEAD}
    assert torch.equal(checkpoint.read("embed_tokens.weight"), values[EMBEDDING])


def test_parameters_stored_under_other_names_are_refused(tmp_path: Path, values: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match=r"lm_head\.weight is not in the checkpoint under this name.*--rotate none"):
        fused(values, tied=False).checkpoint(stored(tmp_path, {EMBEDDING: torch.zeros(6, 4)}))


def test_integers_are_refused(tmp_path: Path, values: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match="is stored as I8: expected one of F64, F32, F16, BF16"):
        fused(values).checkpoint(stored(tmp_path, {EMBEDDING: torch.zeros(6, 4, dtype=torch.int8)}))


def test_configuration_changes_only_where_the_head_was_tied(values: dict[str, Tensor]) -> None:
    original = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "hidden_size": 4}, "dtype": "bfloat16"}
    assert fused(values).config(original) == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False, "hidden_size": 4},
        "dtype": "bfloat16",
    }
    assert original["text_config"] == {"tie_word_embeddings": True, "hidden_size": 4}
    assert fused(values).config({"hidden_size": 4}) == {"hidden_size": 4, "tie_word_embeddings": False}
    assert fused(values, tied=False).config(original) == original


@pytest.mark.parametrize(("parts", "message"), [(("residual", "keys"), "'keys': expected some of residual, values"), ((), "are none")])
def test_unknown_parts_are_refused(parts: tuple[str, ...], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        fuse_rotation(small(), seed=0, parts=parts)


def test_sixteen_bit_models_are_refused() -> None:
    with pytest.raises(ModelError, match=r"is in torch.bfloat16: rotations are fused in float32"):
        fuse_rotation(small().bfloat16(), seed=0)


def small() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
