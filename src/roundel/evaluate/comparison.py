"""A comparison of methods as tables, plots and a page: what `roundel compare` writes of its rows.

Two kinds of error are told apart. `kl_stderr` is over held-out sequences, of the mean over seeds. Methods share the sequences, so their
*ratio* to the first method is known better than that: its error comes from the paired differences by sequence, and from the spread over
seeds.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from roundel.evaluate import plots
from roundel.evaluate.html import Paragraph, Picture, Table, page
from roundel.store import write_json, write_text

__all__ = ["COMPARED", "PRINTED", "compared_rows", "summary_rows", "write_comparison"]

COMPARED = (
    "scheme",
    "bits",
    "sequences",
    "method",
    "KL",
    "ratio to the first",
    "J ratio",
    "cosine",
    "passes",
    "seconds",
    "rounding s",
    "MiB",
)
"""Columns of the table on the page."""

PRINTED = ("sequences", "method", "KL", "ratio to the first", "J ratio", "seconds")
"""Columns of the tables that are printed, one for each scheme."""


def _error(values: Iterable[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    known = list(values)
    return statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0


def summary_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of each scheme, number of sequences and method, with errors (see the module's docstring).

    `ratio` is the KL over that of the first method with the same scheme, number of sequences and seeds.
    """
    groups: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        groups.setdefault((row["scheme"], row["sequences"]), {}).setdefault(row["method"], []).append(row)
    found = []
    for (scheme, sequences), methods in groups.items():
        first = next(iter(methods.values()))
        for method, own in methods.items():
            by_sequence = torch.tensor([row["sequence_kl"] for row in own], dtype=torch.float64)
            reference = torch.tensor([row["sequence_kl"] for row in first], dtype=torch.float64)
            ratios = [row["kl"] / base["kl"] for row, base in zip(own, first, strict=True)]
            paired = (by_sequence.mean(0) - reference.mean(0)).tolist()
            found.append(
                {
                    "scheme": scheme,
                    "sequences": sequences,
                    "method": method,
                    "seeds": len(own),
                    "kl": statistics.fmean(row["kl"] for row in own),
                    "kl_stderr": _error(by_sequence.mean(0).tolist()),
                    "ratio": statistics.fmean(ratios),
                    "ratio_stderr": math.hypot(_error(paired) / reference.mean().item(), _error(ratios)),
                    **{
                        key: statistics.fmean(row[key] for row in own)
                        for key in ("bits_per_weight", "top1_agreement", "perplexity", "proxy_kl", "collect_seconds", "rounding_seconds")
                    },
                    **{
                        key: statistics.fmean(row[key] for row in own) if all(row.get(key) is not None for row in own) else None
                        for key in ("j_ratio", "cosine")
                    },
                    **{key: own[0][key] for key in ("tokens", "passes", "state_bytes")},
                }
            )
    return found


