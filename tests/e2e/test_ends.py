"""Embedding and output head in few bits."""

from __future__ import annotations

import json

import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llama.files import save_model
from roundel.artifacts.checkpoints import load_written, read
from roundel.artifacts.work import open_work
from roundel.curvature.ends import end_moments
from roundel.errors import SchemeError
from roundel.models import Checkpoint, load_model
from roundel.models.ends import ends_of
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized
from roundel.stages import quantize as quantize_stage
from roundel.sweeps import HiddenStore, Layers
from roundel.sweeps.gradients import ENDS, gradient_visits
from roundel.types import TokenBatch

GIVEN = {"scheme": "q8_0", "format": "gguf", "sequences": 8, "seq_len": 32, "eval_sequences": 4, "sweeps": 1}
SIZED = {"scheme": "q4_k", "format": "gguf", "sequences": 8, "seq_len": 32, "eval_sequences": 4, "sweeps": 0, "curvature": "kfac"}


def rows(result) -> dict[str, dict]:
    return {row["end"]: row for row in result.details["layers"].values() if "end" in row}


def types(result) -> dict[str, str]:
    found = {each.name: each.tensor_type.name for each in GGUFReader(result.path / "model.gguf").tensors}
    return {name: found[name] for name in ("token_embd.weight", "output.weight") if name in found}


def test_by_default_as_llama_cpp_does(model, quantize, tmp_path) -> None:
    result = quantize(model("llama"), tmp_path / "out", **{**GIVEN, "scheme": "q4_0"})
    # 256 does not divide the width, so the head is no q6_k
    assert types(result) == {"token_embd.weight": "Q4_0", "output.weight": "Q8_0"}
    assert {role: row["scheme"] for role, row in rows(result).items()} == {"embedding": "q4_0", "head": "q8_0"}
    plain = quantize(model("llama"), tmp_path / "plain", **{**GIVEN, "scheme": "q4_0"}, embedding="none", head="none")
    assert types(plain) == {"token_embd.weight": "F16", "output.weight": "F16"}
    assert rows(plain) == {}
    assert result.details["bits_per_weight"]["model"] < 0.8 * plain.details["bits_per_weight"]["model"]
    assert plain.report.kl_mean < result.report.kl_mean


def test_what_is_measured_is_what_the_file_holds(model, quantize, tmp_path) -> None:
    source = model("llama")
    result = quantize(source, tmp_path / "out", **GIVEN, embedding="q4_0", head="q4_0", work=tmp_path / "work")
    again = quantize(source, tmp_path / "again", **GIVEN, embedding="q4_0", head="q4_0", work=tmp_path / "work")
    assert (tmp_path / "out/model.gguf").read_bytes() == (tmp_path / "again/model.gguf").read_bytes()
    assert again.report.kl_mean == result.report.kl_mean
    read_back = load_written(result.path, device=torch.device("cpu"), dtype=torch.float32)
    stored = {each.name: each for each in GGUFReader(result.path / "model.gguf").tensors}
    for name, module in (("token_embd.weight", read_back.get_input_embeddings()), ("output.weight", read_back.get_output_embeddings())):
        W = torch.tensor(dequantize(stored[name].data, stored[name].tensor_type))
        assert torch.equal(module.weight, W)


def test_a_tied_matrix_has_one_scheme(model, quantize, tmp_path) -> None:
    source = model("qwen3")
    result = quantize(source, tmp_path / "out", **GIVEN, head="q4_0")
    assert types(result) == {"token_embd.weight": "Q4_0"}
    assert list(rows(result)) == ["tied"]
    with pytest.raises(SchemeError, match="one matrix"):
        quantize(source, tmp_path / "other", **GIVEN, head="q4_0", embedding="q8_0")


