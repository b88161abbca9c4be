"""GGUF files of whole models: every tensor holds our values bit for bit, and Transformers' own reader makes of them the dense model."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llama.files import DEEP, MIXTURES, MODELS, OTHERS, ROWS, nearest, save_model, write
from roundel.artifacts.checkpoints import load_written
from roundel.errors import ModelError, SchemeError
from roundel.formats.gguf import check_linears, check_model, check_tokenizer, read
from roundel.formats.gguf import write as write_gguf
from roundel.formats.gguf_blocks import PACKERS
from roundel.models import locate
from roundel.recipes import NEAREST

EQUAL = {"qwen35": {"linear_num_value_heads": 4}, "qwen35-alike": {"linear_num_key_heads": 4, "linear_num_value_heads": 4}}
"""Settings with which the values of linear attention are 256 wide."""
IDS = torch.randint(0, ROWS, (2, 40), generator=torch.Generator().manual_seed(0))


def mixed(start: int = 0) -> Any:
    """Every type in turn, and none; where 256 do not divide the width, one with blocks of 32."""
    kinds = itertools.cycle([*PACKERS, None])

    def choose(_name: str, linear: nn.Linear) -> str | None:
        kind = next(kinds)
        columns = 1 if kind is None else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]][0]
        return kind if linear.in_features % columns == 0 else "iq4_nl"

    for _ in range(start):
        next(kinds)
    return choose


def tensors(path: Path) -> dict[str, Tensor]:
    return {each.name: torch.tensor(gguf.dequantize(each.data, each.tensor_type)) for each in gguf.GGUFReader(path).tensors}


def kinds(path: Path) -> dict[str, str]:
    return {each.name: each.tensor_type.name.lower() for each in gguf.GGUFReader(path).tensors}


def metadata(path: Path) -> dict[str, Any]:
    return {name: each.contents() for name, each in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_model(tmp_path_factory.mktemp(name), name) for name in MODELS}


@pytest.fixture(scope="module")
def written(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gguf")
    return {name: write(source, folder / f"{name}.gguf", mixed(k)) for k, (name, source) in enumerate(sources.items())}


# Transformers knows neither Gemma 1 in GGUF nor Mistral under its own name.
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gemma", "mistral")])
def test_transformers_reads_the_same_logits(name: str, sources: dict[str, Path], written: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sources[name])).eval()
    read = load_gguf_checkpoint(written[name].path, return_tensors=True, model_to_load=model)["tensors"]
    wanted = set(model.state_dict()) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert set(read) == wanted
    model.load_state_dict(read, strict=False)
    with torch.no_grad():
        assert (model(IDS).logits - written[name].model(IDS).logits).abs().max() == 0.0


def test_the_demo_model_too(tmp_path: Path) -> None:
    source = locate("demo")
    schemes = {"q": "q4_k", "k": "q6_k", "v": "q5_k", "o": "q3_k", "gate": "q2_k", "up": "q4_0", "down": "q8_0"}
    made = write(source, tmp_path / "model.gguf", lambda name, _: schemes[name.split(".")[-1].removesuffix("_proj")], fitted=3)
    assert set(kinds(made.path).values()) == {*schemes.values(), "f32"}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32).eval()
    model.load_state_dict(load_gguf_checkpoint(made.path, return_tensors=True, model_to_load=model)["tensors"], strict=False)
    with torch.no_grad():
        assert (model(IDS).logits - made.model(IDS).logits).abs().max() == 0.0


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_every_tensor_is_what_it_should_be(name: str, sources: dict[str, Path], written: dict[str, Any]) -> None:
    """Without Transformers' reader: names and changes written out by hand."""
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    names |= {f"blk.{k}.{short}": f"model.layers.{k}.{long}" for k in range(2) for short, long in parts.items()}
    names |= {} if name == "gemma" else {"output": "lm_head"}
    original = load_file(sources[name] / "model.safetensors")
    found = tensors(written[name].path)
    assert set(found) == {f"{short}.weight" for short in names}
    head_dim = MODELS[name][1]["head_dim"]
    for short, long in names.items():
        expected = written[name].decoded.get(long, original[f"{long}.weight"])
        if name == "gemma" and short.endswith("norm"):
            expected = expected + 1
        if name == "mistral" and short[-6:] in ("attn_q", "attn_k"):
            expected = torch.cat([head[[k // 2 + k % 2 * (head_dim // 2) for k in range(head_dim)]] for head in expected.split(head_dim)])
        assert torch.equal(found[f"{short}.weight"], expected), short


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in DEEP else []) for name in (*OTHERS, "gemma", "mixtral")]
)
def test_what_transformers_does_not_read_is_read_here(name: str, tmp_path: Path) -> None:
    made = write(save_model(tmp_path / "source", name), tmp_path / "model.gguf", "q8_0")
    shutil.copy(tmp_path / "source" / "config.json", tmp_path)
    read = load_written(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        # these experts are run one by one in the one, together in the other
        apart = 2e-5 if name.startswith(("gpt-oss", "llama4")) else 0.0
        assert (read(IDS).logits - made.model(IDS).logits).abs().max() <= apart


@pytest.mark.parametrize("kind", PACKERS)
def test_every_type_with_an_odd_number_of_rows(kind: str, tmp_path: Path) -> None:
    """259 rows in gate and up; the 259 columns of down fit no type."""
    source = save_model(tmp_path / "source", "qwen2", intermediate_size=259, num_hidden_layers=1)
    made = write(source, tmp_path / "model.gguf", lambda name, _: kind if "gate" in name or "up" in name else None)
    found = tensors(made.path)
    assert len(made.decoded) == 2
    for name, values in made.decoded.items():
        part = name.rsplit(".", 1)[1].removesuffix("_proj")
        assert values.shape == (259, 256)
        assert kinds(made.path)[f"blk.0.ffn_{part}.weight"] == kind
        assert torch.equal(found[f"blk.0.ffn_{part}.weight"], values)
    assert kinds(made.path)["blk.0.ffn_down.weight"] == "f32"


def test_the_settings_are_complete(written: dict[str, Any]) -> None:
    def settings(name: str) -> dict[str, Any]:
        found = metadata(written[name].path)
        arch = found["general.architecture"]
        return {"arch": arch} | {key.removeprefix(f"{arch}."): value for key, value in found.items() if key.startswith(f"{arch}.")}

    common = {
        "vocab_size": ROWS,
        "context_length": 128,
        "block_count": 2,
        "embedding_length": 256,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.dimension_count": 64,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.freq_base": 10000,
    }
    half = {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    both = {"rope.freq_base": 100000, "rope.freq_base_swa": 5000, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}
    window = {"attention.sliding_window": 16}
    assert settings("llama") == {"arch": "llama", **common}
    assert settings("llama-linear") == {"arch": "llama", **common, **linear}
    assert settings("mistral") == {"arch": "llama", **common, **half, "context_length": 48}  # its window
    assert settings("qwen2-yarn") == {"arch": "qwen2", **common, **yarn}
    assert settings("qwen3") == {"arch": "qwen3", **common, **half}
    assert settings("gemma") == {"arch": "gemma", **common}
    assert settings("gemma2") == {"arch": "gemma2", **common, **caps, **window}
    assert settings("gemma3") == {"arch": "gemma3", **common, **both, **window, "block_count": 7}


def test_llama_3_has_frequency_factors(written: dict[str, Any]) -> None:
    """1 for short waves, the factor for long ones, and between them what Meta's formula says."""
    factors = tensors(written["llama-3"].path)["rope_freqs.weight"]
    lengths = 2 * torch.pi * 1e4 ** (torch.arange(32) / 32)
    blend = (64 / lengths - 1.0) / (4.0 - 1.0)
    expected = torch.where(lengths < 64 / 4, 1.0, torch.where(lengths > 64 / 1, 8.0, 1 / ((1 - blend) / 8 + blend)))
    torch.testing.assert_close(factors, expected, rtol=1e-6, atol=0)
    assert len(factors[(factors > 1) & (factors < 8)]) > 1


def test_the_file_says_what_it_is(written: dict[str, Any], sources: dict[str, Path], tmp_path: Path) -> None:
    found = metadata(written["qwen3"].path)
    assert (found["general.name"], found["general.type"], found["general.quantization_version"]) == ("tiny", "model", 2)
    expected = {
        "q4_0": 2,
        "q8_0": 7,
        "q5_0": 8,
        "iq4_xs": 30,
        "q2_k": 10,
        "q3_k": 11,
        "q4_k": 14,
        "q5_k": 16,
        "q6_k": 18,
        "iq4_nl": 25,
        "mxfp4": 38,
    }
    expected |= {"iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23, "iq3_s": 26, "iq2_s": 28}
    assert expected.keys() == PACKERS.keys()
    for kind, number in expected.items():
        made = write(sources["qwen3"], tmp_path / kind, lambda name, _, kind=kind: kind if name == "model.layers.0.mlp.up_proj" else None)
        assert metadata(made.path)["general.file_type"] == number
    none = write(sources["qwen3"], tmp_path / "none", lambda _name, _linear: None, dense="bf16")
    assert metadata(none.path)["general.file_type"] == 32


def test_the_tokenizer_is_that_of_the_original(sources: dict[str, Path], written: dict[str, Any]) -> None:
    tokenizer, found = AutoTokenizer.from_pretrained(sources["llama"]), metadata(written["llama"].path)
    prefix = "tokenizer.ggml."
    assert (found[f"{prefix}model"], found[f"{prefix}pre"]) == ("gpt2", "gpt-2")
    assert found[f"{prefix}tokens"] == [*tokenizer.convert_ids_to_tokens(range(300)), *(f"[PAD{k}]" for k in range(300, ROWS))]
    assert found[f"{prefix}token_type"] == [3, 3] + [1] * 298 + [5] * (ROWS - 300)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert found[f"{prefix}merges"] == [" ".join(merge) for merge in backend["merges"]]
    assert (found[f"{prefix}bos_token_id"], found[f"{prefix}eos_token_id"]) == (0, 1)  # the first by config.json
    assert not found[f"{prefix}add_bos_token"]


def test_a_tokenizer_of_sentencepiece_has_scores(sources: dict[str, Path], written: dict[str, Any]) -> None:
    tokenizer, found = AutoTokenizer.from_pretrained(sources["gemma"]), metadata(written["gemma"].path)
    prefix = "tokenizer.ggml."
    assert (found[f"{prefix}model"], found[f"{prefix}pre"]) == ("llama", "default")
    assert f"{prefix}merges" not in found
    tokens, types, scores = (found[f"{prefix}{part}"] for part in ("tokens", "token_type", "scores"))
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert types[:4] == [2, 3, 3, 6]
    by_token = dict(zip(tokens, types, strict=True))
    assert by_token["   "] == by_token["\n\n"] == 4  # added as U+2581 three times
    assert by_token[f"[PAD{ROWS - 1}]"] == 5
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    order = list(dict.fromkeys("".join(merge) for merge in merges))
    assert sorted(order, key=lambda token: -scores[tokens.index(token)]) == order
    assert found[f"{prefix}add_bos_token"]
    assert not found[f"{prefix}add_eos_token"]
    assert not found[f"{prefix}add_space_prefix"]
    assert found[f"{prefix}unknown_token_id"] == 0


def test_templates_and_ends_of_turns(sources: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in sources["qwen3"].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    found = metadata(write(source, tmp_path / "model.gguf", "q8_0").path)
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (1, 7)


def test_a_tied_embedding_is_stored_once(written: dict[str, Any]) -> None:
    for name in ("llama-tied", "gemma2"):
        assert "output.weight" not in kinds(written[name].path)
    assert {"output.weight", "token_embd.weight"} <= kinds(written["llama"].path).keys()


def test_a_quantized_head_of_a_tied_model_is_stored_beside_the_embedding(sources: dict[str, Path], tmp_path: Path) -> None:
    embedding = load_file(sources["llama-tied"] / "model.safetensors")["model.embed_tokens.weight"]
    head, decoded = nearest(embedding, "q8_0")
    path, stored = tmp_path / "model.gguf", load_file(sources["llama-tied"] / "model.safetensors")
    write_gguf(path, model=sources["llama-tied"], tensors=stored, read=stored.__getitem__, rounded={"lm_head": head}, name="t", dense="f32")
    assert torch.equal(tensors(path)["output.weight"], decoded)
    assert torch.equal(tensors(path)["token_embd.weight"], embedding)


def test_other_matrices_are_float16_unless_that_overflows(sources: dict[str, Path], tmp_path: Path) -> None:
    original = load_file(sources["llama"] / "model.safetensors")
    original["lm_head.weight"][0, 0] = 65536.0
    settings: dict[str, Any] = {"model": sources["llama"], "tensors": original, "read": original.__getitem__, "rounded": {}, "name": "t"}
    write_gguf(tmp_path / "default", **settings)
    found = kinds(tmp_path / "default")
    assert found["token_embd.weight"] == found["blk.0.attn_q.weight"] == "f16"
    assert found["output.weight"] == found["blk.0.attn_norm.weight"] == "f32"
    assert torch.equal(tensors(tmp_path / "default")["token_embd.weight"], original["model.embed_tokens.weight"].half().float())
    assert torch.equal(tensors(tmp_path / "default")["output.weight"], original["lm_head.weight"])

    write_gguf(tmp_path / "bf16", **settings, dense="bf16")
    assert torch.equal(tensors(tmp_path / "bf16")["token_embd.weight"], original["model.embed_tokens.weight"].bfloat16().float())
    write_gguf(tmp_path / "q8_0", **settings, dense="q8_0")
    error = tensors(tmp_path / "q8_0")["token_embd.weight"] - original["model.embed_tokens.weight"]
    assert kinds(tmp_path / "q8_0")["token_embd.weight"] == "q8_0"
    assert 0 < error.square().mean().sqrt() < 0.01 * original["model.embed_tokens.weight"].square().mean().sqrt()


def test_tensors_are_read_when_their_turn_comes(sources: dict[str, Path], tmp_path: Path) -> None:
    original = load_file(sources["llama"] / "model.safetensors")
    log: list[str] = []

    def read(name: str) -> Tensor:
        log.append(name)
        return original[name]

    write(sources["llama"], tmp_path / "model.gguf", "q8_0", read=read, advance=lambda n: log.extend(["written"] * n))
    first = log.index("written")
    dense = {name for name in original if not name.endswith("_proj.weight")}
    assert sorted(log[: first - 1]) == sorted(dense)  # shapes come first
    assert log.count("written") == len(kinds(tmp_path / "model.gguf")) == len(original)
    assert all("written" in pair for pair in itertools.pairwise(log[first - 1 :]))
    assert {name: log.count(name) for name in dense} == dict.fromkeys(dense, 2)


def test_equal_models_give_equal_bytes(sources: dict[str, Path], tmp_path: Path) -> None:
    original = load_file(sources["gemma2"] / "model.safetensors")
    for name, order in (("a", list(original)), ("b", list(reversed(original)))):
        write(sources["gemma2"], tmp_path / name, mixed(), tensors=order)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_names_without_the_leading_model(sources: dict[str, Path], written: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint of a base model leaves it out; modules have it."""
    short = {name.removeprefix("model."): values for name, values in load_file(sources["qwen3"] / "model.safetensors").items()}
    k = list(MODELS).index("qwen3")
    write(sources["qwen3"], tmp_path / "model.gguf", mixed(k), tensors=list(short), read=short.__getitem__)
    assert (tmp_path / "model.gguf").read_bytes() == written["qwen3"].path.read_bytes()


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_language_model_of_a_gemma_3_with_pictures(
    prefix: str, sources: dict[str, Path], written: dict[str, Any], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in sources["gemma3"].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    text = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    original = {name.replace("model.", prefix, 1): values for name, values in load_file(source / "model.safetensors").items()}
    names = [*original, "vision_tower.vision_model.post_layernorm.weight", "model.multi_modal_projector.mm_soft_emb_norm.weight"]
    made = written["gemma3"]
    rounded = {name.replace("model.", "model.language_model.", 1): weight for name, weight in made.rounded.items()}
    path = tmp_path / "model.gguf"
    write_gguf(path, model=source, tensors=names, read=original.__getitem__, rounded=rounded, name="tiny", dense="f32")
    assert path.read_bytes() == made.path.read_bytes()


def test_a_tensor_that_llama_cpp_has_no_name_for_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    original = load_file(sources["llama"] / "model.safetensors")
    names = [*original, "model.layers.0.self_attn.gate.weight"]
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.gate: llama\.cpp has no tensor of that name"):
        write(sources["llama"], tmp_path / "model.gguf", "q8_0", tensors=names)
    for missing in ("lm_head.weight", "model.embed_tokens.weight"):
        with pytest.raises(ModelError, match="lacks a part of the model"):
            write(sources["llama"], tmp_path / "model.gguf", "q8_0", tensors=set(original) - {missing})


def test_weights_of_other_grids_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"model\.layers\.0\.self_attn\.q_proj: int4-g32 is no block type"):
        write(sources["llama"], tmp_path / "model.gguf", "int4-g32")


def test_more_tokens_than_rows_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "llama", vocab_size=256)
    with pytest.raises(ModelError, match="300 tokens, and its embedding only 256 rows"):
        write(source, tmp_path / "model.gguf", "q8_0")


def test_added_tokens_beyond_the_rows_are_left_out(tmp_path: Path) -> None:
    """Gemma 3 of one billion weights has such a token, for pictures."""
    source = save_model(tmp_path / "source", "llama", vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<picture>"])
    tokenizer.save_pretrained(source)
    check_tokenizer(source)
    assert len(metadata(write(source, tmp_path / "model.gguf", "q8_0").path)["tokenizer.ggml.tokens"]) == 300


def test_a_directory_without_tokenizer_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources["llama"] / "config.json").read_bytes())
    with pytest.raises(ModelError, match="tokenizer"):
        check_tokenizer(tmp_path)


# Mixtures of experts


def by_projection(name: str, linear: nn.Linear) -> str | None:
    """All experts of a layer alike, their three matrices not; not what weights them."""
    if name.endswith("shared_expert_gate"):
        return None
    kinds = {"gate_proj": "q4_k", "up_proj": "q6_k", "down_proj": "q4_0"}
    kind = kinds.get(name.rpartition(".")[2], "q8_0")
    return "iq4_nl" if kind.endswith(("_k", "_xs")) and linear.in_features % 256 else kind


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    source = save_model(folder / request.param, request.param)
    return source, write(source, folder / "model.gguf", by_projection)


def test_experts_of_a_layer_are_one_tensor(mixture: tuple[Path, Any]) -> None:
    source, made = mixture
    found, types, known = tensors(made.path), kinds(made.path), metadata(made.path)
    for layer, (part, projection, kind) in itertools.product(
        range(2), (("gate", "gate_proj", "q4_k"), ("up", "up_proj", "q6_k"), ("down", "down_proj", "q4_0"))
    ):
        stack = found[f"blk.{layer}.ffn_{part}_exps.weight"]
        assert types[f"blk.{layer}.ffn_{part}_exps.weight"] == kind
        assert len(stack) == 4
        for expert in range(4):
            assert torch.equal(stack[expert], made.decoded[f"model.layers.{layer}.mlp.experts.{expert}.{projection}"])
        assert types[f"blk.{layer}.ffn_gate_inp.weight"] == "f32"
    arch = known["general.architecture"]
    assert (known[f"{arch}.expert_count"], known[f"{arch}.expert_used_count"]) == (4, 2)
    assert arch == {"mixtral": "llama", "qwen2-moe": "qwen2moe", "qwen3-moe": "qwen3moe"}[source.name]
    if source.name != "mixtral":
        assert known[f"{arch}.expert_feed_forward_length"] == 64
    if source.name == "qwen2-moe":
        assert known[f"{arch}.expert_shared_feed_forward_length"] == 96
        assert types["blk.0.ffn_up_shexp.weight"] == "q6_k"
        assert types["blk.0.ffn_gate_inp_shexp.weight"] == "f32"


def test_our_own_reader_gives_every_tensor_back(mixture: tuple[Path, Any]) -> None:
    source, made = mixture
    original = load_file(source / "model.safetensors")
    found = read(made.path, config=json.loads((source / "config.json").read_text()), tensors=original)
    assert found.keys() == original.keys()
    renamed = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "block_sparse_moe": "mlp"}
    for name, values in found.items():
        module = ".".join(renamed.get(part, part) for part in name.split(".")[:-1])
        quantized = name.endswith("weight") and module in made.decoded
        assert torch.equal(values, made.decoded[module] if quantized else original[name].float()), name


def test_transformers_reads_mixtures(mixture: tuple[Path, Any], tmp_path: Path) -> None:
    source, made = mixture
    if source.name == "mixtral":
        pytest.skip("Transformers takes it for a Llama")
    (tmp_path / "model.gguf").symlink_to(made.path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=AutoConfig.from_pretrained(source), dtype=torch.float32
    )
    with torch.no_grad():
        expected = made.model(IDS).logits
        assert (model(IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_columns_that_move_have_blocks_that_stay_whole(quantize: Any, tmp_path: Path) -> None:
    """Of linear attention: heads of 64 values, in another order in the file, in blocks of 32; where heads are alike nothing moves."""
    given = {**NEAREST, "scheme": "q4_k", "sequences": 4, "seq_len": 16, "eval_sequences": 2, "embedding": "none", "head": "none"}
    for name, expected in (("qwen35", "q5_0"), ("qwen35-alike", "q4_k")):
        source = save_model(tmp_path / name, name, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], **EQUAL[name])
        done = quantize(source, tmp_path / f"{name}-out", **given, format="gguf")
        types = kinds(done.path / "model.gguf")
        assert (types["blk.0.ssm_out.weight"], types["blk.0.attn_qkv.weight"]) == (expected, "q4_k")
        read = load_written(done.path, device=torch.device("cpu"), dtype=torch.float32)
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        W, W_hat = (model.get_submodule("model.layers.0.linear_attn.out_proj").weight for model in (original, read))
        assert ((W - W_hat).norm() / W.norm()) < 0.2


@pytest.mark.slow
def test_a_mixture_in_a_whole_run(quantize: Any, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "qwen3-moe")
    exact = {name: tensor.half().float() for name, tensor in load_file(source / "model.safetensors").items()}  # as the rest is in GGUF
    save_file(exact, source / "model.safetensors", metadata={"format": "pt"})
    given = {"scheme": "q4_0", "sequences": 8, "seq_len": 32, "eval_sequences": 4, "sweeps": 1, "embedding": "none", "head": "none"}
    done = {form: quantize(source, tmp_path / form, **given, format=form) for form in ("gguf", "native")}
    assert done["gguf"].report.kl_mean == pytest.approx(done["native"].report.kl_mean, rel=1e-4)
    assert done["gguf"].details["coverage"]["share"] > 0.99
    with pytest.raises(SchemeError, match="all experts of a layer in one tensor of one type, and here are 16 bits, q4_0"):
        quantize(source, tmp_path / "refused", **given, exclude=("*.experts.3.*",), format="gguf")
    mixed = quantize(source, tmp_path / "mixed", **{**given, "bits": 6, "schemes": ("q4_0", "q8_0")}, format="gguf")
    assert set(kinds(mixed.path / "model.gguf").values()) == {"q4_0", "q8_0", "f16", "f32"}


def test_experts_of_several_types_are_refused() -> None:
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(2)]
    check_linears(dict.fromkeys(names, "q4_0"), ["model.layers.0.mlp.gate"])
    with pytest.raises(SchemeError, match=r"experts.up_proj: .*here are q4_0, q8_0; give all of them one scheme"):
        check_linears({names[0]: "q4_0", names[1]: "q8_0"}, [])


@pytest.mark.parametrize(
    ("name", "refused"),
    [("mtp.layers.0.up_proj.weight", False), ("model.layers.2.eh_proj.weight", False), ("model.layers.1.eh_proj.weight", True)],
)
def test_tensors_that_llama_cpp_has_no_place_for(name: str, refused: bool, sources: dict[str, Path]) -> None:
    """Before any work: those for tokens further ahead are left out, under their names or as layers behind the last."""
    config = json.loads((sources["qwen3"] / "config.json").read_text())
    stored = [*load_file(sources["qwen3"] / "model.safetensors"), name]
    if not refused:
        check_model(sources["qwen3"], config, stored)
        return
    with pytest.raises(ModelError, match=r"eh_proj: llama.cpp has no tensor of that name in its qwen3 models"):
        check_model(sources["qwen3"], config, stored)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is False, and llama.cpp has True"),
        ({"mlp_only_layers": [0]}, "some of its layers have no experts"),
    ],
)
def test_settings_of_mixtures_that_llama_cpp_does_not_have(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = save_model(tmp_path, "qwen3-moe", **change)
    with pytest.raises(ModelError, match=reason):
        check_model(source, json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors"))
