"""What was measured as a page to look at: of a quantized checkpoint (`report.html`), and of an evaluation.

Everything on the page is in the report's JSON; the page is made of that alone. References to the numbers: `docs/reading-a-report.md`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from roundel.evaluate import plots
from roundel.evaluate.card import number, with_error
from roundel.evaluate.html import Paragraph, Picture, Table, page

__all__ = [
    "TASK_COLUMNS",
    "checkpoint_rows",
    "continuation_parts",
    "continuation_rows",
    "divergence_rows",
    "duplicate_row",
    "evaluated_page",
    "labels",
    "perplexity_rows",
    "quantized_page",
    "task_rows",
]

KL = "KL(original || quantized), nats per token"
ERRORS = "Bars are standard errors over sequences."

Part = Paragraph | Table | Picture


def quantized_page(details: Mapping[str, Any]) -> str:
    """Of roundel.json."""
    measured, predicted = details["evaluation"], details["predicted_kl"]
    name, layers = details["model"]["name"], details["layers"]
    rows = [
        *checkpoint_rows(details),
        ["scheme, format", f"{details['scheme']}, {details['format']}"],
        ["curvature, seed", f"{details['curvature']}, {details['seed']}"],
        ["calibrated on", "{source}: {sequences} sequences of {seq_len} tokens".format(**details["calibration"])],
        ["evaluated on", f"{measured['source']}: overlap with the calibration text {100 * measured['overlap_with_calibration']:.1f} %"],
        ["seconds", ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in details["seconds"].items())],
    ]
    parts: list[Part] = [Table(columns=["", ""], rows=rows)]
    if details["warnings"]:
        parts.append(
            Table(heading="Warnings", columns=["done in another way than asked for"], rows=[[line] for line in details["warnings"]])
        )
    parts += [
        _predicted_and_measured(predicted, measured),
        _heat_map(layers),
        *_positions({"": measured}),
        *continuation_parts(details.get("continuations", [])),
        *_tuning(details["tuning"]),
        *_bits(layers),
        Table(
            heading="All linears",
            columns=["linear", "d_out x d_in", "scheme", "bits per weight", "KL predicted", "proxy loss", "damping"],
            rows=[
                [
                    linear,
                    " x ".join(map(str, row["shape"])),
                    row["scheme"],
                    f"{row['bits_per_weight']:.3f}",
                    number(row["predicted_kl"]),
                    number(row["proxy_loss"]),
                    number(row["damping"]),
                ]
                for linear, row in layers.items()
            ],
        ),
    ]
    if details["skipped"]:
        parts.append(
            Table(heading="Left as they were", columns=["linear", "reason"], rows=[list(row) for row in details["skipped"].items()])
        )
    versions = ", ".join(f"{package} {version}" for package, version in details["versions"].items())
    parts.append(Paragraph(text=f"Made by Roundel {details['roundel']} with {versions}. roundel.json has every number of this page."))
    return page(f"{name} in {details['scheme']}", parts)


def evaluated_texts(details: Mapping[str, Any]) -> dict[str, Any]:
    """What `evaluate` has found on each text; a single one stands in no list of its own."""
    return details.get("texts") or ({details["data"]: details} if "data" in details else {})


def evaluated_page(details: Mapping[str, Any]) -> str:
    """Of what `evaluate` has found."""
    texts = evaluated_texts(details)
    parts: list[Part] = []
    for spec, found in texts.items():
        parts.append(Table(heading=spec, columns=["", ""], rows=[*divergence_rows(found), duplicate_row(found)]))
    if len(texts) > 1:
        known = labels(texts)
        compared = [(known[spec], found["kl"]["mean"], found["kl"]["stderr"] or 0.0) for spec, found in texts.items()]
        png = plots.intervals({"": compared}, title="KL on each text", xlabel=KL)
        parts.append(Picture(heading="KL on each text", png=png, caption=ERRORS))
    parts += _positions(texts)
    for named, found in details.get("windowed_perplexity", {}).items():
        parts.append(Table(heading=f"Perplexity, {named}", columns=["", ""], rows=perplexity_rows(found)))
    if tasks := details.get("tasks"):
        parts.append(Table(heading="Tasks, in %", columns=TASK_COLUMNS, rows=task_rows(tasks)))
    parts += continuation_parts(details.get("continuations", []))
    return page(f"{details['model']} against {details['reference']}", parts)


def labels(specs: Iterable[str]) -> dict[str, str]:
    """What tells texts apart in a plot: as many of the last parts of their paths as are needed for it."""
    paths = {spec: spec.split("/") for spec in specs}
    for parts in range(1, max(map(len, paths.values()), default=0)):
        ends = {spec: "/".join(path[-parts:]) for spec, path in paths.items()}
        if len(set(ends.values())) == len(ends) and all(ends.values()):
            return ends
    return {spec: spec for spec in paths}


def continuation_rows(row: Mapping[str, Any], known: Mapping[str, str] | None = None) -> list[list[str]]:
    """Of one beginning: who wrote, how much of it as the original, what; `known` are other names for the models."""
    rows = [["original", "", row["original"]["text"]]]
    for name, own in row["continued"].items():
        rows.append([(known or {}).get(name, name), f"{own['equal_tokens']} of {own['tokens']}", own["text"]])
    return rows


def continuation_parts(found: Sequence[Mapping[str, Any]], known: Mapping[str, str] | None = None) -> list[Part]:
    """What the original and others have written after the same beginnings."""
    if not found:
        return []
    about = (
        "The most probable token at each step. After the first that differs texts part, so one text says little; the count is of the "
        "tokens before it. The beginnings are the headings."
    )
    columns = ("", "as the original", "what follows")
    tables = [Table(heading=f"{row['prompt']} …", columns=columns, rows=continuation_rows(row, known), prose=True) for row in found]
    return [Paragraph(heading="The same beginnings continued", text=about), *tables]


def divergence_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """What the terminal and the page show of a divergence."""
    kl, perplexity, agreement = found["kl"], found["perplexity"], found["top1_agreement"]
    rows = [["KL(original, quantized), nats per token", with_error(kl["mean"], kl["stderr"])]]
    if kl["interval95"] is not None:
        rows.append(["95 % of it, by bootstrap", " to ".join(map(number, kl["interval95"]))])
    return [
        *rows,
        ["KL, median and 99th percentile", f"{number(kl['median'])}, {number(kl['p99'])}"],
        *([["KL, 99.9th percentile", number(kl["p999"])]] if "p999" in kl else []),  # older reports have none
        ["top-1 agreement", f"{100 * agreement:.2f} %: {100 * (1 - agreement):.2f} % flips"],
        ["perplexity, quantized and original", f"{number(perplexity['model'])}, {number(perplexity['reference'])}"],
        ["tokens, sequences", f"{found['tokens']}, {found['sequences']}"],
    ]


def duplicate_row(found: Mapping[str, Any]) -> list[str]:
    """The noise floor."""
    return ["KL of the original against itself", number(found["duplicate"]["kl"])]


def perplexity_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Of perplexity over windows."""
    return [
        ["perplexity, quantized and original", f"{number(found['model'])}, {number(found['reference'])}"],
        ["logarithm of their quotient", with_error(found["log_ratio"], found["log_ratio_stderr"])],
        ["windows, tokens in each", f"{found['windows']}, {found['window']}"],
    ]