def test_in_mlx_as_its_own_tools_do(model, quantize, tmp_path) -> None:
    given = {**GIVEN, "format": "mlx", "scheme": "int4-g32"}
    result = quantize(model("llama"), tmp_path / "out", **given)
    stored = read(result.path)
    assert {"model.embed_tokens", "lm_head"} < set(stored.rounded)
    read_back = load_written(result.path, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(read_back.get_output_embeddings().weight, dequantized(stored.rounded["lm_head"]))


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel"])
def test_a_packed_head_in_compressed_tensors(scheme, model, quantize, tmp_path) -> None:
    """Read by plain Transformers, and named by name, since vLLM's class of heads is not called Linear."""
    given = {**GIVEN, "scheme": "int4-g32", "format": "compressed-tensors"}
    result = quantize(model("llama"), tmp_path / "out", **given, head=scheme)
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert "lm_head" in [name for group in config["config_groups"].values() for name in group["targets"]]
    assert config["ignore"] == []
    stored = read(result.path).rounded
    assert stored["lm_head"].scheme == scheme
    plain = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
    ids = torch.arange(24).view(2, 12)
    own = load_model(model("llama"), device=torch.device("cpu"), dtype=torch.float32)
    for name, weight in stored.items():
        own.get_submodule(name).weight.data = dequantized(weight)
    assert torch.equal(plain(ids).logits, own(ids).logits)
    with pytest.raises(SchemeError, match="it is the embedding, too"):
        quantize(model("qwen3"), tmp_path / "tied", **given, head=scheme)


def test_tuning_leaves_them(model, quantize, tmp_path) -> None:
    given = {**GIVEN, "format": "mlx", "scheme": "int3-g32", "tune": "end-to-end", "tune_steps": 2, "tune_tokens": 64}
    before = read(quantize(model("llama"), tmp_path / "before", **{**given, "tune": "none"}).path).rounded
    after = read(quantize(model("llama"), tmp_path / "after", **given).path).rounded
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(before[name].codes, after[name].codes)


def test_what_no_engine_reads_is_refused() -> None:
    with pytest.raises(SchemeError, match="in 16 bits only"):
        Recipe.of(scheme="int4-g32", embedding="int4-g32")
    with pytest.raises(SchemeError, match="block types only"):
        Recipe.of(scheme="q4_0", format="gguf", head="int4-g32")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_moments_are_those_of_dense_gradients(name, model, tmp_path, exact) -> None:
    """`A` and `B` beside autograd through the whole model, for one batch."""
    path = model(name)
    net = load_model(path, device=torch.device("cpu"), dtype=torch.float32)
    tokens = TokenBatch.of(torch.randint(3, 200, (6, 12), generator=torch.Generator().manual_seed(1)))
    layers = Layers(net)
    with open_work(None, beside=tmp_path / "x", memory=None) as work:
        store = HiddenStore(memory=1 << 30, directory=work.path / "hidden")
        visits = gradient_visits(layers, {}, tokens, seed=3, labels="data", batch_size=1, store=store, ends=True)
        visit = next(visits)
        assert visit.index == ENDS
        found = end_moments(visit, layers, tokens, range(len(tokens)), seed=3)
        assert next(visits, None) is None
    embedding, head = net.get_input_embeddings(), net.get_output_embeddings()
    grads, inputs = [], []
    embedding.register_forward_hook(lambda _m, _a, out: (out.requires_grad_(True), out.retain_grad(), grads.append(out))[0])
    head.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach()))
    factor = embedding(torch.tensor([5])).detach().norm() / embedding.weight[5].norm()
    grads.clear()
    A = torch.zeros_like(found.embedding)
    for row in tokens.ids:
        logits = net(row[None], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], row[1:], reduction="sum").backward()
        g = grads[-1].grad[0]
        A += g.T @ g
    torch.testing.assert_close(found.embedding, A * factor**2 / tokens.ids.numel(), rtol=1e-3, atol=1e-3 * A.abs().max().item())
    h = torch.cat(inputs).flatten(0, 1)
    expected = h.T @ h / len(h)
    torch.testing.assert_close(found.head / found.head.trace(), expected / expected.trace(), rtol=1e-4, atol=1e-5)
    counts = torch.bincount(tokens.ids.flatten(), minlength=embedding.num_embeddings) + 1
    torch.testing.assert_close(found.share, counts / counts.sum())
    (end, *others) = ends_of(net, Checkpoint.open(path).of(net))
    assert [end.role, *(other.role for other in others)] == (["head"] if end.heads else ["embedding", "head"])
    blocks = list(found.factors(embeds=end.embeds, heads=end.heads))
    assert blocks[-1][0].stop == embedding.num_embeddings
    assert blocks[0][1].H_in.diagonal().mean().item() == pytest.approx(1)


