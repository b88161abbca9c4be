"""`roundel inspect`: its numbers against dense ones, its page and plots, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, svds

import roundel
from e2e.conftest import SETTINGS
from oracles.test_fisher import weight_gradients
from roundel.artifacts.factors import FactorsDirectory
from roundel.calibration import windows
from roundel.commands.inspect import COLUMNS, _rank, _structure, inspect, table_rows
from roundel.errors import DataError, FactorsError, SchemeError
from roundel.evaluate.html import Paragraph, page
from roundel.evaluate.html import Table as HtmlTable
from roundel.linalg.ldl import damped_ldl
from roundel.models import load_model, load_tokenizer
from roundel.settings import Settings
from roundel.stages.collecting import collect_factors, open_factors
from roundel.types import GroupedFactors, KroneckerFactors, TokenBatch

Q_PROJ = "model.layers.0.self_attn.q_proj"
HELD_OUT = 8


@pytest.fixture(scope="module")
def factors(model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("factors") / "mean"
    collect_factors(model(), output=target, **{"calibration": str(text), **SETTINGS})
    return target


@pytest.fixture(scope="module")
def inspected(factors: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("inspected") / "out"
    details = inspect(factors, sequences=HELD_OUT, scheme="int3-g32", batch_size=4, spectrum_passes=6, output=output)
    return details, output


def test_the_diagnostics_are_those_of_dense_gradients_of_unseen_text(inspected, factors, model) -> None:
    details, opened = inspected[0], open_factors(factors, scheme="int3-g32", eval_sequences=HELD_OUT)
    assert len(opened.heldout) == HELD_OUT
    assert not set(opened.heldout.sequence_ids) & set(opened.header.sequence_ids)
    reference = load_model(model(), device=torch.device("cpu"), dtype=torch.float32)
    linear = dict(reference.named_modules())[Q_PROJ]
    G = weight_gradients(reference, {Q_PROJ: linear}, opened.heldout, seed=opened.recipe.seed)[Q_PROJ].double()
    own, row = opened.factors[Q_PROJ], details["layers"][Q_PROJ]
    products = torch.einsum("soi,toi->st", G, G)
    pairs = [products[s, t] ** 2 for s in range(HELD_OUT) for t in range(HELD_OUT) if s != t and s // 4 == t // 4]
    inner = ((own.H_out.double() @ G @ own.H_in.double()) * G).sum((1, 2)).mean()
    norms = torch.linalg.norm(own.H_out.double()) * torch.linalg.norm(own.H_in.double())
    assert row["cosine"] == pytest.approx((inner / torch.stack(pairs).mean().sqrt() / norms).item(), rel=1e-4)
    A, B = damped_ldl(own.H_out, Settings.damping)[1], damped_ldl(own.H_in, Settings.damping)[1]
    remaining = (torch.linalg.inv(A) @ G @ torch.linalg.inv(B).T).square().sum() / G.square().sum()
    assert row["j_ratio"] == pytest.approx(remaining.item(), rel=1e-4)
    first, second = leading_values(G, tokens=opened.header.seq_len)
    assert row["singular_values"][0] == pytest.approx(first, rel=0.005)
    assert row["singular_values"][1] <= second * (1 + 1e-4)  # a Ritz value is a lower bound
    assert row["singular_values"][1] > 0.9 * second


def leading_values(G: torch.Tensor, *, tokens: int) -> np.ndarray:
    """The two leading singular values of `V -> E[G V G^T]` per token on symmetric matrices, by Arnoldi iteration."""
    g = G.double().numpy()
    d_out, d_in = g.shape[1:]

    def apply(V: np.ndarray, left: np.ndarray, d: int) -> np.ndarray:
        square = V.reshape(d, d)
        return np.einsum("sab,sbc,sdc->ad", left, np.broadcast_to((square + square.T) / 2, (len(left), d, d)), left, optimize=True).ravel()

    operator = LinearOperator(
        (d_out**2, d_in**2), matvec=lambda V: apply(V, g, d_in), rmatvec=lambda U: apply(U, g.transpose(0, 2, 1), d_out), dtype=np.float64
    )
    values = svds(operator, k=2, v0=np.eye(min(d_out, d_in)).ravel(), return_singular_vectors=False)
    return np.sort(values)[::-1] / (len(g) * tokens)


def test_the_predicted_kl_is_that_of_quantize_on_the_same_text(inspected, factors, model, tmp_path) -> None:
    quantized = roundel.quantize(model(), output=tmp_path / "out", factors=factors, scheme="int3-g32", eval_sequences=HELD_OUT)
    details = inspected[0]
    for name, row in quantized.details["layers"].items():
        assert details["layers"][name]["predicted_kl"] == pytest.approx(row["predicted_kl"], rel=1e-5)
        assert details["layers"][name]["rounding"]["proxy_loss"] == row["proxy_loss"]
    assert details["total"]["predicted_kl"] == pytest.approx(quantized.details["predicted_kl"]["total"], rel=1e-5)
    assert details["held_out"]["sha256"] == quantized.details["evaluation"]["sha256"]


def test_structure_of_known_factors() -> None:
    half = KroneckerFactors(H_out=torch.diag(torch.tensor([2.0, 2, 0, 0])), H_in=torch.eye(6), scale=0.5)
    found = _structure(half, 0.1)
    assert found["shape"] == [4, 6]
    assert found["rank"]["out"] == pytest.approx(
        {"effective": 2, "effective_fraction": 0.5, "for_90_percent": 2, "for_90_percent_fraction": 0.5}
    )
    assert found["rank"]["in"]["effective"] == pytest.approx(6)
    assert found["rank"]["in"]["for_90_percent"] == 6
    assert found["condition"] == pytest.approx({"out": 2.1 / 0.1, "in": 1})
    assert (found["nilpotence"], found["waves"]) == ({"out": 1, "in": 1}, 1)
    chain = torch.eye(6) + 0.4 * (torch.diag(torch.ones(5), 1) + torch.diag(torch.ones(5), -1))
    assert _structure(KroneckerFactors(H_out=half.H_out, H_in=chain, scale=1.0), 0.1)["waves"] == 6


def test_structure_of_groups_is_that_of_the_partial_traces() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for rows, scale in ((3, 0.2), (5, 1.5)):
        roots = [torch.randn(d, d, generator=generator) for d in (rows, 7)]
        H_out, H_in = (root @ root.T for root in roots)
        parts.append(KroneckerFactors(H_out=H_out / H_out.diagonal().mean(), H_in=H_in / H_in.diagonal().mean(), scale=scale))
    whole = torch.block_diag(*(part.scale * torch.kron(part.H_out.double(), part.H_in.double()) for part in parts)).reshape(8, 7, 8, 7)
    found = _structure(GroupedFactors(groups=tuple(parts)), 0.1)
    for side, trace in (("out", torch.einsum("oipi->op", whole)), ("in", torch.einsum("oioj->ij", whole))):
        assert found["rank"][side]["effective"] == pytest.approx((trace.trace() ** 2 / trace.square().sum()).item(), rel=1e-5)
    conditions = [torch.linalg.cond(part.H_in.double() + 0.1 * torch.eye(7)).item() for part in parts]
    assert found["condition"]["in"] == pytest.approx(max(conditions), rel=1e-3)
    assert found["nilpotence"] == {"out": 5, "in": 7}
    assert found["waves"] == 11


def test_ninety_per_cent_of_the_trace() -> None:
    assert _rank(torch.tensor([1.0, 9.0, 0.0]))["for_90_percent"] == 1
    assert _rank(torch.tensor([1.1, 8.9, 0.0]))["for_90_percent"] == 2
    assert _rank(torch.ones(10))["for_90_percent"] == 9


def test_the_output_directory(inspected) -> None:
    details, output = inspected
    assert json.loads((output / "inspect.json").read_text()) == details
    pictures = {path.name: path.read_bytes() for path in output.glob("*.png")}
    assert set(pictures) == {"predicted-kl.png", "j-ratio.png", "cosine.png", "rank.png", "rank90.png", "spectrum.png"}
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in pictures.values())
    html = (output / "index.html").read_text(encoding="utf-8")
    embedded = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    assert sorted(embedded) == sorted(pictures.values())
    assert not re.search(r"(?:src|href)=\"(?!data:)", html)
    assert html.count("<td>0.self_attn.q_proj</td>") == 1
    rows = table_rows(details)
    assert len(rows) == len(details["layers"]) + 1
    assert all(len(row) == len(COLUMNS) for row in rows)


def test_pages_escape_what_they_show() -> None:
    html = page("a < b", [Paragraph(text="<script>"), HtmlTable(columns=["&"], rows=[["<i>"], ["x"]], total=True)])
    assert "<script>" not in html
    assert "<i>" not in html
    assert "a &lt; b" in html
    assert "<tr class=total><td>x</td></tr>" in html


@pytest.mark.slow
def test_the_same_twice(inspected, factors, tmp_path) -> None:
    _, output = inspected
    inspect(factors, sequences=HELD_OUT, scheme="int3-g32", batch_size=4, spectrum_passes=6, output=tmp_path / "again")
    for path in output.glob("*.png"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("curvature", ["activation", "guided:groups=4"])
def test_other_factors_and_other_text(curvature: str, model, text, tmp_path) -> None:
    collect_factors(model(), output=tmp_path / "factors", curvature=curvature, **{"calibration": str(text), **SETTINGS})
    details = inspect(tmp_path / "factors", data=str(text), sequences=16, scheme="int4-g32", spectrum_passes=0)
    layers = details["layers"]
    assert len(layers) == 14
    assert all(row["singular_values"] is None for row in layers.values())
    assert all(row["nilpotence"] == {"out": 1, "in": row["shape"][1]} for row in layers.values())
    assert 0 < details["total"]["j_ratio"] < 1
    seen = set(FactorsDirectory.open(tmp_path / "factors").header.sequence_ids)
    every = TokenBatch.of(windows(iter([text.read_text()]), load_tokenizer(model()), 32, most=16)).sequence_ids
    assert details["held_out"]["sequences"] == len([sequence for sequence in every if sequence not in seen]) < 16
    assert "16 were asked for" in details["warnings"][0]


def test_what_cannot_be_inspected_is_refused(factors, model, text, tmp_path, command) -> None:
    with pytest.raises(FactorsError, match="another model"):
        inspect(factors, model=model("qwen2"), scheme="int4-g32")
    with pytest.raises(SchemeError, match="spectrum_passes is 1"):
        inspect(factors, spectrum_passes=1)
    with pytest.raises(SchemeError, match="does not divide"):
        inspect(factors, scheme="int4-g128")
    with pytest.raises(SchemeError, match="expected 2 or more"):
        inspect(factors, sequences=1)
    with pytest.raises(DataError, match="must be a file"):
        inspect(factors, data="self", scheme="int4-g32")
    with pytest.raises(DataError, match="too little text"):
        inspect(factors, sequences=100000, scheme="int4-g32")
    shutil.copytree(factors, tmp_path / "half")
    next((tmp_path / "half").rglob("*.safetensors")).unlink()
    outcome = command("inspect", tmp_path / "half")
    assert outcome.code == 2
    assert "not complete" in outcome.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert command("inspect", factors, "-o", tmp_path / "full").code == 2


def test_command(factors, tmp_path, command) -> None:
    line = ("inspect", factors, "--scheme", "int4-g32", "--sequences", 4, "--spectrum-passes", 2, "-o", tmp_path / "out")
    outcome = command(*line, "--json", tmp_path / "details.json")
    assert outcome.code == 0
    assert "1.mlp.down_proj" in outcome.out
    assert "s2/s1" in outcome.out
    details = json.loads((tmp_path / "details.json").read_text())
    assert details == json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert FactorsDirectory.open(factors).factors().keys() == details["layers"].keys()
    assert details["factors"]["curvature"] == "auto"
