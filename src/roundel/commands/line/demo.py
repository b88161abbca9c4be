"""`demo`: the three methods on the embedded model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from roundel.commands.line.options import JsonFile, Quiet
from roundel.commands.line.output import emit

__all__ = ["demo"]


def demo(
    scheme: Annotated[str, typer.Option(help="As for quantize.")] = "int3-g64",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the best checkpoint there.")] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Quantize the embedded model by nearest rounding, by GPTQ and by Roundel, and compare them on held-out text."""
    from rich.console import Console
    from rich.table import Table

    from roundel.evaluate.card import number, with_error
    from roundel.progress import make_progress
    from roundel.recipes import BEST, GPTQ, NEAREST
    from roundel.stages.quantize import quantize as run
    from roundel.store import check_output

    methods: dict[str, dict[str, Any]] = {"nearest": NEAREST, "activation (GPTQ)": GPTQ, "Roundel": BEST}
    progress = make_progress(quiet=quiet)
    if output is not None:
        check_output(output)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="roundel-demo-") as scratch:
        for index, (title, recipe) in enumerate(methods.items()):
            progress.say(f"--- {title}")
            best = index == len(methods) - 1
            rows[title] = run(
                "demo",
                output=output if best and output is not None else Path(scratch) / str(index),
                scheme=scheme,
                calibration="stdlib",
                eval_data="stdlib-heldout",
                sequences=192,
                seq_len=256,
                eval_sequences=96,
                progress=progress,
                **recipe,
            )
    emit({title: result.details for title, result in rows.items()}, json_file)
    if not quiet and str(json_file) != "-":
        table = Table(title=f"The demo model in {scheme}, on text it has never seen")
        for column in ("method", "KL, nats/token", "top-1", "perplexity", "seconds"):
            table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
        for title, result in rows.items():
            report = result.report
            table.add_row(
                title,
                with_error(report.kl_mean, report.kl_stderr),
                f"{100 * report.top1_agreement:.1f} %",
                number(report.perplexity_model),
                f"{sum(result.details['seconds'].values()):.0f}",
            )
        table.add_section()
        table.add_row("original", "0", "100 %", number(report.perplexity_reference), "")
        Console().print(table)
        kl = [result.report.kl_mean for result in rows.values()]
        print(f"Roundel loses {100 * (1 - kl[2] / kl[1]):.0f} % less than GPTQ and {100 * (1 - kl[2] / kl[0]):.0f} % less than")
        print(f"nearest rounding, in the same format and at the same {result.details['bits_per_weight']['quantized']:.2f} bits per weight.")
        if output is not None:
            print(f"Kept: {output}")
