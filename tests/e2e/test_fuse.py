"""Fused rotations: the same function in another basis, on every architecture whose form allows it, and a refusal on the others."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from e2e import tiny
from roundel.errors import ModelError, SchemeError
from roundel.models import Checkpoint, load_model, locate
from roundel.models.fuse import FusedModel, fuse_rotation
from roundel.store import copy_files, write_json, write_shards

CPU = torch.device("cpu")
BOUND = 4e-6
"""Of the relative difference of logits by float32 rounding; measured: 0.3e-6 to 1.1e-6."""


def other(name: str, **settings: Any) -> PreTrainedModel:
    """A random model of an architecture that `tiny` does not have."""
    config = getattr(transformers, f"{name}Config")(**{**tiny.MODERN, **settings})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


SUPPORTED: dict[str, Callable[[], PreTrainedModel]] = {
    **{name: lambda name=name: tiny.make_model(name) for name in ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3")},
    "demo": lambda: load_model(locate("demo"), device=CPU, dtype=torch.float32),
    "biased": lambda: other("Llama", attention_bias=True, mlp_bias=True),
    "odd width": lambda: other("Llama", hidden_size=44, num_attention_heads=2, num_key_value_heads=1, head_dim=22),
    "scaled sums": lambda: other("Granite", residual_multiplier=0.3, embedding_multiplier=12.0, logits_scaling=3.0),
    "one plus weight": lambda: other("Gemma"),
}
POST_NORM, LAYER_NORM, EXPERTS = "normalises what a sublayer adds", "is a LayerNorm", "looks like a mixture of experts"
REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "gemma2": (lambda: tiny.make_model("gemma2"), POST_NORM),
    "gemma3": (lambda: tiny.make_model("gemma3"), POST_NORM),
    "olmo2": (lambda: other("Olmo2"), POST_NORM),
    "opt": (lambda: tiny.make_model("opt"), LAYER_NORM),
    "gpt-neox": (lambda: tiny.make_model("gpt-neox"), LAYER_NORM),
    "cohere": (lambda: other("Cohere"), r"\(CohereLayerNorm\) is no RMSNorm"),
    "olmo": (lambda: other("Olmo"), "does not begin with a norm of its input"),
    "mixtral": (lambda: other("Mixtral", num_local_experts=4), EXPERTS),
}


def logits(model: PreTrainedModel, seed: int = 7) -> Tensor:
    """Of tokens that `fuse_rotation` does not use."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, model.get_input_embeddings().num_embeddings, (3, 40), generator=generator)
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def apart(after: Tensor, before: Tensor) -> float:
    return ((after - before).norm() / (before - before.mean(-1, keepdim=True)).norm()).item()


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().double().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_function_is_the_same_and_the_weights_are_not(name: str) -> None:
    model = SUPPORTED[name]()
    before, original, tied = logits(model), weights(model), model.config.tie_word_embeddings
    fused = fuse_rotation(model, seed=3)
    assert apart(logits(model), before) < BOUND
    assert 0 < fused.difference < BOUND
    changed = {key for key, value in weights(model).items() if not torch.equal(value, original[key])}
    assert changed == {key for key in fused.overlay if not torch.equal(fused.overlay[key].double(), original[key])}
    kept = ("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias")
    assert original.keys() - changed == {key for key in original if key.endswith(kept)}
    assert (fused.untied is not None) == tied
    assert not model.config.tie_word_embeddings
    assert fused.as_json()["added_parameters"] == (model.lm_head.weight.numel() if tied else 0)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
