"""Mixtures of experts: every expert's matrices are linears of their own, however Transformers stores and runs them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

import roundel
from e2e import tiny
from roundel.artifacts.checkpoints import read
from roundel.errors import SchemeError
from roundel.models.experts import Part, SplitExperts, join_experts, parts_of, split_experts
from roundel.models.load import load_model
from roundel.rounding.round import dequantized
from roundel.stages.rounding import natural

Quantize = Callable[..., roundel.Quantized]
CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
HYBRID = {
    "layers_block_type": ["mamba", "moe"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "ssm_state_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}


def configuration(name: str, vocabulary: int) -> PreTrainedConfig:
    given = {**SMALL, "vocab_size": vocabulary}
    few = {"num_experts_per_tok": 2, "head_dim": 16}
    match name:
        case "mixtral":  # stored one by one under other names
            return MixtralConfig(**given, num_local_experts=4)
        case "qwen3-moe":  # stored one by one
            return Qwen3MoeConfig(**given, **few, num_experts=4, moe_intermediate_size=32)
        case "deepseek-v3":  # latent attention, one dense layer, shared experts
            return DeepseekV3Config(**{**given, **LATENT})
        case "nemotron-h":  # no gate
            return NemotronHConfig(**{**given, **HYBRID})
        case "llama4":  # stored together, transposed; each expert is given all tokens
            return Llama4TextConfig(**given, **few, intermediate_size_mlp=96, num_local_experts=4, attention_chunk_size=64)
    # stored together, transposed, halves interleaved, with biases
    return GptOssConfig(**{**given, "intermediate_size": 64}, **few, num_local_experts=4, sliding_window=16)


EXPERTS = {
    "mixtral": 2 * 4 * 3,
    "qwen3-moe": 2 * 4 * 3,
    "deepseek-v3": 4 * 3,
    "nemotron-h": 4 * 2,
    "llama4": 2 * 4 * 3,
    "gpt-oss": 2 * 4 * 3,
}


def original(name: str, vocabulary: int = 300) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(name, vocabulary))
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if own.endswith("bias") or "sinks" in own:
                parameter.normal_(std=0.1)
        if name == "deepseek-v3":
            model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -1e4  # the last expert gets no token
    return model.eval()


@pytest.fixture(scope="module", params=EXPERTS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, path = tiny.make_tokenizer(starts=False), tmp_path_factory.mktemp("source") / request.param
    original(request.param, len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 43).view(2, 20), use_cache=False).logits


@pytest.mark.parametrize("name", EXPERTS)
def test_split_experts_compute_the_same_and_join_again(name: str) -> None:
    model = original(name)
    wanted, kept = logits(model), {own: value.clone() for own, value in model.state_dict().items()}
    split_experts(model)
    split = [module for module in model.modules() if isinstance(module, SplitExperts)]
    assert sum(len(parts_of(module)) for module in split) == EXPERTS[name]
    assert not any(parameter.ndim == 3 for own, parameter in model.named_parameters() if "experts" in own)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    for module in split:
        join_experts(module)
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(value, kept[own]) for own, value in model.state_dict().items())
    assert torch.equal(logits(model), wanted)


def fused(model: torch.nn.Module, linear: str) -> torch.Tensor:
    """An expert's weight in a model that Transformers has loaded."""
    owner, expert, projection = linear.rsplit(".", 2)
    twin = model.get_submodule(owner)
    stack = "gate_up_proj" if hasattr(twin, "gate_up_proj") and projection != "down_proj" else projection
    whole = twin.get_parameter(stack)
    half = whole.shape[2 if twin.is_transposed else 1] // 2
    sides = (slice(0, half), slice(half, None)) if twin.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
    rows = sides[projection == "up_proj"] if stack == "gate_up_proj" else slice(None)
    return Part(stack=stack, expert=int(expert), rows=rows, transposed=twin.is_transposed).of(whole)