def test_a_mix_and_what_stands_for_types_that_do_not_fit(quantize, tmp_path) -> None:
    source = save_model(tmp_path / "source", "llama", intermediate_size=320, num_hidden_layers=3)
    result = quantize(
        source, tmp_path / "out", **{key: value for key, value in GIVEN.items() if key not in ("scheme", "format")}, mix="q4_k_m"
    )
    found = {each.name: each.tensor_type.name for each in GGUFReader(result.path / "model.gguf").tensors}
    assert [found[f"blk.{layer}.attn_v.weight"] for layer in range(3)] == ["Q4_K", "Q4_K", "Q6_K"]
    assert [found[f"blk.{layer}.ffn_down.weight"] for layer in range(3)] == ["Q5_0", "Q5_0", "Q8_0"]  # 256 does not divide 320
    assert {found[f"blk.{layer}.{part}.weight"] for layer in range(3) for part in ("attn_q", "ffn_up")} == {"Q4_K"}
    assert (found["token_embd.weight"], found["output.weight"]) == ("Q4_K", "Q6_K")
    assert result.details["scheme"] == "q4_k_m"
    assert result.details["coverage"]["share"] == 1


@pytest.mark.parametrize("form", ["gguf", pytest.param("mlx", marks=pytest.mark.slow)])
def test_a_target_size_is_hit_from_below(form, quantize, tmp_path) -> None:
    source = save_model(tmp_path / "source", "llama-tied", num_hidden_layers=3)
    scheme = "q4_k" if form == "gguf" else "int4-g64"
    given = {"scheme": scheme, "format": form, "sequences": 8, "seq_len": 32, "eval_sequences": 4, "sweeps": 0, "curvature": "kfac"}
    result = quantize(source, tmp_path / "out", **given, target_size="500k" if form == "gguf" else "0.9M")
    target = 500_000 if form == "gguf" else 900_000
    if form == "gguf":
        size = (result.path / "model.gguf").stat().st_size
    else:
        size = sum(tensor.nbytes for tensor in load_file(result.path / "model.safetensors").values())
    assert 0.97 * target < size <= target
    allocated = result.details["allocation"]
    assert allocated["predicted_kl"] <= allocated["uniform"]["predicted_kl"]
    with pytest.raises(SchemeError, match="MB already; ask for more"):
        quantize(source, tmp_path / "small", **given, target_size="10k")
    with pytest.raises(SchemeError, match="goes without --bits"):
        Recipe.of(**given, target_size="1M", bits=4.0)


@pytest.mark.slow
def test_with_a_target_size_they_are_chosen_with_everything_else(quantize, tmp_path) -> None:
    """No worse, by the prediction, than what llama.cpp's rule for them leaves to the linears: the same drafts, the same bytes."""
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=1, initializer_range=0.05)
    given = {**SIZED, "target_size": "300k", "schemes": ("q2_k", "q4_k", "q8_0")}
    free = quantize(source, tmp_path / "free", **given)
    rule = {"embedding": "q4_k", "head": "q6_k"}
    ruled = quantize(source, tmp_path / "ruled", **given, **rule)
    for result in (free, ruled):
        assert 0.95 * 300_000 < (result.path / "model.gguf").stat().st_size <= 300_000
    ends = sum(row["predicted_kl"] for row in rows(ruled).values())
    assert free.details["allocation"]["predicted_kl"] <= ruled.details["allocation"]["predicted_kl"] + ends
    assert {row["scheme"] for row in rows(free).values()} <= {"q2_k", "q4_k", "q6_k", "q8_0"}
    assert {row["end"]: row["scheme"] for row in rows(ruled).values()} == rule


def test_an_end_that_is_given_leaves_the_other_to_be_chosen(quantize, tmp_path) -> None:
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=1)
    given = {**SIZED, "target_size": "500k", "schemes": ("q4_k", "q8_0"), "embedding": "none", "work": tmp_path / "work"}
    result = quantize(source, tmp_path / "out", **given)
    assert types(result)["token_embd.weight"] == "F16"
    assert list(rows(result)) == ["head"]
    assert (result.path / "model.gguf").stat().st_size <= 500_000
    again = quantize(source, tmp_path / "again", **given)
    assert (tmp_path / "again/model.gguf").read_bytes() == (result.path / "model.gguf").read_bytes()
    assert again.details["allocation"] == result.details["allocation"]


def test_too_few_bits_are_refused_before_the_work(quantize, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quantize_stage, "read_text", lambda *_args, **_settings: pytest.fail("text was read"))
    source = save_model(tmp_path / "source", "llama", num_hidden_layers=1)
    with pytest.raises(SchemeError, match=r"2\.500 bits a weight are fewer than the smallest schemes take, 2\.625"):
        quantize(source, tmp_path / "out", scheme="q4_k", format="gguf", bits=2.5)