def test_each_tensor_is_what_the_formula_says(name: str) -> None:
    """With `Q` read off the embedding."""
    model = tiny.make_model(name)
    old = weights(model)
    fuse_rotation(model, seed=0, parts=["residual"])
    new = weights(model)
    Q = torch.linalg.lstsq(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"]).solution.T
    torch.testing.assert_close(Q @ Q.T, torch.eye(tiny.WIDTH, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(Q.abs(), torch.full_like(Q, tiny.WIDTH**-0.5), atol=1e-5, rtol=0)  # 64 is a power of two
    for key, value in new.items():
        expected = old[key]
        layer = key[: len("model.layers.0.")]
        if "norm" in key:
            expected = torch.ones_like(value)
        elif key == "lm_head.weight":
            expected = old[key] * old["model.norm.weight"] @ Q.T
        elif key.endswith(("o_proj.weight", "down_proj.weight")):
            expected = Q @ old[key]
        elif key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            expected = old[key] * old[f"{layer}input_layernorm.weight"] @ Q.T
        elif key.endswith(("gate_proj.weight", "up_proj.weight")):
            expected = old[key] * old[f"{layer}post_attention_layernorm.weight"] @ Q.T
        elif key == "model.embed_tokens.weight":
            continue
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5, msg=key)


def test_values_share_one_rotation_in_each_group_of_heads() -> None:
    model = other("Llama", attention_bias=True)  # four heads of queries, two of values
    old = weights(model)
    fused = fuse_rotation(model, seed=0, parts=["values"])
    new = weights(model)
    rotations = []
    for layer in range(tiny.LAYERS):
        prefix = f"model.layers.{layer}.self_attn"
        O, O_new = (w[f"{prefix}.o_proj.weight"].unflatten(1, (4, 16)) for w in (old, new))
        V, V_new = (
            torch.cat([w[f"{prefix}.v_proj.weight"], w[f"{prefix}.v_proj.bias"][:, None]], 1).unflatten(0, (2, 16)) for w in (old, new)
        )
        for head in range(4):
            P = torch.linalg.lstsq(O[:, head], O_new[:, head]).solution.T
            torch.testing.assert_close(P @ P.T, torch.eye(16, dtype=torch.float64), atol=1e-5, rtol=0)
            torch.testing.assert_close(P @ V[head // 2], V_new[head // 2], atol=1e-5, rtol=0)
            rotations.append(P)
    assert all((a - b).abs().max() > 0.1 for k, a in enumerate(rotations[::2]) for b in rotations[::2][:k])  # each head has its own
    assert set(fused.overlay) == {
        f"model.layers.{k}.self_attn.{part}" for k in (0, 1) for part in ("v_proj.weight", "v_proj.bias", "o_proj.weight")
    }


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_untouched(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    before, tied = weights(model), model.config.tie_word_embeddings
    with pytest.raises(SchemeError, match=reason) as caught:
        fuse_rotation(model, seed=0)
    assert "--rotate none" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    assert model.config.tie_word_embeddings == tied


def test_what_reads_the_stream_otherwise_is_noticed() -> None:
    """Here it depends on coordinates, but only of texts of several tokens, which the search for the structure does not see."""
    model = tiny.make_model("llama")

    def first_channel_is_special(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return output if output.shape[1] == 1 else output * torch.cat([torch.tensor([1.5]), torch.ones(tiny.WIDTH - 1)])

    model.model.layers[0].register_forward_hook(first_channel_is_special)
    with pytest.raises(ModelError, match=r"change its logits by .*--rotate none"):
        fuse_rotation(model, seed=0)


def test_gates_on_values_are_refused_but_the_stream_can_be_rotated() -> None:
    def gate(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * torch.linspace(0.5, 1, args[0].shape[-1]),)

    def gated() -> PreTrainedModel:
        model = tiny.make_model("llama")
        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(gate)
        return model

    with pytest.raises(SchemeError, match=r"in model\.layers\.1 the rows of the values of each head were not found"):
        fuse_rotation(gated(), seed=0)
    assert fuse_rotation(gated(), seed=0, parts=["residual"]).difference < BOUND


def test_outliers_of_a_channel_are_spread() -> None:
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 30
        model.model.layers[0].mlp.down_proj.weight[9] *= 30

    def kurtosis(weight: Tensor) -> float:
        return (weight.double().pow(4).mean() / weight.double().pow(2).mean().square()).item()

    layer = model.model.layers[0]
    folded = [layer.self_attn.q_proj.weight * layer.input_layernorm.weight, layer.mlp.down_proj.weight]
    assert all(kurtosis(weight) > 20 for weight in folded)
    fuse_rotation(model, seed=0)
    assert all(kurtosis(linear.weight) < 5 for linear in (layer.self_attn.q_proj, layer.mlp.down_proj))


def test_the_seed_alone_decides() -> None:
    first, again, different = (fuse_rotation(tiny.make_model("llama"), seed=seed).overlay for seed in (0, 0, 1))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert all("norm" in key or not torch.equal(value, different[key]) for key, value in first.items())


def write(fused: FusedModel, source: Path, target: Path) -> Path:
    """As a stage that knows nothing of rotations writes a checkpoint."""
    checkpoint = fused.checkpoint(Checkpoint.open(source))
    target.mkdir()
    copy_files(source, target, leave_out={"config.json"})
    write_shards(target, checkpoint.sizes, lambda name: {name: checkpoint.read(name)})
    write_json(target / "config.json", fused.config(json.loads((source / "config.json").read_text(encoding="utf-8"))))
    return target


@pytest.mark.parametrize(
    ("name", "kind", "bound"), [("qwen3", torch.float32, BOUND), ("qwen2", torch.bfloat16, 2e-2), ("llama-tied", torch.bfloat16, 2e-2)]
)
def test_the_overlay_makes_an_ordinary_checkpoint(
    model: Callable[..., Path], tmp_path: Path, name: str, kind: torch.dtype, bound: float
) -> None:
    source = model(name, dtype=kind)
    loaded = load_model(source, device=CPU, dtype=torch.float32)
    before = logits(loaded)
    written = write(fuse_rotation(loaded, seed=0), source, tmp_path / "fused")
    assert {Checkpoint.open(written).read(key).dtype for key in Checkpoint.open(written)} == {kind}
    again = load_model(written, device=CPU, dtype=torch.float32)
    assert apart(logits(again), before) < bound
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_a_fused_model_is_copied_and_saved_by_transformers(tmp_path: Path) -> None:
    model = tiny.make_model("qwen3")
    before = logits(model)
    fuse_rotation(model, seed=0)
    assert apart(logits(copy.deepcopy(model)), before) < BOUND
    model.save_pretrained(tmp_path)
    assert apart(logits(load_model(tmp_path, device=CPU, dtype=torch.float32)), before) < BOUND
