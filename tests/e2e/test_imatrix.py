"""Factors exported as llama.cpp's importance matrix, against the inputs of the linears themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import roundel
from e2e import tiny
from e2e.conftest import SETTINGS, exactly
from e2e.test_experts import original
from roundel.artifacts.factors import FactorsDirectory
from roundel.artifacts.imatrix_sums import imatrix_sums
from roundel.artifacts.source import load_source
from roundel.calibration import split_tokens, windows
from roundel.errors import FactorsError, ModelError, OutputError, StorageError
from roundel.formats import imatrix as imatrix_format
from roundel.models import load_tokenizer
from roundel.recipes import Recipe
from roundel.stages.collecting import collect_factors
from roundel.stages.export import export_imatrix

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LINEARS = {f"model.layers.{k}.{name}": f"blk.{k}.{stored}.weight" for k in range(2) for name, stored in LAYER.items()}
TOKENS = SETTINGS["sequences"] * SETTINGS["seq_len"]


@pytest.fixture(scope="module")
def collected(model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def collect(curvature: str) -> Path:
        if curvature not in made:
            made[curvature] = tmp_path_factory.mktemp("factors") / "factors"
            with exactly():
                collect_factors(model(), output=made[curvature], curvature=curvature, calibration=str(text), **SETTINGS)
        return made[curvature]

    return collect


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Sums and counts of a GGUF importance matrix."""
    tensors = {tensor.name: torch.tensor(tensor.data).double() for tensor in gguf.GGUFReader(path).tensors}
    sums = {name.removesuffix(".in_sum2"): value for name, value in tensors.items() if name.endswith(".in_sum2")}
    counts = {name.removesuffix(".counts"): value.item() for name, value in tensors.items() if name.endswith(".counts")}
    assert len(sums) + len(counts) == len(tensors)
    return sums, counts


