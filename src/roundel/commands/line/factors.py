"""`collect`, `merge`, `imatrix`, `inspect`: curvature in directories of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from roundel.commands.line.options import DEFAULT, Batch, Device, Dtype, JsonFile, Memory, Output, Quiet, explicit, two_numbers
from roundel.commands.line.output import emit

__all__ = ["collect", "imatrix", "inspect", "merge"]


def collect(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Local directory, Hub id, or demo for the embedded model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Factors directory; new or empty, unless --resume.")],
    curvature: Annotated[str, typer.Option(help="As for quantize.")] = DEFAULT.curvature,
    labels: Annotated[str, typer.Option(help="As for quantize.")] = DEFAULT.labels,
    factor_type: Annotated[
        str, typer.Option(help="Of the sums on the disk: float32, or bfloat16 in half of the space.")
    ] = DEFAULT.factor_type,
    calibration: Annotated[str, typer.Option(metavar="SPEC", help="As for quantize.")] = DEFAULT.calibration,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = DEFAULT.sequences,
    seq_len: Annotated[int, typer.Option(help="Tokens in each, at most the model's positions.")] = DEFAULT.seq_len,
    eval_sequences: Annotated[int, typer.Option(help="Sequences at the end of the text to leave for evaluation.")] = DEFAULT.eval_sequences,
    seed: Annotated[int, typer.Option(help="Seeds the choice of sequences and the labels.")] = DEFAULT.seed,
    rotate: Annotated[
        str, typer.Option(help="fused, for factors that quantize --rotate fused is to use; all others use the same.")
    ] = "auto",
    layers: Annotated[str | None, typer.Option(metavar="A:B", help="Only decoder layers A to B-1; join such windows with merge.")] = None,
    part: Annotated[str, typer.Option(metavar="K/N", help="Only the K-th of N parts of the sequences; add them up with merge.")] = "1/1",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the directory holds.")] = False,
    memory: Memory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    quiet: Quiet = False,
) -> None:
    """Collect curvature into a directory that quantize --factors reads. Splits the work under torchrun."""
    from roundel.progress import make_progress
    from roundel.stages.collecting import collect_factors as run

    header = run(
        model,
        output=output,
        resume=resume,
        part=two_numbers(part, "/", "--part K/N, such as 2/4", lambda k, n: 1 <= k <= n),
        layers=None if layers is None else two_numbers(layers, ":", "--layers A:B, such as 0:8", lambda a, b: a < b),
        memory=memory,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        progress=make_progress(quiet=quiet),
        **explicit(
            context,
            curvature=curvature,
            labels=labels,
            factor_type=factor_type,
            calibration=calibration,
            sequences=sequences,
            seq_len=seq_len,
            eval_sequences=eval_sequences,
            seed=seed,
            rotate=rotate,
        ),
    )
    if not quiet:
        print(f"{output}: {header.curvature} of {len(header.layers)} linears from {len(header.sequence_ids)} sequences")


def merge(
    directories: Annotated[list[Path], typer.Argument(help="Complete factors directories of one model.")],
    output: Output,
    quiet: Quiet = False,
) -> None:
    """Add up factors of different sequences, or join those of different layers."""
    from roundel.artifacts.factors import merge as run
    from roundel.store import check_output

    check_output(output)
    header = run(directories, output)
    if not quiet:
        print(f"{output}: {header.curvature} of {len(header.layers)} linears from {len(header.sequence_ids)} sequences")


def imatrix(
    factors: Annotated[Path, typer.Argument(help="A complete factors directory.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="GGUF file to write; must be new.")],
    model: Annotated[
        str | None, typer.Option(help="Whose config.json tells the architecture; default: the model that the factors name.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Export the curvature of input columns as an importance matrix for llama-quantize."""
    from roundel.progress import make_progress
    from roundel.stages.export import export_imatrix as run

    written = run(factors, output=output, model=model, progress=make_progress(quiet=quiet))
    if not quiet:
        print(f"{output}: weights for {len(written.values)} matrices of {written.architecture} from {written.sequences} sequences")


def inspect(
    factors: Annotated[Path, typer.Argument(help="A complete factors directory.")],
    model: Annotated[str | None, typer.Option(help="The model that they are of; default: the one that they name.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Held-out text; default: more of the text that they were collected on.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences, 2 or more.")] = 32,
    scheme: Annotated[str, typer.Option(help="Predict the KL of rounding to this; as for quantize.")] = DEFAULT.scheme,
    damping: Annotated[float, typer.Option(help="As for quantize.")] = DEFAULT.damping,
    sweeps: Annotated[int, typer.Option(help="As for quantize.")] = DEFAULT.sweeps,
    spectrum_passes: Annotated[int, typer.Option(help="Passes for the Fisher's singular values, 2 or more; 0 leaves them out.")] = 4,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Directory to make, with a page, plots and inspect.json; must be new or empty.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=2, help="Sequences per pass and per set of pairs; default about 4096 tokens. Changes the cosine a little."),
    ] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Judge factors on text that they have not seen: likeness to the Fisher, loss left by feedback, predicted KL, ranks."""
    from rich.console import Console
    from rich.table import Table

    from roundel.commands.inspect import SHORT, table_rows
    from roundel.commands.inspect import inspect as run
    from roundel.progress import make_progress

    details = run(
        factors,
        model=model,
        data=data,
        sequences=sequences,
        scheme=scheme,
        damping=damping,
        sweeps=sweeps,
        spectrum_passes=spectrum_passes,
        output=output,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        progress=make_progress(quiet=quiet),
    )
    emit(details, json_file)
    if not quiet and str(json_file) != "-":
        held_out, curvature = details["held_out"], details["factors"]["curvature"]
        table = Table(title=f"{curvature} of {details['model']}, {scheme}, on {held_out['sequences']} held-out sequences")
        for column in SHORT:
            table.add_column(column, justify="left" if column == SHORT[0] else "right", no_wrap=column == SHORT[0])
        *rows, total = table_rows(details, SHORT)
        for row in rows:
            table.add_row(*row)
        table.add_section()
        table.add_row(*total)
        console = Console()
        (console if console.is_terminal else Console(width=200)).print(table)
        if output is not None:
            print(f"{output / 'index.html'}: written")
