"""Several checkpoints of one model beside each other: the table in Markdown, and the page, of what `evaluate_several` has found.

A flip is a position where the most probable token is not the original's. Bytes are those of all files of weights, embedding and all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roundel.evaluate import plots
from roundel.evaluate.card import number, with_error
from roundel.evaluate.html import Paragraph, Picture, Table, page
from roundel.evaluate.report import ERRORS, KL, continuation_parts, labels

__all__ = ["COLUMNS", "compared_page", "compared_rows", "markdown"]

COLUMNS = ("checkpoint", "format", "MB", "KL, nats per token", "99 %", "99.9 %", "top-1", "flips", "perplexity")


def texts_of(details: Mapping[str, Any]) -> list[str]:
    """The SPECs of all texts."""
    return list(next(iter(details["models"].values()))["texts"])


def compared_rows(details: Mapping[str, Any], spec: str) -> list[list[str]]:
    """The cells of `COLUMNS` on one text, the original last."""
    rows, known = [], labels(details["models"])
    for name, own in details["models"].items():
        found = own["texts"][spec]
        kl, same = found["kl"], found["top1_agreement"]
        rows.append(
            [
                known[name],
                _format(own),
                f"{own['bytes'] / 1e6:.2f}",
                with_error(kl["mean"], kl["stderr"]),
                number(kl["p99"]),
                number(kl["p999"]),
                f"{100 * same:.2f} %",
                f"{round(found['tokens'] * (1 - same))} of {found['tokens']}",
                number(found["perplexity"]["model"]),
            ]
        )
    own, perplexity = details["original"], found["perplexity"]["reference"]
    return [*rows, ["original", _format(own), f"{own['bytes'] / 1e6:.2f}", "0", "0", "0", "100 %", "0", number(perplexity)]]


def _format(own: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (own["scheme"], own["format"])))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns stand below each other in a terminal as well; the first is flush left."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([line(columns), line(rule), *map(line, rows)])


def compared_page(details: Mapping[str, Any]) -> str:
    """Tables, KL against bytes for each text, and what each model has written."""
    parts: list[Paragraph | Table | Picture] = []
    known = labels(details["models"])
    for spec in texts_of(details):
        parts.append(Table(heading=spec, columns=COLUMNS, rows=compared_rows(details, spec), total=True))
        families: dict[str, list[tuple[str, float, float, float]]] = {}
        for name, own in details["models"].items():
            kl = own["texts"][spec]["kl"]
            if kl["mean"] > 0:  # a logarithm is taken
                families.setdefault(own["format"], []).append((known[name], own["bytes"] / 1e6, kl["mean"], kl["stderr"] or 0.0))
        if sum(map(len, families.values())) > 1:
            png = plots.rates(families, title=f"KL against size: {spec}", xlabel="files of weights, MB", ylabel=KL)
            parts.append(Picture(png=png, caption=f"The further left and down, the better. {ERRORS}"))
    floors = ", ".join(
        f"{number(found['duplicate']['kl'])} on {spec}" for spec, found in next(iter(details["models"].values()))["texts"].items()
    )
    parts.append(Paragraph(text=f"99 % and 99.9 %: percentiles of the tokens' KL. KL of the original against itself: {floors}."))
    parts += continuation_parts(details["continuations"], known)
    versions = ", ".join(f"{package} {version}" for package, version in details["versions"].items())
    return page(
        f"{len(details['models'])} checkpoints against {details['reference']}", [*parts, Paragraph(text=f"Measured with {versions}.")]
    )
