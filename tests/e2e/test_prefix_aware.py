"""Each linear makes up for the errors of those rounded before: less loss on other text, for every kind of grid, factors and model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, ZambaConfig, ZambaForCausalLM

import roundel
from e2e import tiny
from e2e.test_experts import configuration
from roundel.artifacts.checkpoints import read
from roundel.grids import parse_scheme
from roundel.models import load, load_model
from roundel.rounding import nearest
from roundel.rounding.prefix import Strengths
from roundel.rounding.round import dequantized
from roundel.stages.rounding import sweep
from roundel.sweeps import HiddenStore, Layers
from roundel.types import RoundedWeight, TokenBatch

SETTINGS: dict[str, Any] = {
    "curvature": "kfac",
    "sweeps": 1,
    "sequences": 16,
    "eval_sequences": 4,
    "prefix_aware": True,
    "prefix_sequences": 32,
    "natural_places": 0,
}


@pytest.fixture(scope="module")
def much_text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("much") / "text.txt"
    path.write_text(tiny.make_text(60_000))
    return str(path)


def rows(result) -> list[bool]:
    """Which linears were rounded to other targets than their own weights."""
    linears = [row for row in result.details["layers"].values() if "end" not in row]
    assert all(row.get("prefix_aware", True) is True for row in linears)
    return ["prefix_aware" in row for row in linears]


def same(first, second) -> bool:
    one, two = ((result.path / "model.safetensors").read_bytes() for result in (first, second))
    return one == two


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt-neox", marks=pytest.mark.slow)])
def test_the_loss_on_other_text_falls(name: str, model, quantize, tmp_path, much_text) -> None:
    """In GPT-NeoX attention and MLP are added to the stream in parallel."""
    text = {"calibration": much_text, "sequences": 128, "seq_len": 64, "eval_sequences": 24}
    given = {**SETTINGS, **text, "scheme": "int2-g16", "prefix_sequences": 128}
    plain = quantize(model(name), tmp_path / "plain", **{**given, "prefix_aware": False})
    aware = quantize(model(name), tmp_path / "aware", **given)
    assert aware.report.kl_mean < 0.9 * plain.report.kl_mean
    assert aware.details["bits_per_weight"] == plain.details["bits_per_weight"]
    assert all(rows(aware))
    assert not any(rows(plain))
    assert aware.details["predicted_kl"]["by"] == "joint"
    assert plain.details["predicted_kl"]["by"] == "total"
    if name == "llama":
        default = quantize(model(name), tmp_path / "default", **{**given, "prefix_aware": None})  # 8192 tokens are enough
        assert same(default, aware)


def test_both_corrections_and_the_inputs_that_are_met_change_the_codes(model, quantize, tmp_path) -> None:
    given = {**SETTINGS, "scheme": "int3-g16"}
    results = [quantize(model(), tmp_path / "plain", **{**given, "prefix_aware": False})]
    for prefix, stream in ((0.0, 0.0), (0.0, 0.7), (0.7, 0.0), (0.7, 0.7)):
        strengths = {"prefix_strength": prefix, "stream_strength": stream}
        results.append(quantize(model(), tmp_path / f"{prefix} {stream}", **given, **strengths))
    assert not any(same(first, second) for first, second in itertools.combinations(results, 2))


KINDS = [
    ("trellis2-s6", {"rotate": "online", "include": ("*.v_proj",)}),
    ("int3-g16-asym", {"curvature": "guided:groups=2"}),
    ("int3-g16", {"rotate": "fused"}),
    ("nvfp4", {}),
]
MORE_KINDS = [
    ("lattice2", {"include": ("*.v_proj", "*.k_proj")}),
    ("mxfp4", {}),
    ("q4_0", {"format": "native"}),
    ("int3-g16", {"format": "dense"}),
]


@pytest.mark.parametrize(("scheme", "settings"), [*KINDS, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in MORE_KINDS)], ids=str)
def test_every_grid_and_every_kind_of_factors(model, quantize, tmp_path, scheme: str, settings: dict[str, Any]) -> None:
    given = {**SETTINGS, "scheme": scheme, **settings}
    plain = quantize(model(), tmp_path / "plain", **{**given, "prefix_aware": False})
    aware = quantize(model(), tmp_path / "aware", **given)
    assert all(rows(aware))
    assert not same(plain, aware)
    assert 0 < aware.report.kl_mean < 1.2 * plain.report.kl_mean  # sixteen sequences are few
    assert aware.details["bits_per_weight"] == plain.details["bits_per_weight"]


@pytest.mark.parametrize("scheme", ["q4_k", pytest.param("q3_k", marks=pytest.mark.slow)])
def test_blocks_of_256(scheme: str, quantize, tmp_path) -> None:
    """Which need wider matrices."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**tiny.MODERN, **sizes})).save_pretrained(tmp_path / "model")
    tiny.make_tokenizer(starts=False).save_pretrained(tmp_path / "model")
    result = quantize(tmp_path / "model", tmp_path / "out", **{**SETTINGS, "scheme": scheme})
    assert all(rows(result))
    assert result.details["format"] == "gguf"
    assert 0 < result.report.kl_mean < 1


