"""What collected factors are worth, linear by linear: `roundel inspect`.

On sequences that the factors have not seen: their cosine to the Fisher, the loss that feedback leaves (`J`), and the KL that the actual
rounding with a scheme is predicted to cost (`curvature.diagnose`). Of the factors themselves:

- Effective rank, the participation ratio `tr(H)^2 / |H|_F^2` of each side, from 1 to `d`, and how many eigenvalues make 90 % of the
  trace. Where rows have factors in groups, that of the two partial traces of the whole approximation.
- Condition number after damping, and the damping that was needed; the largest of all groups.
- Structural nilpotence degree of each side and the number of waves of two-sided feedback (`linalg.dependency`).

Of the Fisher itself: `sigma_2 / sigma_1` of the *rearranged* Fisher, whose rank is the number of Kronecker products in it. 0: one
product is all of it. The Ritz values of a few Krylov passes (`sketches.fastkron`), in-sample: the sums and the spectrum are of the same
held-out sequences, and with few of them the second value is too large.

Cost: one rounding of all linears to their own weights, one forward and backward pass for `diagnose`, one for each of `spectrum_passes`, and
eigenvalues and an LDL factor of every factor, about `2 d^3` flops in float64. Memory: all factors twice, and the Krylov vectors.
"""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roundel.artifacts.source import device_of
from roundel.calibration import data_hash
from roundel.curvature import collect, parse_curvature
from roundel.curvature.diagnose import diagnose, total
from roundel.curvature.sketches.fastkron import FastKronSums
from roundel.errors import NumericalError, SchemeError, in_layer
from roundel.evaluate import plots
from roundel.evaluate.html import Paragraph, Picture, Table, page
from roundel.linalg.dependency import structural_nilpotence
from roundel.linalg.ldl import damped_ldl
from roundel.models.experts import experts_of
from roundel.progress import Progress, Silent
from roundel.rounding.round import dequantized
from roundel.settings import Settings
from roundel.stages.collecting import OpenFactors, open_factors
from roundel.stages.linears import Linear, by_decoder_layer, round_linears
from roundel.stages.text import BATCH_TOKENS
from roundel.store import check_output, staged_directory, storage, write_json, write_text
from roundel.sweeps.gradients import steps
from roundel.types import Factors, RoundedWeight

__all__ = ["COLUMNS", "SHORT", "inspect", "table_rows"]

SCHEMA_VERSION = 1


