"""Every architecture goes through the whole pipeline: the right linears are quantized and nothing else changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import roundel
from e2e.tiny import LAYERS, architectures

PACKED = {"weight_packed", "weight_scale", "weight_shape"}

REPORT = {
    "schema_version": None,
    "roundel": None,
    "versions": {"torch", "transformers", "compressed-tensors", "numba"},
    "model": {"name", "repository", "revision", "parameters", "quantized", "terms", "auto_class"},
    "scheme": None,
    "continuations": None,
    "allocation": None,
    "natural_steps": None,
    "tuning": None,
    "format": None,
    "fused_rotation": None,
    "curvature": None,
    "seed": None,
    "recipe": {
        *("scheme", "curvature", "labels", "calibration", "sequences", "seq_len", "eval_data", "eval_sequences"),
        *(
            "bits",
            "schemes",
            "rotate",
            "format",
            "sweeps",
            "damping",
            "factor_type",
            "effort",
            "embedding",
            "mix",
            "target_size",
            "head",
            "kv_cache",
            "prefix_aware",
            "prefix_sequences",
            "prefix_strength",
            "stream_strength",
            "prefix_damping",
            "natural_places",
            "tune",
            "tune_steps",
            "tune_tokens",
            "tune_rest",
            "seed",
        ),
        *("include", "exclude"),
    },
    "calibration": {"source", "sequences", "sequences_to_choose_by", "opening", "seq_len", "tokens", "sha256", "fingerprint"},
    "bits_per_weight": {"quantized", "model", "quantized_fraction"},
    "coverage": {"decoder_weights", "quantized", "share", "left"},
    "predicted_kl": {"total", "total_stderr", "joint", "joint_stderr", "by", "predicted_over_measured"},
    "evaluation": {"source", "sha256", "overlap_with_calibration", "kl", "top1_agreement", "perplexity", "tokens", "sequences"},
    "layers": None,
    "skipped": None,
    "warnings": None,
    "resources": {"peak_memory", "processes", "planned"},
    "seconds": {"continuations", "load", "text", "curvature", "rounding", "prediction", "writing", "evaluation"},
}
ROW = {
    *(
        "tensor",
        "shape",
        "scheme",
        "dtype",
        "bits",
        "bits_per_weight",
        "damping",
        "proxy_loss",
        "sweeps",
        "loss_after_sweeps",
        "seconds",
        "predicted_kl",
    ),
}


@pytest.fixture(scope="module", params=architectures())
def run(request, model, quantize, tmp_path_factory) -> tuple[str, Path, roundel.Quantized]:
    name = request.param
    source = model(name)
    return name, source, quantize(source, tmp_path_factory.mktemp("out") / name, scheme="int4-g32")


def test_all_linears_of_the_layers_and_no_other_are_quantized(run) -> None:
    name, source, result = run
    expected = architectures()[name]().linears
    before, after = load_file(source / "model.safetensors"), load_file(result.path / "model.safetensors")
    replaced = {key.removesuffix(".weight_packed") for key in after if key.endswith(".weight_packed")}
    assert replaced == expected == set(result.details["layers"])
    assert len(replaced) % LAYERS == 0
    untouched = {key for key in before if key.removesuffix(".weight") not in expected}
    assert set(after) == untouched | {f"{module}.{part}" for module in expected for part in PACKED}
    for key in untouched:
        assert torch.equal(before[key], after[key]), key
    assert result.details["skipped"] == {}


def test_biases_are_present_and_untouched(run) -> None:
    name, source, result = run
    with safe_open(source / "model.safetensors", "pt") as before, safe_open(result.path / "model.safetensors", "pt") as after:
        for module in architectures()[name]().biased:
            old, new = before.get_tensor(f"{module}.bias"), after.get_tensor(f"{module}.bias")
            assert old.abs().max() > 0
            assert torch.equal(old.view(torch.int32), new.view(torch.int32))


def test_loads_and_ties_as_before(run) -> None:
    name, _source, result = run
    loaded, info = AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    embedding, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == architectures()[name]().tied
    logits = loaded(input_ids=torch.arange(16)[None]).logits
    assert torch.isfinite(logits).all()


def test_config_and_tokenizer_are_copied(run) -> None:
    _name, source, result = run
    copied = {p.name for p in source.iterdir()} - {"config.json", "model.safetensors"}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= copied
    for file in copied:
        assert (source / file).read_bytes() == (result.path / file).read_bytes(), file
    assert {p.name for p in result.path.iterdir()} == copied | {
        "config.json",
        "model.safetensors",
        "report.html",
        "roundel.json",
        "README.md",
    }
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, result.path))
    quantization = after.pop("quantization_config")
    assert after == before
    assert quantization["quant_method"] == "compressed-tensors"
    head = [name for name in quantization["ignore"] if not name.startswith("re:")]
    assert head in (["embed_out"], ["lm_head"])
    sentence = "Some text, to be tokenized.\n"
    tokens = [AutoTokenizer.from_pretrained(path)(sentence)["input_ids"] for path in (source, result.path)]
    assert tokens[0] == tokens[1]


def test_report_is_complete(run) -> None:
    name, source, result = run
    report = json.loads((result.path / "roundel.json").read_text())
    assert report == json.loads(json.dumps(result.details))
    assert set(report) == set(REPORT)
    for key, inner in REPORT.items():
        assert inner is None or set(report[key]) == inner, key
    assert all(set(row) == ROW for row in report["layers"].values())
    assert report["model"]["name"] == str(source)
    assert report["calibration"]["sequences"] == 8
    assert report["calibration"]["sequences_to_choose_by"] == 0
    assert report["calibration"]["tokens"] == 8 * 32
    assert report["evaluation"]["tokens"] == 4 * 32
    # 4-bit codes, a 16-bit scale for 32 of them, and the shape that the format stores with each weight.
    assert 4.5 <= report["bits_per_weight"]["quantized"] < 4.6
    stored = sum(t.numel() * t.element_size() for t in load_file(result.path / "model.safetensors").values())
    assert report["bits_per_weight"]["model"] == pytest.approx(8 * stored / report["model"]["parameters"])
    card = (result.path / "README.md").read_text()
    assert "int4-g32" in card
    assert source.name in card
    assert architectures()[name]().linears.isdisjoint(report["skipped"])


def test_kl_is_finite_and_smaller_than_with_two_bits(run, quantize: Callable[..., roundel.Quantized], tmp_path: Path) -> None:
    _name, source, result = run
    coarse = quantize(source, tmp_path / "int2", scheme="int2-g32", curvature="identity", sweeps=0)
    assert math.isfinite(coarse.report.kl_mean)
    assert 1e-6 < result.report.kl_mean < 0.5 * coarse.report.kl_mean
    assert 0 < result.report.kl_stderr < result.report.kl_mean
    # The second-order prediction, from four sequences only, has at least the right size.
    assert 0.2 < result.details["predicted_kl"]["predicted_over_measured"] < 5