def write_comparison(target: Path, details: dict[str, Any]) -> None:
    """All files of the comparison."""
    summary: list[dict[str, Any]] = details["summary"]
    write_json(target / "compare.json", details)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(summary[0]))
    writer.writeheader()
    writer.writerows(summary)
    write_text(target / "summary.csv", table.getvalue())
    lines = [COMPARED, ["---"] * len(COMPARED), *compared_rows(summary)]
    write_text(target / "summary.md", "".join(f"| {' | '.join(cells)} |\n" for cells in lines))
    counts, schemes, methods = details["sequences"], details["schemes"], details["methods"]
    model = Path(details["model"]).name if Path(details["model"]).exists() else details["model"]
    most = max(counts)
    largest = [row for row in summary if row["sequences"] == most]
    sweeps = max(method["sweeps"] for method in methods.values())
    ranked = {
        f"{scheme}: {name}": points
        for scheme in schemes
        for key, name in (("j_ratio", "held-out J / J(nearest)"), ("cosine", "cosine to the Fisher"))
        if (
            points := [
                (row["method"], row[key], row["kl"])
                for row in largest
                if row["scheme"] == scheme and row[key] is not None and methods[row["method"]]["sweeps"] == sweeps
            ]
        )
    }
    pictures = {
        "kl.png": (
            plots.intervals(
                {
                    scheme: [(row["method"], row["kl"], row["kl_stderr"]) for row in largest if row["scheme"] == scheme]
                    for scheme in schemes
                },
                title=f"{model}: KL on held-out text, {most} calibration sequences",
                xlabel="KL(original || quantized), nats per token",
            ),
            "Mean over seeds; bars are standard errors over held-out sequences.",
        ),
    }
    if len(schemes) > 3:
        families: dict[str, list[tuple[str, float, float, float]]] = {}
        for row in largest:
            kind = re.sub(r"\d+.*", "", row["scheme"]) + (f", {row['method']}" if len(methods) > 1 else "")
            families.setdefault(kind, []).append((row["scheme"], row["bits_per_weight"], row["kl"], row["kl_stderr"]))
        pictures["rates.png"] = (
            plots.rates(families, title=f"{model}: KL against bits per weight", ylabel="KL(original || quantized), nats per token"),
            "Bits count everything stored for the quantized linears. Bars are standard errors over held-out sequences.",
        )
    if ranked:  # nothing is diagnosed with fewer than two held-out sequences
        pictures["ranking.png"] = (
            plots.scatter(ranked, title="What ranks the methods?", ylabel="KL, nats per token", columns=2),
            f"Each point is a method, all with {sweeps} sweeps. A quantity ranks methods if the points rise or fall in order.",
        )
    if len(counts) > 1:
        pictures["sequences.png"] = (
            plots.curves(
                {
                    scheme: {
                        method: [
                            (row["sequences"], row["kl"], row["kl_stderr"])
                            for row in summary
                            if row["scheme"] == scheme and row["method"] == method
                        ]
                        for method in methods
                    }
                    for scheme in schemes
                },
                title=f"{model}: KL against calibration data",
                xlabel="calibration sequences",
                ylabel="KL, nats per token",
            ),
            "Mean over seeds; bars are standard errors over held-out sequences.",
        )
    agreed = {
        scheme: [
            (row["proxy_kl"], row["kl"])
            for row in summary
            if row["scheme"] == scheme and row["method"] != "nearest" and row["proxy_kl"] > 0
        ]
        for scheme in schemes
    }
    if any(agreed.values()):
        pictures["predicted.png"] = (
            plots.agreement(
                {scheme: points for scheme, points in agreed.items() if points},
                title=f"{model}: proxy loss and measured KL",
                xlabel="sum of the proxy losses 1/2 tr(E^T H_out E H_in), nats per token",
                ylabel="KL(original || quantized), nats per token",
            ),
            "Each point is a method with the curvature that it rounded with; in-sample on calibration text, so mostly below the KL.",
        )
    for name, (png, _) in pictures.items():
        (target / name).write_bytes(png)
    body: list[Paragraph | Table | Picture] = [
        Paragraph(
            text=f"{details['model']}, {details['seeds']} seeds, calibrated on {details['recipe']['calibration']}. "
            "J ratio: share of nearest rounding's expected loss that feedback leaves on held-out gradients. Seconds and MiB are of the "
            "collection: as if the estimator ran alone, and of its sums."
        ),
        Table(columns=COMPARED, rows=compared_rows(summary)),
        *(Picture(png=png, caption=caption) for png, caption in pictures.values()),
    ]
    write_text(target / "index.html", page(f"Curvature estimators on {model}", body))


def compared_rows(summary: Sequence[dict[str, Any]], columns: Sequence[str] = COMPARED) -> list[list[str]]:
    """The cells of the table's rows."""
    return [[_cells(row)[column] for column in columns] for row in summary]


def _cells(row: dict[str, Any]) -> dict[str, str]:
    def optional(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    error = row["kl_stderr"]
    places = 1 - math.floor(math.log10(error)) if error > 0 else 5  # two digits of the error
    return {
        "scheme": row["scheme"],
        "bits": f"{row['bits_per_weight']:.3f}",
        "sequences": str(row["sequences"]),
        "method": row["method"],
        "KL": f"{row['kl']:.{places}f} ± {row['kl_stderr']:.{places}f}",
        "ratio to the first": f"{row['ratio']:.3f} ± {row['ratio_stderr']:.3f}",
        "J ratio": optional(row["j_ratio"]),
        "cosine": optional(row["cosine"]),
        "passes": str(row["passes"]),
        "seconds": f"{row['collect_seconds']:.1f}",
        "rounding s": f"{row['rounding_seconds']:.1f}",
        "MiB": f"{row['state_bytes'] / 2**20:.1f}",
    }