def inspect(
    factors: str | Path,
    *,
    model: str | Path | None = None,
    data: str | None = None,
    sequences: int = 32,
    scheme: str = "int4-g128",
    damping: float = Settings.damping,
    sweeps: int = 4,
    spectrum_passes: int = 4,
    output: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Judges a factors directory on text that it has not seen.

    Args:
        factors: A complete directory that `collect_factors` made.
        model: By default the one that the factors name.
        data: Held-out text, a calibration SPEC other than `self`; by default more of the text that the factors were collected on.
        sequences: Held-out sequences, two or more; standard errors need some dozens.
        scheme: Its rounding is the one whose KL is predicted; linears whose width it cannot divide are skipped.
        damping: As for `quantize`; also in `J` and the condition numbers.
        sweeps: As for `quantize`.
        spectrum_passes: Krylov passes for the Fisher's spectrum; 0: leave it out.
        output: A directory to make, with `index.html`, `inspect.json` and the plots.
        device: As for `quantize`.
        dtype: As for `quantize`.
        batch_size: Sequences in a pass, two or more; by default about 4096 tokens. The Fisher's norm is taken over pairs in a batch, so the
            cosine depends on it, within its standard error.
        progress: Where to report; silent by default.

    Returns:
        The contents of `inspect.json`.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    if spectrum_passes < 0 or spectrum_passes == 1:
        raise SchemeError(f"spectrum_passes is {spectrum_passes}: expected 2 or more for the second singular value, or 0 to leave it out")
    if sequences < 2:
        raise SchemeError(f"{sequences} held-out sequences: expected 2 or more")
    if batch_size is not None and batch_size < 2:
        raise SchemeError(f"batch_size is {batch_size}: expected 2 or more, the Fisher's norm needs pairs of sequences")
    progress = progress or Silent()
    if output is not None:
        check_output(Path(output))
    opened = open_factors(
        factors,
        model=model,
        device=device,
        dtype=dtype,
        progress=progress,
        scheme=scheme,
        damping=damping,
        sweeps=sweeps,
        eval_data=data,
        eval_sequences=sequences,
    )
    skipped, warnings = dict(opened.source.skipped), []
    if len(opened.heldout) < sequences:
        warnings.append(f"only {len(opened.heldout)} held-out sequences of {opened.header.seq_len} tokens, {sequences} were asked for")
        progress.warn(warnings[-1])
    usable: dict[str, nn.Linear] = {}
    for name, linear in opened.source.linears.items():
        if experts_of(opened.source.model, name) is not None:
            skipped[name] = "an expert, whose rows of several sequences cannot be told apart"
        elif opened.factors[name].scale > 0:
            usable[name] = linear
        else:
            skipped[name] = "no usable gradient reached it"
    if not usable:
        raise NumericalError("no factors can be inspected: no usable gradient reached any linear")
    rounded, rounding, structure = _rounded(opened, usable, progress)
    batch = batch_size or max(2, BATCH_TOKENS // opened.header.seq_len)
    with progress.stage("held-out gradients", steps(opened.source.layers, usable) * len(opened.heldout)) as advance:
        found = diagnose(
            opened.source.layers,
            usable,
            {"": opened.factors},
            opened.heldout,
            seed=opened.recipe.seed,
            batch_size=batch,
            damping=damping,
            advance=advance,
            errors={"": lambda name: usable[name].weight.detach().float().cpu() - dequantized(rounded[name])},
        )[""]
    for name in set(usable) - set(found):
        skipped[name] = "no held-out gradient reached it"
    if not found:
        raise NumericalError("no factors can be inspected: no held-out gradient reached any linear")
    spectrum = _spectrum(opened, {name: usable[name] for name in found}, spectrum_passes, batch, progress) if spectrum_passes else {}
    header, heldout = opened.header, opened.heldout
    details: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "inspection",
        "roundel": importlib.metadata.version("roundel"),
        "model": opened.source.name,
        "factors": {
            "path": str(factors),
            "curvature": header.curvature,
            "labels": header.labels,
            "calibration": header.calibration,
            "sequences": len(header.sequence_ids),
            "tokens": header.tokens,
            "seed": header.seed,
        },
        "held_out": {
            "source": data or f"{header.calibration} (not seen by the factors)",
            "sequences": len(heldout),
            "seq_len": header.seq_len,
            "sha256": data_hash(heldout),
            "batch_size": batch,
        },
        "scheme": scheme,
        "damping": damping,
        "sweeps": sweeps,
        "spectrum": {"passes": spectrum_passes, "in_sample": True},
        "total": total(found.values()).as_json(),
        "layers": {
            name: {**diagnosis.as_json(), **structure[name], "singular_values": spectrum.get(name), "rounding": rounding[name]}
            for name, diagnosis in found.items()
        },
        "skipped": skipped,
        "warnings": warnings,
    }
    if output is not None:
        _write(Path(output), details)
    return details


def _rounded(
    opened: OpenFactors, linears: Mapping[str, nn.Linear], progress: Progress
) -> tuple[dict[str, RoundedWeight], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Each linear's codes, the row that `quantize` reports of them, and the structure of its factors."""
    rounded: dict[str, RoundedWeight] = {}
    rows: dict[str, dict[str, Any]] = {}
    structure: dict[str, dict[str, Any]] = {}
    with progress.stage("rounding", len(linears)) as advance:
        for names in by_decoder_layer(linears):
            asked = []
            for name in names:
                asked.append(Linear.of(opened.source, name, factors=opened.factors[name], damping=opened.recipe.damping))
                with in_layer(name):
                    structure[name] = _structure(opened.factors[name], opened.recipe.damping)
            results = round_linears(opened.recipe, opened.grid, asked, device_of(opened.source.model))
            for name, (weight, row) in zip(names, results, strict=True):
                rounded[name], rows[name] = weight, row
            advance(len(names))
    return rounded, rows, structure


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One side of a group: eigenvalues ascending, and what damping makes of it."""

    values: Tensor
    condition: float
    nilpotence: int

    @classmethod
    def of(cls, H: Tensor, damping: float) -> _Side:
        _, L, used = damped_ldl(H, damping)
        values = torch.linalg.eigvalsh(H.double()).clamp(min=0)
        shift = used * values.mean()
        return cls(
            values=values,
            condition=((values[-1] + shift) / (values[0] + shift)).item(),
            nilpotence=structural_nilpotence(L),
        )


def _structure(factors: Factors, damping: float) -> dict[str, Any]:
    groups = [group for _, group in factors.row_groups()]
    outs, ins = [_Side.of(group.H_out, damping) for group in groups], [_Side.of(group.H_in, damping) for group in groups]
    values_out = torch.cat([group.scale * side.values for group, side in zip(groups, outs, strict=True)])
    if len(groups) == 1:
        values_in = ins[0].values
    else:
        whole = sum((group.scale * len(group.H_out) * group.H_in.double() for group in groups), torch.zeros(()))
        values_in = torch.linalg.eigvalsh(whole).clamp(min=0)
    return {
        "shape": [len(values_out), len(values_in)],
        "rank": {"out": _rank(values_out), "in": _rank(values_in)},
        "condition": {"out": max(side.condition for side in outs), "in": max(side.condition for side in ins)},
        "nilpotence": {"out": max(side.nilpotence for side in outs), "in": max(side.nilpotence for side in ins)},
        "waves": max(rows.nilpotence + columns.nilpotence - 1 for rows, columns in zip(outs, ins, strict=True)),
    }


def _rank(values: Tensor) -> dict[str, float]:
    """Participation ratio and how many eigenvalues make 90 % of the trace, as numbers and as fractions of the width."""
    effective = (values.sum().square() / values.square().sum()).item()
    shares = values.sort(descending=True).values.cumsum(0) / values.sum()
    needed = int((shares < 0.9 - 1e-12).sum()) + 1
    return {
        "effective": effective,
        "effective_fraction": effective / len(values),
        "for_90_percent": needed,
        "for_90_percent_fraction": needed / len(values),
    }


def _spectrum(
    opened: OpenFactors, linears: Mapping[str, nn.Linear], passes: int, batch: int, progress: Progress
) -> dict[str, list[float] | None]:
    """Leading singular values of each rearranged Fisher, in-sample; None where there are not two."""
    estimator = parse_curvature(f"fastkron:steps={passes}:tolerance=0")  # the second value converges after the first
    with progress.stage("spectrum of the Fisher", steps(opened.source.layers, linears) * len(opened.heldout)) as advance:
        sketches = collect(
            opened.source.layers,
            linears,
            opened.heldout,
            estimator,
            seed=opened.recipe.seed,
            batch_size=batch,
            advance=advance,
        )
    found: dict[str, list[float] | None] = {}
    for name, sketch in sketches.items():
        assert isinstance(sketch, FastKronSums)
        values = sketch.singular_values().tolist()
        found[name] = values if len(values) > 1 and values[0] > 0 else None
    return found


def _ratio(row: Mapping[str, Any]) -> float | None:
    values = row["singular_values"]
    return None if values is None else values[1] / values[0]


COLUMNS = (
    "linear",
    "d_out x d_in",
    "cosine",
    "J ratio",
    "KL predicted",
    "rank out, in %",
    "90 % out, in",
    "s2/s1",
    "condition out, in",
    "waves",
    "damping",
)
"""Of `table_rows`; ranks are effective ranks and eigenvalues for 90 % of the trace, both in per cent of the width."""

SHORT = ("linear", "cosine", "J ratio", "KL predicted", "rank out, in %", "s2/s1", "condition out, in", "waves")
"""Those that a terminal has room for."""


def table_rows(details: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> list[list[str]]:
    """A row of text for each linear, and one for all."""
    rows = []
    for name, row in details["layers"].items():
        rank, condition, ratio = row["rank"], row["condition"], _ratio(row)
        rows.append(
            {
                "linear": name.removeprefix("model.").removeprefix("layers."),
                "d_out x d_in": "{} x {}".format(*row["shape"]),
                **_diagnostics(row),
                "rank out, in %": _percent(rank, "effective_fraction"),
                "90 % out, in": _percent(rank, "for_90_percent_fraction"),
                "s2/s1": "-" if ratio is None else f"{ratio:.2f}",
                "condition out, in": f"{condition['out']:.0f}, {condition['in']:.0f}",
                "waves": str(row["waves"]),
            }
        )
    rows.append({"linear": "all", **_diagnostics(details["total"])})
    return [[row.get(column, "") for column in columns] for row in rows]


def _diagnostics(row: Mapping[str, Any]) -> dict[str, str]:
    def rounded(name: str) -> str:
        error = row[f"{name}_stderr"]
        return f"{row[name]:.3f}" + ("" if error is None else f" ± {error:.3f}")

    return {
        "cosine": rounded("cosine"),
        "J ratio": rounded("j_ratio"),
        "KL predicted": _with_error(row["predicted_kl"], row["predicted_kl_stderr"]),
        "damping": f"{row['damping']:g}",
    }


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.1g}"


def _percent(rank: Mapping[str, Mapping[str, float]], name: str) -> str:
    return ", ".join(f"{100 * rank[side][name]:.0f}" if rank[side][name] >= 0.0995 else f"{100 * rank[side][name]:.1f}" for side in rank)


# The page


def _series(
    layers: Mapping[str, Any], value: Callable[[Any], float], error: Callable[[Any], float | None] = lambda _row: None, *, add: bool = False
) -> plots.Series:
    """Points by kind of linear; where a decoder layer has several of a kind, their sum or their mean without an error."""
    found: dict[str, dict[int, list[plots.Point]]] = defaultdict(lambda: defaultdict(list))
    for name, row in layers.items():
        kind, layer = plots.place(name)
        found[kind][layer].append(plots.Point(layer=layer, value=value(row), error=error(row)))
    return {
        kind: [
            points[0] if len(points) == 1 else plots.Point(layer=layer, value=sum(p.value for p in points) / (1 if add else len(points)))
            for layer, points in sorted(by_layer.items())
        ]
        for kind, by_layer in found.items()
    }


def _pictures(details: Mapping[str, Any]) -> dict[str, Picture]:
    """By file name."""
    layers, scheme, curvature = details["layers"], details["scheme"], details["factors"]["curvature"]
    errors = "Bars are standard errors over held-out sequences."

    def diagnostic(name: str) -> plots.Series:
        return _series(layers, lambda row: row[name], lambda row: row[f"{name}_stderr"])

    def ranks(name: str) -> dict[str, plots.Series]:
        return {f"H_{side}": _series(layers, lambda row: row["rank"][side][name]) for side in ("out", "in")}  # noqa: B023 (called at once)

    pictures = {
        "predicted-kl.png": Picture(
            heading="Predicted KL",
            png=plots.stacked_bars(
                _series(layers, lambda row: row["predicted_kl"], add=True),
                title=f"KL predicted for rounding to {scheme}",
                ylabel="nats per token",
            ),
            caption=f"1/2 E<G, E>^2 of the actual rounding to {scheme} with these factors, on held-out gradients, by decoder layer.",
        ),
        "j-ratio.png": Picture(
            heading="Loss that feedback leaves",
            png=plots.lines(
                {"": diagnostic("j_ratio")},
                title=f"J ratio, curvature {curvature}, held out",
                ylabel="J / J of nearest rounding",
                reference=1.0,
            ),
            caption=f"J(A, B) / J(I, I): the share of nearest rounding's expected loss that feedback leaves; lower is better. {errors}",
        ),
        "cosine.png": Picture(
            heading="Cosine to the Fisher",
            png=plots.lines(
                {"": diagnostic("cosine")}, title=f"Cosine to the Fisher, curvature {curvature}, held out", ylabel="cosine", reference=1.0
            ),
            caption=f"How similar the factors are to the Fisher; a diagnostic, it does not rank estimators as the KL does. {errors}",
        ),
        "rank.png": Picture(
            heading="Effective rank",
            png=plots.lines(
                ranks("effective_fraction"), title="Effective rank of the factors", ylabel="tr(H)^2 / |H|^2, of the width", percent=True
            ),
            caption="Participation ratio of each factor's eigenvalues in per cent of its width: 100 % for the identity. Before damping.",
        ),
        "rank90.png": Picture(
            png=plots.lines(
                ranks("for_90_percent_fraction"),
                title="Eigenvalues that make 90 % of the trace",
                ylabel="number of eigenvalues, of the width",
                percent=True,
            ),
            caption="How many of the largest eigenvalues make 90 % of each factor's trace, in per cent of its width. Before damping.",
        ),
    }
    known = [ratio for row in layers.values() if (ratio := _ratio(row)) is not None]
    if known:
        pictures["spectrum.png"] = Picture(
            heading="How many Kronecker products the Fisher is",
            png=plots.histogram(
                known,
                title="Second over first singular value of the rearranged Fisher",
                xlabel="sigma_2 / sigma_1 (0: one Kronecker product is all)",
                ylabel="number of linears",
            ),
            caption=f"Ritz values of {details['spectrum']['passes']} Krylov passes, in-sample on the {details['held_out']['sequences']} "
            "held-out sequences: with few sequences the second value is too large.",
        )
    return pictures


def _summary(details: Mapping[str, Any]) -> Table:
    factors, heldout, shown = details["factors"], details["held_out"], _diagnostics(details["total"])
    rows = [
        ["factors", f"{factors['path']}: {factors['curvature']}, labels {factors['labels']}"],
        ["collected on", f"{factors['calibration']}: {factors['sequences']} sequences, {factors['tokens']} tokens"],
        ["judged on", f"{heldout['source']}: {heldout['sequences']} sequences of {heldout['seq_len']} tokens"],
        ["linears, skipped", f"{len(details['layers'])}, {len(details['skipped'])}"],
        ["KL predicted, nats per token", f"{shown['KL predicted']} ({details['scheme']})"],
        ["J ratio", shown["J ratio"]],
        ["cosine to the block-diagonal Fisher", shown["cosine"]],
        ["damping, the largest", shown["damping"]],
    ]
    return Table(columns=["", ""], rows=rows)


def _write(target: Path, details: dict[str, Any]) -> None:
    pictures = _pictures(details)
    parts: list[Paragraph | Table | Picture] = [_summary(details), *pictures.values()]
    parts.append(Table(heading="All linears", columns=COLUMNS, rows=table_rows(details), total=True))
    parts.append(
        Paragraph(
            text="rank: effective rank in per cent of the width; 90 %: eigenvalues for 90 % of the trace, likewise; s2/s1: singular values "
            "of the rearranged Fisher, in-sample; condition: after damping; waves: steps of two-sided feedback, structural nilpotence "
            "degrees of both sides less one."
        )
    )
    if details["skipped"]:
        skipped = [[name, reason] for name, reason in details["skipped"].items()]
        parts.append(Table(heading="Skipped", columns=["linear", "reason"], rows=skipped))
    with staged_directory(target) as staging:
        for name, picture in pictures.items():
            with storage(target / name):
                (staging / name).write_bytes(picture.png)
        write_json(staging / "inspect.json", details)
        write_text(staging / "index.html", page(f"Factors of {details['model']}", parts))
