"""`plan`: what `quantize` would make and take."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from roundel.commands.line.options import recipe_settings
from roundel.commands.line.output import emit, print_rows
from roundel.commands.line.quantize import quantize

__all__ = ["plan"]

OTHERS = ("output", "factors", "work", "batch_size")
"""Options of `quantize` that say nothing about how much it takes."""


def plan(
    context: typer.Context,
    *,
    model: str,
    time: str | None,
    memory: str | None,
    device: str,
    dtype: str,
    json_file: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """What quantize would make of MODEL (config.json is enough), and what it would take on this machine: in seconds, before any work."""
    from roundel.progress import make_progress
    from roundel.stages.plan import duration
    from roundel.stages.plan import plan as run

    found = run(
        model,
        memory=memory,
        limit=None if time is None else duration(time),
        device=device,
        dtype=dtype,
        progress=make_progress(quiet=quiet),
        **recipe_settings(context, options),
    )
    if not quiet and str(json_file) != "-":
        _show(found)
    emit(found, json_file)


def _show(found: dict[str, Any]) -> None:
    from roundel.progress import duration

    coverage = found["coverage"]
    rows = [
        ["linears", f"{found['linears']}, {100 * coverage['share']:.1f} % of the weights of the decoder layers' matrices"],
        *([f"{count} stay", reason] for reason, count in found["skipped"].items()),
        ["written", f"{found['scheme']} as {found['format']}, {found['bits_per_weight']:.2f} bits a weight"],
        ["size", f"{_gigabytes(found['bytes']['output'])} of {_gigabytes(found['bytes']['source'])}"],
        ["memory", f"{_gigabytes(found['memory']['main'])}, and {_gigabytes(found['memory']['disk'])} of temporary files at most"],
        *([name, duration(spent)] for name, spent in found["seconds"].items() if spent >= 1),
        ["time", f"{duration(found['total_seconds'])}, as {found['timed']} takes it here"],
    ]
    if "fits" in found:
        fits = found["fits"]
        rows += [[f"--effort {name}", f"{duration(own['seconds'])}, {_gigabytes(own['main'])}"] for name, own in fits["efforts"].items()]
        rows.append(["fits", f"--effort {fits['best']}" if fits["best"] else "none: give more time or memory, or fewer --sequences"])
    print_rows(found["model"], rows)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _with_options_of_quantize() -> None:
    """Gives `plan` the parameters of `quantize`, by which Typer makes its options, and `--time`."""
    hints = get_type_hints(quantize, include_extras=True)
    limit = typer.Option(metavar="TIME", help="How long it may take, such as 45m or 2h: says which --effort fits, with --memory.")
    hints["time"] = Annotated[str | None, limit]
    own = [own for name, own in inspect.signature(quantize).parameters.items() if name not in OTHERS]
    own.append(inspect.Parameter("time", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None))
    plan.__signature__ = inspect.Signature([each.replace(annotation=hints[each.name]) for each in own])  # type: ignore[attr-defined]
    plan.__annotations__ = {each.name: hints[each.name] for each in own}


_with_options_of_quantize()