def input_squares(source: Path, text: Path) -> dict[str, Tensor]:
    """`sum_t x_j^2` of each linear's inputs over the calibration text, as llama-imatrix sums them up."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    available = windows([text.read_text(encoding="utf-8")], load_tokenizer(source), SETTINGS["seq_len"], most=48)
    tokens = split_tokens(available, calibration=SETTINGS["sequences"], heldout=SETTINGS["eval_sequences"], seed=0, source="").calibration
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = inputs[0].double().square().sum((0, 1))

        return keep

    for name in LINEARS:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(input_ids=tokens.ids)
    return found


@pytest.mark.parametrize("curvature", ["activation", "kfac", "diagonal:of=activation"])
def test_weights_of_activations_are_those_of_llama_imatrix(curvature: str, collected, model, text, tmp_path) -> None:
    written = export_imatrix(collected(curvature), output=tmp_path / "new" / "m.gguf")
    sums, counts = read(tmp_path / "new" / "m.gguf")
    assert set(sums) == set(counts) == set(LINEARS.values()) == set(written.values)
    assert set(counts.values()) == {TOKENS}
    for name, expected in input_squares(model(), text).items():
        torch.testing.assert_close(sums[LINEARS[name]], expected, rtol=2e-5, atol=0)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("curvature", ["mean", "sketch-b", "guided:groups=3", "triangular:rounds=1"])
def test_weights_of_a_fisher_are_its_diagonal_summed_over_rows(curvature: str, collected, tmp_path) -> None:
    factors = collected(curvature)
    export_imatrix(factors, output=tmp_path / "m.gguf")
    sums, counts = read(tmp_path / "m.gguf")
    own = FactorsDirectory.open(factors).factors()
    means = []
    for name, stored in LINEARS.items():
        dense = sum(
            torch.einsum("oo,ii->oi", part.H_out.double(), part.H_in.double()).sum(0) * part.scale for _, part in own[name].row_groups()
        )
        weights = sums[stored] / counts[stored]
        torch.testing.assert_close(weights / weights.mean(), dense / dense.mean(), rtol=1e-5, atol=1e-8)
        means.append(weights.mean().item())
    if curvature in ("mean", "triangular:rounds=1"):  # they have summed up x x^T, so the mean is that of the inputs' squares
        squares, per = read_export(collected("activation"), tmp_path / "activation.gguf")
        assert means == pytest.approx([(squares[stored] / per[stored]).mean().item() for stored in LINEARS.values()], rel=1e-5)
    else:
        assert means == pytest.approx([1.0] * len(means), rel=1e-5)


def read_export(factors: Path, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    export_imatrix(factors, output=path)
    return read(path)


@pytest.mark.parametrize("name", [name for name in tiny.architectures() if name not in ("llama", "opt")])
def test_all_linears_of_an_architecture_have_names(name: str) -> None:
    architecture = tiny.architectures()[name]()
    names = imatrix_format.tensor_names(imatrix_format.architecture(architecture.config.model_type), sorted(architecture.linears))
    assert set(names) == architecture.linears
    assert len(set(names.values())) == len(names)


def test_command(command, collected, model, tmp_path) -> None:
    factors = collected("activation")
    outcome = command("imatrix", factors, "-o", tmp_path / "m.gguf")
    assert (outcome.code, outcome.err) == (0, "")
    assert "14 matrices of llama from 8 sequences" in outcome.out
    assert command("imatrix", factors, "-o", tmp_path / "named.gguf", "--model", model("mistral"), "-q") == (0, "", "")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "named.gguf").read_bytes()  # both are llama to llama.cpp


def test_a_linear_without_a_name_is_left_out_with_a_warning(collected, command, tmp_path) -> None:
    factors = tmp_path / "factors"
    shutil.copytree(collected("activation"), factors)
    header = json.loads((factors / "header.json").read_text())
    named, renamed = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.experts.0.up_proj"
    header["layers"][renamed] = header["layers"].pop(named)
    (factors / "header.json").write_text(json.dumps(header))
    stored = factors / "sums-0001.safetensors"
    save_file({key.replace(named, renamed): value for key, value in load_file(stored).items()}, stored)
    outcome = command("imatrix", factors, "-o", tmp_path / "m.gguf")
    assert outcome.code == 0
    assert "warning: model.layers.1.mlp.experts.0.up_proj is left out" in " ".join(outcome.err.split())
    assert set(read(tmp_path / "m.gguf")[0]) == set(LINEARS.values()) - {"blk.1.ffn_up.weight"}


def test_what_cannot_be_exported_is_refused(collected, model, tmp_path, monkeypatch) -> None:
    factors, target = collected("activation"), tmp_path / "m.gguf"
    with pytest.raises(ModelError, match="'opt'"):
        export_imatrix(factors, output=target, model=model("opt"))
    with pytest.raises(ModelError, match="no model"):
        export_imatrix(factors, output=target, model=tmp_path / "nowhere")
    with pytest.raises(FactorsError, match="no factors directory"):
        export_imatrix(tmp_path, output=target)
    with pytest.raises(OutputError, match="is a directory"):
        export_imatrix(factors, output=tmp_path)
    part = tmp_path / "part"
    shutil.copytree(factors, part)
    header = json.loads((part / "header.json").read_text())
    left, away = part / "sums-0000.safetensors", tmp_path / "away"
    left.rename(away)
    with pytest.raises(FactorsError, match="not complete"):
        export_imatrix(part, output=target)
    away.rename(left)
    name = "model.layers.0.self_attn.q_proj"  # GPT-NeoX has one matrix for q, k and v
    (part / "header.json").write_text(json.dumps({**header, "layers": {name: header["layers"][name]}}))
    with pytest.raises(FactorsError, match=r"none of the factors' linears .* gptneox"):
        export_imatrix(part, output=target, model=model("gpt-neox"))
    (part / "header.json").write_text(json.dumps({**header, "model": "moved/away/since"}))
    with pytest.raises(ModelError, match=r"no model at 'moved/away/since'.* with --model"):
        export_imatrix(part, output=target)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"architectures": []}')
    with pytest.raises(ModelError, match="model_type"):
        export_imatrix(factors, output=target, model=tmp_path / "bad")

    def full(path: Path, _matrix: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(imatrix_format, "write", full)
        with pytest.raises(StorageError, match="no space"):
            export_imatrix(factors, output=target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "part"]
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        roundel.export_imatrix(factors, output=target)
    assert target.read_bytes() == b"precious"


@pytest.fixture(scope="module")
def matrix(collected, tmp_path_factory) -> Path:
    """Of the calibration text, as llama-imatrix would measure it."""
    path = tmp_path_factory.mktemp("matrix") / "m.gguf"
    export_imatrix(collected("activation"), output=path)
    return path


def test_rounding_with_a_file_is_that_with_its_text(model, quantize, matrix, tmp_path) -> None:
    settings = {"scheme": "int3-g16", "prefix_aware": False}
    with exactly():
        given = quantize(model(), tmp_path / "given", curvature=f"imatrix:{matrix}", **settings)
        live = quantize(model(), tmp_path / "live", curvature="imatrix", **settings)
        none = quantize(model(), tmp_path / "none", curvature="identity", **settings)
    weights = [load_file(found.path / "model.safetensors") for found in (given, live, none)]
    codes = [name for name in weights[0] if name.endswith("weight_packed")]
    same = [torch.equal(weights[0][name], weights[1][name]) for name in codes]
    assert sum(same) >= 0.9 * len(codes)  # sums in another type: a value at a boundary may go the other way
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in codes)
    assert json.loads((given.path / "roundel.json").read_text())["recipe"]["curvature"] == f"imatrix:{matrix}"


def test_a_file_goes_with_what_needs_gradients_and_with_work(model, quantize, matrix, tmp_path) -> None:
    settings = {"bits": 4.0, "schemes": ("int3-g16", "int4-g16"), "format": "native", "curvature": f"imatrix:{matrix}"}
    first = quantize(model(), tmp_path / "first", work=tmp_path / "work", **settings)
    again = quantize(model(), tmp_path / "again", work=tmp_path / "work", **settings)
    assert (first.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(matrix.read_bytes() + b" ")
    shutil.move(other, matrix)
    with pytest.raises(StorageError, match="another job"):
        quantize(model(), tmp_path / "third", work=tmp_path / "work", **settings)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("missing", "No such file"), ("text", "importance matrix"), ("width", "another model"), ("names", "none of the linears")],
)
def test_files_that_are_refused(fault: str, message: str, model, quantize, matrix, tmp_path) -> None:
    path = tmp_path / "m.gguf"
    if fault == "text":
        path.write_text("no matrix")
    elif fault != "missing":
        name = "blk.0.attn_q.weight" if fault == "width" else "blk.9.attn_q.weight"
        values = {name: torch.ones(7)}
        imatrix_format.write(
            path, imatrix_format.Imatrix(architecture="llama", dataset="", sequences=1, seq_len=1, values=values, counts={name: 1})
        )
    with pytest.raises((FactorsError, StorageError), match=message):
        quantize(model(), tmp_path / "out", scheme="int4-g32", curvature=f"imatrix:{path}")
    assert not (tmp_path / "out").exists()


def test_experts_have_the_sums_of_their_place(tmp_path) -> None:
    tokenizer = tiny.make_tokenizer(starts=False)
    original("qwen3-moe", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = load_source(str(tmp_path / "model"), Recipe(scheme="int4-g32"), "cpu", "float32")
    down = sorted(name for name in source.linears if name.startswith("model.layers.0.") and name.endswith("down_proj"))
    count, width = len(down), source.linears[down[0]].in_features
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    sums = torch.arange(count * width, dtype=torch.float32).reshape(count, width)
    writer.add_tensor("blk.0.ffn_down_exps.weight.in_sum2", sums.numpy())
    writer.add_tensor("blk.0.ffn_down_exps.weight.counts", torch.arange(count, dtype=torch.float32)[:, None].numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    others = len(source.linears) - count
    found = imatrix_sums(Recipe(scheme="int4-g32", curvature=f"imatrix:{tmp_path / 'm.gguf'}"), source)
    assert found is not None
    assert set(source.linears) == set(down)
    assert len([name for name, reason in source.skipped.items() if reason == "not in m.gguf"]) == others
    for k in range(count):
        (sketch,) = found.sketches([f"model.layers.0.mlp.experts.{k}.down_proj"], torch.device("cpu")).values()
        assert torch.equal(sketch.sums["squares"], sums[k])
        assert sketch.rows == k
