"""Options that several commands have, and how values with structure are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from roundel.errors import SchemeError
from roundel.settings import Settings

__all__ = [
    "DEFAULT",
    "Batch",
    "Device",
    "Dtype",
    "JsonFile",
    "Memory",
    "Output",
    "Quiet",
    "TuneMethod",
    "TuneRest",
    "TuneSteps",
    "TuneTokens",
    "Work",
    "Written",
    "explicit",
    "listed",
    "recipe_settings",
    "two_numbers",
    "whole",
]

DEFAULT = Settings()

Batch = Annotated[int | None, typer.Option(min=1, help="Sequences per pass; default about 4096 tokens. Never changes the result.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="In which the model runs: auto (float32 on CPU, bfloat16 on GPU), float32 or bfloat16.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the whole report there; - is standard output.")]
TuneMethod = Annotated[
    str,
    typer.Option(
        "--tune",
        help="none; end-to-end: after rounding, steps of all codes and scales together under the KL of the whole model, much less loss for "
        "some minutes more; or blocks: one decoder layer at a time, in the memory of one. Trellises and lattices keep their codes.",
    ),
]
TuneSteps = Annotated[
    int | None, typer.Option("--tune-steps", min=1, help="Default: 640 end to end, 200 for each decoder layer with blocks.")
]
TuneTokens = Annotated[
    int | None,
    typer.Option("--tune-tokens", help="Tokens of one step, default 2048 end to end, 4096 with blocks; more than 4096 are accumulated."),
]
TuneRest = Annotated[
    bool | None,
    typer.Option(
        "--tune-rest/--no-tune-rest",
        help="Whether norms, biases, embedding and output head are tuned too; default: end to end, and with blocks (norms and biases only) "
        "where codes stay as they are.",
    ),
]
Work = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep finished and half-done work there: the same command goes on from it after a crash."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What each process may use, such as 8G, a quarter of it for hidden states; default: most of what is free. "
        "A larger model stays on the disk, one decoder layer at a time.",
    ),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Directory to make; must be new or empty.")]
Written = Annotated[Path, typer.Argument(help="A directory that quantize has written, in a format that keeps codes (not dense, not gguf).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]


def explicit(context: typer.Context, **values: Any) -> dict[str, Any]:
    """Those values whose options were given, not left at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in values}
    return {name: value for name, value in values.items() if (source := sources[name]) is None or source.name != "DEFAULT"}


def listed(text: str) -> list[str]:
    """The items between commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


def count_or_auto(given: str | int) -> int | str:
    """A number of sequences, or `auto`; a default comes as the number that it is."""
    return "auto" if given == "auto" else whole(str(given), "--sequences")


def whole(text: str, option: str) -> int:
    """A whole number.

    Raises:
        SchemeError: it is none.
    """
    if not text.isdecimal():
        raise SchemeError(f"{option} {text!r}: expected whole numbers, such as 64,512")
    return int(text)


def two_numbers(text: str, separator: str, expected: str, valid: Callable[[int, int], bool]) -> tuple[int, int]:
    """The numbers before and after the separator.

    Raises:
        SchemeError: they are none, or not `valid`.
    """
    first, found, second = text.partition(separator)
    if not found or not first.isdecimal() or not second.isdecimal() or not valid(int(first), int(second)):
        raise SchemeError(f"{text!r}: expected {expected}")
    return int(first), int(second)


def recipe_settings(context: typer.Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe among the values of a command's options, as far as a user has given them."""
    values = {field.name: given[field.name] for field in fields(Settings)}
    values["schemes"] = () if values["schemes"] is None else tuple(listed(values["schemes"]))
    values |= {name: tuple(values[name] or ()) for name in ("include", "exclude")}
    return explicit(context, **values)
