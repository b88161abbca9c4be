"""`refine`: a quantized model of others, better in the same bytes."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from roundel.commands.line.options import (
    DEFAULT,
    Batch,
    Device,
    Dtype,
    JsonFile,
    Memory,
    Output,
    Quiet,
    TuneMethod,
    TuneSteps,
    TuneTokens,
    Work,
    explicit,
)
from roundel.commands.line.output import emit, print_rows

__all__ = ["refine"]


def refine(
    context: typer.Context,
    quantized: Annotated[
        str,
        typer.Argument(help="A .gguf file, a directory or a Hub id: GGUF, compressed-tensors, GPTQ, AWQ, AutoRound, MLX or EXL3."),
    ],
    output: Output,
    reference: Annotated[str, typer.Option(metavar="MODEL", help="The original that it was made of: a local directory or a Hub id.")],
    transplant: Annotated[
        bool,
        typer.Option(
            "--transplant", help="The reference is another model of that shape, such as a fine-tuned one: its weights in this layout."
        ),
    ] = False,
    effort: Annotated[
        str, typer.Option(help="quick, normal or best, as for quantize; best tunes where the format allows it.")
    ] = DEFAULT.effort,
    calibration: Annotated[str, typer.Option(metavar="SPEC", help="As for quantize.")] = DEFAULT.calibration,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = DEFAULT.sequences,
    seq_len: Annotated[int, typer.Option(help="Tokens in each, at most the model's positions.")] = DEFAULT.seq_len,
    eval_data: Annotated[str | None, typer.Option(metavar="SPEC", help="As for quantize.")] = None,
    eval_sequences: Annotated[int, typer.Option(help="Evaluation sequences.")] = DEFAULT.eval_sequences,
    curvature: Annotated[str, typer.Option(help="As for quantize.")] = DEFAULT.curvature,
    sweeps: Annotated[int, typer.Option(help="Rounds of scale refitting and coordinate descent.")] = DEFAULT.sweeps,
    damping: Annotated[float, typer.Option(help="As for quantize.")] = DEFAULT.damping,
    prefix_sequences: Annotated[int | None, typer.Option(help="As for quantize.")] = DEFAULT.prefix_sequences,
    natural_places: Annotated[int | None, typer.Option(help="As for quantize.")] = DEFAULT.natural_places,
    tune: TuneMethod = DEFAULT.tune,
    tune_steps: TuneSteps = DEFAULT.tune_steps,
    tune_tokens: TuneTokens = DEFAULT.tune_tokens,
    seed: Annotated[int, typer.Option(help="Seeds the choice of sequences and the labels.")] = DEFAULT.seed,
    include: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="As for quantize; all others stay as they are.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="As for quantize.")] = None,
    work: Work = None,
    memory: Memory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check everything, say what would change and what memory and disk it takes, and end.")
    ] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Make a quantized model of any tool better, in the same format and the same bytes."""
    from roundel.evaluate.card import with_error
    from roundel.progress import make_progress
    from roundel.stages.refine import refinable
    from roundel.stages.refine import refine as run

    settings = explicit(
        context,
        effort=effort,
        calibration=calibration,
        sequences=sequences,
        seq_len=seq_len,
        eval_data=eval_data,
        eval_sequences=eval_sequences,
        curvature=curvature,
        sweeps=sweeps,
        damping=damping,
        prefix_sequences=prefix_sequences,
        natural_places=natural_places,
        tune=tune,
        tune_steps=tune_steps,
        tune_tokens=tune_tokens,
        seed=seed,
    )
    settings |= {"include": tuple(include or ()), "exclude": tuple(exclude or ())}
    settings |= {"transplant": transplant, "memory": memory, "device": device, "dtype": dtype, "progress": make_progress(quiet=quiet)}
    if dry_run:
        found = refinable(quantized, reference=reference, output=output, **settings)
        emit(found, json_file)
        if not quiet and str(json_file) != "-":
            _show(quantized, found)
        return
    result = run(quantized, reference=reference, output=output, work=work, batch_size=batch_size, **settings)
    emit(result.details, json_file)
    if quiet or str(json_file) == "-":
        return
    refined = result.details["refined"]
    rows = [["linears changed", f"{refined['linears_changed']} of {refined['linears']}"], ["bytes", f"{refined['bytes']}, as before"]]
    for name, own in refined["texts"].items():
        before, after = (with_error(own[when]["kl"]["mean"], own[when]["kl"]["stderr"]) for when in ("before", "after"))
        rows.append([f"KL, {name}", f"{before} before, {after} now"])
    print_rows(f"{quantized}, refined", rows)
    print(f"{result.path}: written; refined.json has every layer's numbers")


def _show(quantized: str, found: dict[str, Any]) -> None:
    rows = [[scheme, f"{count} would be refined"] for scheme, count in found["schemes"].items()]
    rows += [[f"{count} stay", reason] for reason, count in Counter(found["left"].values()).most_common()]
    rows.append(["bytes", f"{found['bytes']}, and as many of output"])
    rows.append(["memory", f"{found['memory'] / 1e9:.2f} GB, and {found['disk'] / 1e9:.2f} GB of temporary files at most"])
    print_rows(f"{quantized}, {found['format']}", rows)