def checkpoint_rows(details: Mapping[str, Any]) -> list[list[str]]:
    """Of a quantized checkpoint: what was measured, and its size."""
    predicted, bits = details["predicted_kl"], details["bits_per_weight"]
    rows = divergence_rows(details["evaluation"])
    if details["tuning"] is not None:
        kl = details["tuning"]["held_out_kl"]
        rows.append(["KL on other text before and after tuning", f"{number(kl['before'])}, {number(kl['after'])}"])
    return [
        *rows,
        ["KL predicted", with_error(predicted[predicted["by"]], predicted[f"{predicted['by']}_stderr"])],
        ["bits per weight: quantized linears", f"{bits['quantized']:.3f}"],
        ["bits per weight: whole checkpoint", f"{bits['model']:.3f}"],
        *[["share of the decoder's weights that is quantized", f"{100 * own['share']:.1f} %"] for own in [details.get("coverage")] if own],
        ["linears quantized, left as they were", f"{len(details['layers'])}, {len(details['skipped'])}"],
    ]


def _predicted_and_measured(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> Picture:
    rows = [
        ("measured", measured["kl"]["mean"], measured["kl"]["stderr"] or 0.0),
        ("predicted, linears together", predicted["joint"], predicted["joint_stderr"] or 0.0),
        ("predicted, sum of linears", predicted["total"], predicted["total_stderr"] or 0.0),
    ]
    return Picture(
        heading="Predicted and measured",
        png=plots.intervals({"": rows}, title="KL, predicted by gradients and measured", xlabel=KL),
        caption=f"1/2 E<G, E>^2 of the rounding errors on the evaluation text. Together far below the sum: errors make up for each other; "
        f"measured far above both: errors are too large for a quadratic, or inputs are rounded as well (-a8, -a4). {ERRORS}",
    )


def _heat_map(layers: Mapping[str, Any]) -> Picture:
    cells: dict[str, dict[int, float]] = {}
    for linear, row in layers.items():
        kind, layer = plots.place(linear)
        own = cells.setdefault(kind, {})
        own[layer] = own.get(layer, 0.0) + row["predicted_kl"]
    return Picture(
        heading="Where it is lost",
        png=plots.heat_map(cells, title="KL predicted for each linear", label="nats per token"),
        caption="1/2 E<G, E>^2 of each linear by itself, on the evaluation text; several of a kind in a decoder layer are added up.",
    )


def _positions(texts: Mapping[str, Mapping[str, Any]]) -> list[Part]:
    known = labels(texts)
    found = {
        known[spec] or "KL": [
            ((each["first"] + each["last"]) / 2, each["mean"], each["stderr"] or 0.0) for each in text["kl"]["by_position"]
        ]
        for spec, text in texts.items()
    }
    if not found:
        return []
    return [
        Picture(
            heading="Along a sequence",
            png=plots.curves(
                {"": found}, title="KL by position", xlabel="position in the sequence, tokens", ylabel="nats per token", doubling=False
            ),
            caption=f"Means over parts of equal length of all sequences. {ERRORS}",
        )
    ]


def _tuning(tuning: Mapping[str, Any] | None) -> list[Part]:
    if tuning is None or not all("held_out_kl" in row and "step" in row for row in tuning["history"]):
        return []
    history = tuning["history"]
    lines = {"text not seen": [(row["step"], row["held_out_kl"], 0.0) for row in history]}
    if seen := [(row["step"], row["calibration_kl"], 0.0) for row in history if "calibration_kl" in row]:
        lines["calibration text"] = seen
    return [
        Picture(
            heading="Tuning",
            png=plots.curves({tuning["method"]: lines}, title="KL against steps", xlabel="step", ylabel="nats per token", doubling=False),
            caption=f"The state of step {tuning['best_step']} was taken. Calibration text: the mean over the steps since the point before.",
        )
    ]


def _bits(layers: Mapping[str, Any]) -> list[Part]:
    if len({row["scheme"] for row in layers.values()}) < 2:
        return []
    cells: dict[str, dict[int, float]] = {}
    for linear, row in layers.items():
        kind, layer = plots.place(linear)
        cells.setdefault(kind, {})[layer] = row["bits_per_weight"]
    png = plots.heat_map(cells, title="Bits of each linear", label="bits per weight", logarithmic=False)
    return [Picture(heading="Bits", png=png, caption="Everything stored for a linear; of several of a kind in a decoder layer, the last.")]


TASK_COLUMNS = ("task", "metric", "quantized", "original", "difference", "of")


def task_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The cells of `TASK_COLUMNS`, values in per cent."""
    pairs = (("value", "stderr"), ("reference", "reference_stderr"), ("difference", "difference_stderr"))
    rows = []
    for name, found in tasks.items():
        values = [f"{100 * found[value]:.2f}" + ("" if found[error] is None else f" ± {100 * found[error]:.2f}") for value, error in pairs]
        rows.append([name, found["metric"], *values, str(found["n"])])
    return rows