def test_all_experts_are_quantized_and_read_back(source: Path, quantize: Quantize, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "out", scheme="int4-g32", memory="1K" if source.name == "mixtral" else None)
    layers = result.details["layers"]
    experts = [name for name in layers if ".experts." in name]
    assert len(experts) == EXPERTS[source.name]
    assert result.details["coverage"]["share"] > 0.95
    assert 0 < result.report.kl_mean < 1
    together = source.name == "gpt-oss"
    assert result.details["format"] == ("native" if together else "compressed-tensors")
    assert any("Transformers finds no experts of" in line for line in result.details["warnings"]) == together
    stored, loaded = read(result.path).rounded, load_model(result.path, device=CPU, dtype=torch.float32)
    assert stored.keys() == layers.keys()
    for name in experts:
        weight = (
            loaded.get_submodule(name).dequantized()
            if together
            else fused(loaded, name)
            if source.name != "llama4"
            else loaded.get_submodule(name).weight
        )
        # Transformers multiplies codes and scales of experts in the scales' 16 bits
        torch.testing.assert_close(weight, dequantized(stored[name]), rtol=0 if together else 2**-10, atol=0 if together else 1e-6)
    before, after = load_file(source / "model.safetensors"), load_file(result.path / "model.safetensors")
    quantized = {row["tensor"] for row in layers.values()}
    whole = {name for name in before if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))}
    for name in before.keys() - quantized - whole:
        assert torch.equal(before[name], after[name])
    assert whole.isdisjoint(after)


def test_an_expert_without_a_token_takes_the_curvature_of_the_others(source: Path, quantize: Quantize, tmp_path: Path) -> None:
    if source.name != "deepseek-v3":
        pytest.skip("its router leaves out none")
    result = quantize(source, tmp_path / "out", scheme="int3-g32")
    rows = {name.rpartition(".")[2]: row for name, row in result.details["layers"].items() if ".experts.3." in name}
    assert rows.keys() == {"gate_proj", "up_proj", "down_proj"}
    for row in rows.values():
        assert (row["text_rows"], row["borrowed"], row["predicted_kl"]) == (0, 1.0, 0.0)
        assert 0 < row["proxy_loss"] < 1
    others = [row for name, row in result.details["layers"].items() if ".experts.0." in name]
    assert all(row["text_rows"] > 0 and row["borrowed"] < 1 for row in others)
    (warning,) = (line for line in result.details["warnings"] if "rows a column" in line)
    assert "saw fewer than 4 rows a column" in warning


@pytest.mark.parametrize("form", ["native", pytest.param("dense", marks=pytest.mark.slow), "gptq"])
def test_other_formats(source: Path, form: str, quantize: Quantize, tmp_path: Path) -> None:
    if (source.name, form) == ("nemotron-h", "gptq"):
        pytest.skip("its widths do not fill GPTQ's words")
    result = quantize(source, tmp_path / "out", scheme="int4-g32", format="native")
    if source.name in ("gpt-oss", "llama4") and form == "dense":
        for write in (
            lambda: roundel.export(result.path, to=form, output=tmp_path / form),
            lambda: quantize(source, tmp_path / form, scheme="int4-g32", format=form),
        ):
            with pytest.raises(SchemeError, match="stores all experts of a layer in one tensor"):
                write()
        return
    wanted = {name: dequantized(weight) for name, weight in read(result.path).rounded.items()}
    if form != "native":
        roundel.export(result.path, to=form, output=tmp_path / form)
    if form == "gptq":
        names = load_file(tmp_path / form / "model.safetensors")
        assert sum(name.endswith(".qweight") for name in names) == len(wanted)
        return
    loaded = load_model(tmp_path / ("out" if form == "native" else form), device=CPU, dtype=torch.float32)
    if form == "dense":
        split_experts(loaded)
    for name, weight in wanted.items():
        module = loaded.get_submodule(name)
        assert torch.equal(module.dequantized() if form == "native" else module.weight, weight)