def test_in_bfloat16(model, quantize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(load, "multiplies_bfloat16", lambda: True)
    result = quantize(model(dtype=torch.bfloat16), tmp_path / "out", **SETTINGS, scheme="int4-g16", dtype="bfloat16")
    assert all(rows(result))
    assert 0 < result.report.kl_mean < 1


def test_a_processor_without_bfloat16_runs_the_model_in_float32(model, quantize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(load, "multiplies_bfloat16", lambda: False)
    own, asked = (
        quantize(model(dtype=torch.bfloat16), tmp_path / kind, **SETTINGS, scheme="int4-g16", dtype=kind)
        for kind in ("float32", "bfloat16")
    )
    assert same(own, asked)
    assert any("no products in bfloat16" in warning for warning in asked.details["warnings"])
    assert own.details["warnings"] == [warning for warning in asked.details["warnings"] if "no products in bfloat16" not in warning]


def test_no_batch_size_changes_the_codes(model, quantize, tmp_path) -> None:
    first, second = (quantize(model(), tmp_path / str(size), **SETTINGS, scheme="int3-g16", batch_size=size) for size in (1, 5))
    assert same(first, second)


@pytest.mark.slow
def test_with_bits_for_each_linear(model, quantize, tmp_path) -> None:
    given = {**SETTINGS, "sequences": 64, "seq_len": 16, "scheme": "int3-g16", "bits": 4.8}
    plain = quantize(model(), tmp_path / "plain", **{**given, "prefix_aware": False})
    aware = quantize(model(), tmp_path / "aware", **given)
    assert all(rows(aware))
    schemes = [{name: row["scheme"] for name, row in result.details["layers"].items()} for result in (plain, aware)]
    assert schemes[0] == schemes[1]
    assert len(set(schemes[0].values())) > 1
    assert plain.details["allocation"] == aware.details["allocation"]
    assert not same(plain, aware)


@pytest.mark.parametrize("method", ["end-to-end", pytest.param("blocks", marks=pytest.mark.slow)])
def test_tuning_starts_from_there(method: str, model, quantize, tmp_path) -> None:
    given = {**SETTINGS, "sequences": 24, "eval_sequences": 6, "scheme": "int3-g16"}
    tuned = quantize(model(), tmp_path / "tuned", **given, tune=method, tune_steps=2, tune_tokens=128)
    assert all(rows(tuned))
    plain = quantize(model(), tmp_path / "plain", **{**given, "prefix_aware": False}, tune=method, tune_steps=2, tune_tokens=128)
    befores = [result.details["tuning"]["held_out_kl"]["before"] for result in (tuned, plain)]
    assert befores[0] != befores[1]


def saved(model: torch.nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    tiny.make_tokenizer(starts=False).save_pretrained(directory)
    return directory


class Routed(torch.nn.Module):
    """A mixture of two experts of linears, each of which sees the tokens that are its own."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        chosen = flat[:, 0] > 0
        out = torch.zeros_like(flat)
        out[chosen] = self.down_proj(self.act_fn(self.gate_proj(flat[chosen])) * self.up_proj(flat[chosen]))
        return out.view_as(x)


def test_experts_are_rounded_to_their_own_weights() -> None:
    """Linears that are given some tokens only; attention and what reads all of them is corrected in the same layer."""
    model = tiny.make_model("llama")
    model.model.layers[1].mlp = Routed(model.model.layers[1].mlp)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    ids = torch.randint(5, 250, (6, 24), generator=torch.Generator().manual_seed(0))
    rounded = swept(model, linears, ids)
    moved = {name for name, target in rounded.items() if target is not None}
    assert moved == {name for name in linears if ".mlp." not in name or "layers.0" in name}


def swept(model: torch.nn.Module, linears: dict[str, torch.nn.Linear], ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Targets of a sweep that rounds to multiples of 0.1."""
    grid, targets = parse_scheme("int4-channel"), {}

    def together(_index, names, wanted, _moments):
        found = {}
        own = wanted(names)
        for name in names:
            targets[name] = own.get(name)
            W = own.get(name, linears[name].weight.detach())
            scales = grid.fit_scales(W, torch.ones(W.shape[1]), torch.float16)
            found[name] = RoundedWeight(scheme=grid.name, codes=nearest(W, grid, scales), scales=scales, shape=tuple(W.shape))
        return found

    strengths = Strengths(prefix=0.7, stream=0.5, damping=0.1)
    prefix = sweep.Prefix(tokens=TokenBatch.of(ids), strengths=strengths)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in sweep.rounding_sweep(Layers(model), linears, together, prefix, batch_size=2, store=HiddenStore(memory=1 << 30)):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return targets


def test_a_mixture_whose_experts_are_fused(quantize, tmp_path) -> None:
    """Attention is corrected for; experts, which see some of the tokens, are rounded to their own weights."""
    torch.manual_seed(0)
    tokens = len(tiny.make_tokenizer(starts=False))
    source = saved(AutoModelForCausalLM.from_config(configuration("mixtral", tokens)), tmp_path / "model")
    result = quantize(source, tmp_path / "out", **SETTINGS, scheme="int3-g16")
    layers = result.details["layers"]
    assert len(layers) == 8 + 24
    assert all(bool(row.get("prefix_aware")) == (".experts." not in name) for name, row in layers.items())
    assert 0 < result.report.kl_mean < 1


@pytest.fixture
def together(monkeypatch) -> None:
    """Decoder layers that cannot be run one by one: all are one group."""
    verified = Layers.verified

    def alone(self: Layers) -> bool:
        return len(self.groups) == 1 and verified(self)

    monkeypatch.setattr(Layers, "verified", alone)


@pytest.mark.usefixtures("together")
def test_layers_that_cannot_be_run_one_by_one_are_corrected_all_the_same(model, quantize, tmp_path, monkeypatch) -> None:
    """To the same bytes as one by one, resumed or not."""
    given = {**SETTINGS, "scheme": "int3-g16"}
    once = quantize(model(), tmp_path / "together", **given)
    assert all(rows(once))
    assert [path.name for path in _work(quantize, model(), tmp_path, given).glob("rounded/*")] == ["0000.safetensors"]
    monkeypatch.undo()
    apart = quantize(model(), tmp_path / "apart", **given)
    one, two = (load_file(result.path / "model.safetensors") for result in (once, apart))
    assert one.keys() == two.keys()
    assert once.report.kl_mean == pytest.approx(apart.report.kl_mean, rel=0.05)


def _work(quantize, source: Path, place: Path, given: dict[str, Any]) -> Path:
    quantize(source, place / "kept", **given, work=place / "work")
    return place / "work"


@pytest.mark.slow
def test_a_block_that_several_layers_share(quantize, text, tmp_path) -> None:
    """Zamba's attention: one set of weights that is used by several layers."""
    config = ZambaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        attention_hidden_size=128,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        num_hidden_layers=6,
        attn_layer_period=3,
        attn_layer_offset=2,
        mamba_d_state=8,
        mamba_expand=2,
        n_mamba_heads=2,
        mamba_dt_rank=8,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    source = saved(ZambaForCausalLM(config), tmp_path / "model")
    given = {**SETTINGS, "scheme": "int4-g32"}
    loaded = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    shared = [loaded.model.layers[index].shared_transf.feed_forward.up_proj.weight for index in (2, 5)]
    assert shared[0] is shared[1]
    assert len(Layers(loaded)) == 1
    few = {"sequences": 4, "seq_len": 16, "format": "dense", "eval_data": str(text), "prefix_sequences": 4, "natural_places": 0}
    result = quantize(source, tmp_path / "out", **{**given, **few})
    assert all(rows(result))
    again = roundel.evaluate(result.path, reference=source, data=str(text), sequences=4, seq_len=16).report
    assert result.report.kl_mean == pytest.approx(again.kl_mean, rel=1e-4)  # also where the block is used again


def test_what_is_written_is_what_was_rounded(model, quantize, tmp_path) -> None:
    """The proxy loss of a row is that of the error to the stored weight, not to the target."""
    result = quantize(model(), tmp_path / "out", **SETTINGS, scheme="int2-g16")
    original = load_model(model(), device=torch.device("cpu"), dtype=torch.float32)
    stored = read(result.path).rounded
    for name, row in result.details["layers"].items():
        error = (original.get_submodule(name).weight.detach() - dequantized(stored[name])).norm()
        assert 0 < error < 0.9 * original.get_submodule(name).weight.norm()
        assert row["proxy_loss"] > 0
    assert json.loads((result.path / "roundel.json").read_text())["recipe"]["prefix_aware"] is True