@pytest.mark.parametrize("places", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_experts_among_prefix_aware_linears_and_natural_steps(
    places: int, source: Path, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source.name not in ("deepseek-v3", "llama4"):
        pytest.skip("the others differ in nothing that rounding sees")
    if (source.name, places) == ("llama4", 0):
        pytest.skip("what differs are the steps")
    monkeypatch.setattr(natural, "STEP_TOKENS", 64)
    given = {"scheme": "int3-g32", "prefix_aware": True, "natural_places": places, "prefix_sequences": 12}
    result = quantize(source, tmp_path / "out", **given, memory="1K")
    aware = {name for name, row in result.details["layers"].items() if row.get("prefix_aware")}
    assert {name for name in result.details["layers"] if "self_attn" in name} <= aware
    assert any(".experts." in name for name in aware) == bool(places)  # by their targets; steps move them like all others
    assert 0 < result.report.kl_mean < 1
    again = quantize(source, tmp_path / "again", **given)
    assert (again.path / "model.safetensors").read_bytes() == (result.path / "model.safetensors").read_bytes()


def test_tuned_end_to_end(source: Path, quantize: Quantize, tmp_path: Path) -> None:
    if source.name not in ("mixtral", "gpt-oss", "llama4"):
        pytest.skip("the others differ in nothing that tuning sees")
    result = quantize(source, tmp_path / "out", scheme="int3-g32", tune="end-to-end", tune_steps=2, tune_tokens=64)
    kl = result.details["tuning"]["held_out_kl"]
    assert 0 < kl["after"] <= kl["before"]


def test_a_layer_of_which_no_expert_fits_stays_whole(source: Path, quantize: Quantize, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "out", scheme="int4-g32", exclude=("*.experts.*",))
    reasons = {reason for name, reason in result.details["skipped"].items() if name.endswith(".experts")}
    assert reasons == (set() if source.name == "llama4" else {"excluded by pattern"})
    loaded = load_model(result.path, device=CPU, dtype=torch.float32)
    model = load_model(source, device=CPU, dtype=torch.float32)
    if source.name == "llama4":  # which Transformers has one by one
        split_experts(model)
    for name, parameter in model.named_parameters():
        if ".experts." in name and "shared" not in name:
            assert torch.equal(loaded.get_parameter(name), parameter)
    assert "of the decoder layers' matrices are quantized; most of the rest" in "".join(result.details["warnings"])


def test_experts_of_several_schemes_are_written_where_transformers_reads_them(source: Path, quantize: Quantize, tmp_path: Path) -> None:
    if source.name != "qwen3-moe":
        pytest.skip("one is enough")
    result = quantize(source, tmp_path / "out", bits=4.75, schemes=("int4-g32", "int5-g32"))
    assert result.details["format"] == "native"
    assert any("decodes all experts in one scheme" in warning for warning in result.details["warnings"])
    assert len({row["scheme"] for row in result.details["layers"].values()}) == 2
    loaded = load_model(result.path, device=CPU, dtype=torch.float32)
    for name, weight in read(result.path).rounded.items():
        assert torch.equal(loaded.get_submodule(name).dequantized(), dequantized(weight))


def test_a_part_of_the_experts_is_written_where_transformers_reads_it(source: Path, quantize: Quantize, tmp_path: Path) -> None:
    if source.name != "mixtral":
        pytest.skip("one is enough")
    result = quantize(source, tmp_path / "out", scheme="int4-g32", exclude=("*.experts.*.down_proj",))
    assert result.details["format"] == "native"
    assert any("all matrices of a layer's experts packed or none" in warning for warning in result.details["warnings"])
    loaded = load_model(result.path, device=CPU, dtype=torch.float32)
    kept = load_model(source, device=CPU, dtype=torch.float32)
    split_experts(kept)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert torch.equal(loaded.get_parameter(name), kept.get_parameter(name))


def test_experts_that_vllm_refuses_are_warned_of(source: Path, quantize: Quantize, tmp_path: Path) -> None:
    if source.name != "mixtral":
        pytest.skip("one is enough")
    result = quantize(source, tmp_path / "out", scheme="fp8")
    assert result.details["format"] == "compressed-tensors"
    assert any("vLLM refuses experts in fp8" in warning for warning in result.details["warnings"])


def test_transformers_has_the_very_experts_in_16_bits(source: Path, quantize: Quantize, tmp_path: Path) -> None:
    """It decodes them in 16 bits whatever the model's type: in bfloat16 that is each weight, rounded once."""
    if source.name != "qwen3-moe":
        pytest.skip("one is enough")
    path = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(path)
    tiny.make_tokenizer(starts=False).save_pretrained(path)
    result = quantize(path, tmp_path / "out", scheme="int4-g32")
    assert result.details["format"] == "compressed-tensors"
    loaded = load_model(result.path, device=CPU, dtype=torch.bfloat16)
    split_experts(loaded)
    for name, weight in read(result.path).rounded.items():
        assert torch.equal(loaded.get_submodule(name).weight, dequantized(weight).bfloat16()), name
