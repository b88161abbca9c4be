"""The commands. Results go to standard output, progress and errors to standard error.

Exit codes: 0 done; 2 something given cannot work; 3 numbers beyond repair; 4 the disk refused; 130 interrupted; 143
terminated; 1 anything unforeseen.
"""

from __future__ import annotations

import importlib.metadata
import json
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from roundel.allocator import keep_freed_memory
from roundel.artifacts.factors import merge as merge_factors
from roundel.commands.bench import bench as run_bench
from roundel.commands.compare import ABLATION
from roundel.commands.compare import compare as run_compare
from roundel.commands.evaluate import evaluate as run_evaluate
from roundel.commands.inspect import SHORT, table_rows
from roundel.commands.inspect import inspect as run_inspect
from roundel.errors import RoundelError, SchemeError
from roundel.evaluate.card import number, with_error
from roundel.evaluate.comparison import PRINTED, compared_rows
from roundel.evaluate.report import (
    TASK_COLUMNS,
    checkpoint_rows,
    divergence_rows,
    duplicate_row,
    evaluated_page,
    evaluated_texts,
    perplexity_rows,
    task_rows,
)
from roundel.progress import make_progress
from roundel.recipes import BEST, GPTQ, NEAREST, Recipe
from roundel.stages.curvature import collect_factors as run_collect
from roundel.stages.export import export as run_export
from roundel.stages.export import export_imatrix as run_imatrix
from roundel.stages.quantize import quantize as run_quantize
from roundel.stages.report import Quantized
from roundel.stages.tune import tune as run_tune
from roundel.store import check_output, write_json, write_text

__all__ = ["app", "main"]

app = typer.Typer(
    help="Shrink a language model to 2-8 bits per weight and keep its output distribution.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_DEFAULT = Recipe()

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
Output = Annotated[Path, typer.Option("-o", "--output", help="Directory to make; must be new or empty.")]
Written = Annotated[Path, typer.Argument(help="A directory that quantize has written, in a format that keeps codes (not dense, not gguf).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(f"roundel {importlib.metadata.version('roundel')}")
        raise typer.Exit


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Local directory, Hub id, or demo for the embedded model.")],
    output: Output,
    scheme: Annotated[
        str,
        typer.Option(
            help="Integers: intB-gN, intB-channel, intB-tensor, B from 2 to 8, with -asym for zero points (int4-g128, int3-g64-asym). "
            "Floats: fp8, mxfp4, nvfp4. llama.cpp's blocks: q8_0, q6_k, q5_k, q4_k, q4_0, iq4_nl, q3_k, q2_k. "
            "Vectors: lattice2, trellisB[-CODE], B from 1 to 8 (trellis2, trellis3-hyb)."
        ),
    ] = _DEFAULT.scheme,
    curvature: Annotated[
        str,
        typer.Option(
            help="auto, identity, activation (GPTQ), kfac, sketch-a[:rounds=N], sketch-b[:rounds=N], mean, pilot, "
            "power[:rounds=N], fastkron[:steps=N][:batch=N], guided[:groups=N], diagonal[:of=NAME] or triangular[:rounds=N][:shrinkage=X]."
        ),
    ] = _DEFAULT.curvature,
    labels: Annotated[
        str,
        typer.Option(
            help="What is sent back from the logits: sampled (labels drawn from the model), probe (random signs, the same Fisher) "
            "or data (the text's next tokens: the empirical Fisher)."
        ),
    ] = _DEFAULT.labels,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="Text or .jsonl file, directory, Hub dataset (name:split=train:num=1000:field=text), stdlib, or self (sampled).",
        ),
    ] = _DEFAULT.calibration,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = _DEFAULT.sequences,
    seq_len: Annotated[int, typer.Option(help="Tokens in each, at most the model's positions.")] = _DEFAULT.seq_len,
    eval_data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Evaluation text; default: held out from the calibration text.")
    ] = None,
    eval_sequences: Annotated[int, typer.Option(help="Evaluation sequences.")] = _DEFAULT.eval_sequences,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Average bits per weight, scales included: each linear gets that of several schemes with which this loses least."
        ),
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="With --bits: the schemes to choose from; default: --scheme with 1 to 8 bits.")
    ] = None,
    rotate: Annotated[
        str,
        typer.Option(
            help="Random rotation of weights before rounding: auto (online for trellises and lattices), none, fused (into the model's "
            "weights: nothing is left to do at run time), online (undone at run time) or online128 (in blocks of 128)."
        ),
    ] = _DEFAULT.rotate,
    format: Annotated[
        str,
        typer.Option(
            help="compressed-tensors (vLLM, Transformers), gguf or gguf:TYPE (llama.cpp), exl3 (exllamav3), gptq, native (any scheme; "
            "Transformers with roundel), dense (rounded values in the original's type), or auto: what most engines load."
        ),
    ] = _DEFAULT.format,
    sweeps: Annotated[int, typer.Option(help="Rounds of scale refitting and coordinate descent after feedback.")] = _DEFAULT.sweeps,
    damping: Annotated[float, typer.Option(help="Added to each factor's diagonal, relative to its mean.")] = _DEFAULT.damping,
    error_aware: Annotated[
        bool | None,
        typer.Option(
            "--error-aware/--no-error-aware",
            help="Later layers make up for the errors of those rounded before: less loss for some minutes more; default: with 16384 tokens "
            "of calibration text or more, unless tuned or with --bits.",
        ),
    ] = _DEFAULT.error_aware,
    tune: TuneMethod = _DEFAULT.tune,
    tune_steps: TuneSteps = _DEFAULT.tune_steps,
    tune_tokens: TuneTokens = _DEFAULT.tune_tokens,
    tune_rest: TuneRest = _DEFAULT.tune_rest,
    seed: Annotated[int, typer.Option(help="Seeds the choice of sequences and the labels.")] = _DEFAULT.seed,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only linears that match, like '*.mlp.*' or 're:layers\\.[0-3]\\.'; repeatable."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="No linears that match; repeatable.")] = None,
    factors: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Use these collected factors, with their curvature, labels, text and seed.")
    ] = None,
    work: Work = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL into a directory that Transformers and vLLM load."""
    result = run_quantize(
        model,
        output=output,
        factors=factors,
        work=work,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        progress=make_progress(quiet=quiet),
        scheme=scheme,
        bits=bits,
        schemes=() if schemes is None else tuple(_listed(schemes)),
        rotate=rotate,
        format=format,
        curvature=curvature,
        labels=labels,
        calibration=calibration,
        sequences=sequences,
        seq_len=seq_len,
        eval_data=eval_data,
        eval_sequences=eval_sequences,
        sweeps=sweeps,
        damping=damping,
        error_aware=error_aware,
        tune=tune,
        tune_steps=tune_steps,
        tune_tokens=tune_tokens,
        tune_rest=tune_rest,
        seed=seed,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
    )
    _show_quantized(result, model, json_file, quiet=quiet)


def _show_quantized(result: Quantized, model: str, json_file: Path | None, *, quiet: bool) -> None:
    _emit(result.details, json_file)
    if not quiet and str(json_file) != "-":
        _print_rows(f"{model} in {result.details['scheme']}", checkpoint_rows(result.details))
        print(f"{result.path}: written; report.html shows what was measured, roundel.json has every layer's numbers")


@app.command()
def tune(
    directory: Written,
    output: Output,
    method: TuneMethod = "end-to-end",
    steps: TuneSteps = _DEFAULT.tune_steps,
    step_tokens: TuneTokens = _DEFAULT.tune_tokens,
    rest: TuneRest = _DEFAULT.tune_rest,
    calibration: Annotated[str | None, typer.Option(metavar="SPEC", help="Other text than it was quantized with.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Another number of sequences.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed of the choice and order of sequences.")] = None,
    model: Annotated[str | None, typer.Option(help="The original, if it is not where roundel.json says.")] = None,
    work: Work = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Tune the codes and scales of a quantized model, and write it in the same format."""
    others = {"calibration": calibration, "sequences": sequences, "seed": seed}
    result = run_tune(
        directory,
        output=output,
        model=model,
        work=work,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        progress=make_progress(quiet=quiet),
        tune=method,
        tune_steps=steps,
        tune_tokens=step_tokens,
        tune_rest=rest,
        **{name: value for name, value in others.items() if value is not None},
    )
    _show_quantized(result, str(directory), json_file, quiet=quiet)


@app.command()
def export(
    source: Written,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="compressed-tensors, gguf, gguf:TYPE, exl3, gptq, native or dense.")],
    output: Output,
    model: Annotated[str | None, typer.Option(help="A copy of the original to take the tokenizer from; default: that in SOURCE.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a quantized model in another engine's format, with the same codes and scales."""
    details = run_export(source, output=output, to=to, model=model, progress=make_progress(quiet=quiet))
    if not quiet:
        bits = details["bits_per_weight"]["model"]
        print(f"{output}: {len(details['layers'])} linears in {details['format']}, {bits:.3f} bits per weight of the whole checkpoint")


@app.command()
def collect(
    model: Annotated[str, typer.Argument(help="Local directory, Hub id, or demo for the embedded model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Factors directory; new or empty, unless --resume.")],
    curvature: Annotated[str, typer.Option(help="As for quantize.")] = _DEFAULT.curvature,
    labels: Annotated[str, typer.Option(help="As for quantize.")] = _DEFAULT.labels,
    calibration: Annotated[str, typer.Option(metavar="SPEC", help="As for quantize.")] = _DEFAULT.calibration,
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = _DEFAULT.sequences,
    seq_len: Annotated[int, typer.Option(help="Tokens in each, at most the model's positions.")] = _DEFAULT.seq_len,
    eval_sequences: Annotated[
        int, typer.Option(help="Sequences at the end of the text to leave for evaluation.")
    ] = _DEFAULT.eval_sequences,
    seed: Annotated[int, typer.Option(help="Seeds the choice of sequences and the labels.")] = _DEFAULT.seed,
    rotate: Annotated[
        str, typer.Option(help="fused, for factors that quantize --rotate fused is to use; all others use the same.")
    ] = "auto",
    layers: Annotated[str | None, typer.Option(metavar="A:B", help="Only decoder layers A to B-1; join such windows with merge.")] = None,
    part: Annotated[str, typer.Option(metavar="K/N", help="Only the K-th of N parts of the sequences; add them up with merge.")] = "1/1",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the directory holds.")] = False,
    save_every: Annotated[float, typer.Option(help="Seconds between saved states.")] = 120.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    quiet: Quiet = False,
) -> None:
    """Collect curvature into a directory that quantize --factors reads. Splits the work under torchrun."""
    header = run_collect(
        model,
        output=output,
        resume=resume,
        part=_two_numbers(part, "/", "--part K/N, such as 2/4", lambda k, n: 1 <= k <= n),
        layers=None if layers is None else _two_numbers(layers, ":", "--layers A:B, such as 0:8", lambda a, b: a < b),
        save_every=save_every,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        progress=make_progress(quiet=quiet),
        curvature=curvature,
        labels=labels,
        calibration=calibration,
        sequences=sequences,
        seq_len=seq_len,
        eval_sequences=eval_sequences,
        seed=seed,
        rotate=rotate,
    )
    if not quiet and header.sums:
        print(f"{output}: {header.curvature} of {len(header.layers)} linears from {len(header.sequence_ids)} sequences")


@app.command()
def merge(
    directories: Annotated[list[Path], typer.Argument(help="Complete factors directories of one model.")],
    output: Output,
    quiet: Quiet = False,
) -> None:
    """Add up factors of different sequences, or join those of different layers."""
    check_output(output)
    header = merge_factors(directories, output)
    if not quiet:
        print(f"{output}: {header.curvature} of {len(header.layers)} linears from {len(header.sequence_ids)} sequences")


@app.command()
def imatrix(
    factors: Annotated[Path, typer.Argument(help="A complete factors directory.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="GGUF file to write; must be new.")],
    model: Annotated[
        str | None, typer.Option(help="Whose config.json tells the architecture; default: the model that the factors name.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Export the curvature of input columns as an importance matrix for llama-quantize."""
    written = run_imatrix(factors, output=output, model=model, progress=make_progress(quiet=quiet))
    if not quiet:
        print(f"{output}: weights for {len(written.values)} matrices of {written.architecture} from {written.sequences} sequences")


def _two_numbers(text: str, separator: str, expected: str, valid: Callable[[int, int], bool]) -> tuple[int, int]:
    first, found, second = text.partition(separator)
    if not found or not first.isdecimal() or not second.isdecimal() or not valid(int(first), int(second)):
        raise SchemeError(f"{text!r}: expected {expected}")
    return int(first), int(second)


@app.command()
def inspect(
    factors: Annotated[Path, typer.Argument(help="A complete factors directory.")],
    model: Annotated[str | None, typer.Option(help="The model that they are of; default: the one that they name.")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Held-out text; default: more of the text that they were collected on.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences, 2 or more.")] = 32,
    scheme: Annotated[str, typer.Option(help="Predict the KL of rounding to this; as for quantize.")] = _DEFAULT.scheme,
    damping: Annotated[float, typer.Option(help="As for quantize.")] = _DEFAULT.damping,
    sweeps: Annotated[int, typer.Option(help="As for quantize.")] = _DEFAULT.sweeps,
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
    details = run_inspect(
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
    _emit(details, json_file)
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


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="The quantized model's directory.")],
    reference: Annotated[str, typer.Option(help="The original: local directory, Hub id, or demo.")],
    data: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="Text for the KL: file, directory, Hub dataset or stdlib; repeatable.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="At most so many sequences of each.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens in each, at most the model's positions.")] = 512,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Accuracies on tasks of lm-evaluation-harness, by its names: arc_easy,piqa,...")
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The tasks' documents in local files, arc_easy.jsonl and so on; default: from the Hub."),
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="At most so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question; default: each task's own number.")] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help="Perplexity as in papers: wikitext2 or c4 (from the Hub), c4=SPEC for a copy, or text, joined by blank lines; repeatable.",
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens in each of its windows; default 2048, at most the models' positions.")] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the original's logits there, for the next evaluation on the same text.")
    ] = None,
    cache_gib: Annotated[float, typer.Option(min=0, help="What that directory may hold; what was used longest ago is removed.")] = 10.0,
    html_file: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report there as a page with plots.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Measure KL(reference || MODEL) per token on text, accuracies on tasks, and perplexities, with their standard errors."""
    result = run_evaluate(
        model,
        reference=reference,
        data=data,
        sequences=sequences,
        seq_len=seq_len,
        tasks=list(dict.fromkeys(_listed(tasks))) if tasks is not None else (),
        task_data=task_data,
        task_limit=task_limit,
        num_fewshot=num_fewshot,
        perplexity=perplexity,
        window=window,
        cache=cache,
        cache_gib=cache_gib,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        progress=make_progress(quiet=quiet),
    )
    _emit(result.details, json_file)
    if html_file is not None:
        write_text(html_file, evaluated_page(result.details))
    if not quiet and str(json_file) != "-":
        title = f"{model} against {reference}"
        texts = evaluated_texts(result.details)
        for spec, found in texts.items():
            _print_rows(f"{title}: {spec}" if len(texts) > 1 else title, [*divergence_rows(found), duplicate_row(found)])
        for named, found in result.details.get("windowed_perplexity", {}).items():
            _print_rows(title, [["text", named], *perplexity_rows(found)])
        if "tasks" in result.details:
            _print_tasks(title, result.details["tasks"])


def _print_tasks(title: str, tasks: dict[str, dict[str, Any]]) -> None:
    table = Table(title=f"{title}, in %")
    for column in TASK_COLUMNS:
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", no_wrap=column != "metric")
    for cells in task_rows(tasks):
        table.add_row(*cells)
    Console().print(table)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Local directory, Hub id, or demo.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the table, CSV, JSON, page and plots; new or empty.")],
    curvatures: Annotated[
        str, typer.Option(metavar="A,B,...", help="As for quantize, or gptq or nearest; the others are compared with the first.")
    ] = ",".join(ABLATION),
    schemes: Annotated[str, typer.Option(metavar="A,B,...", help="As for quantize.")] = "int3-g32,int4-g32",
    sequences: Annotated[str, typer.Option(metavar="N,M,...", help="Numbers of calibration sequences; several give a curve.")] = "512",
    seeds: Annotated[int, typer.Option(help="So many seeds, from 0.")] = 3,
    calibration: Annotated[str, typer.Option(metavar="SPEC", help="As for quantize.")] = _DEFAULT.calibration,
    seq_len: Annotated[int, typer.Option(help="Tokens in each sequence, at most the model's positions.")] = _DEFAULT.seq_len,
    eval_data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Evaluation text; default: held out from the calibration text.")
    ] = None,
    eval_sequences: Annotated[int, typer.Option(help="Evaluation sequences.")] = _DEFAULT.eval_sequences,
    labels: Annotated[str, typer.Option(help="As for quantize.")] = _DEFAULT.labels,
    rotate: Annotated[str, typer.Option(help="As for quantize.")] = _DEFAULT.rotate,
    sweeps: Annotated[int, typer.Option(help="As for quantize; gptq and nearest have none.")] = _DEFAULT.sweeps,
    damping: Annotated[float, typer.Option(help="As for quantize.")] = _DEFAULT.damping,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the directory holds of the same comparison.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compare curvature estimators and schemes: KL on held-out text, with everything else equal."""
    details = run_compare(
        model,
        output=output,
        curvatures=_listed(curvatures),
        schemes=_listed(schemes),
        sequences=[_whole(item, "--sequences") for item in _listed(sequences)],
        seeds=seeds,
        resume=resume,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        progress=make_progress(quiet=quiet),
        calibration=calibration,
        seq_len=seq_len,
        eval_data=eval_data,
        eval_sequences=eval_sequences,
        labels=labels,
        rotate=rotate,
        sweeps=sweeps,
        damping=damping,
    )
    _emit(details, json_file)
    if not quiet and str(json_file) != "-":
        _print_comparison(details)
        print(f"{output}: index.html has the plots, compare.json everything")


def _print_comparison(details: dict[str, Any]) -> None:
    """A table for each scheme, narrow enough for most terminals; a terminal that is narrower breaks its lines, and nothing is cut off."""
    columns = [column for column in PRINTED if column != "sequences" or len(details["sequences"]) > 1]
    console = Console()
    for scheme in details["schemes"]:
        summary = [row for row in details["summary"] if row["scheme"] == scheme]
        title = f"{scheme}: KL in nats per token, mean of {details['seeds']} seeds"
        table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        for column in columns:
            table.add_column(column.removesuffix(" to the first"), justify="left" if column == "method" else "right", no_wrap=True)
        for row, cells in zip(summary, compared_rows(summary, columns), strict=True):
            table.add_row(*cells, end_section=row["method"] == summary[-1]["method"])
        needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
        Console(width=max(console.width, needed)).print(table)
        print()
    print(f"ratio: to the KL of {details['summary'][0]['method']}; seconds: of the collection, as if alone")


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _whole(text: str, option: str) -> int:
    if not text.isdecimal():
        raise SchemeError(f"{option} {text!r}: expected whole numbers, such as 64,512")
    return int(text)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="The quantized model's directory.")],
    reference: Annotated[str | None, typer.Option(help="The original: local directory, Hub id, or demo.")] = None,
    lengths: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens of prefilled sequences.")] = "1024,2048",
    batches: Annotated[str, typer.Option(metavar="N,N,...", help="Sequences at once.")] = "1,8",
    tokens: Annotated[int, typer.Option(help="Tokens decoded after each prefill.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Size on disk and in memory, and the time of prefill and decoding, beside the original."""
    details = run_bench(
        model,
        reference=reference,
        lengths=[_whole(each, "--lengths") for each in _listed(lengths)],
        batches=[_whole(each, "--batches") for each in _listed(batches)],
        tokens=tokens,
        device=device,
        dtype=dtype,
        progress=make_progress(quiet=quiet),
    )
    _emit(details, json_file)
    if not quiet and str(json_file) != "-":
        names = list(details["models"])
        table = Table(title=f"{model} on {details['device']}, {details['dtype']}")
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for title, key in (("on disk, MB", "disk_bytes"), ("in memory, MB", "memory_bytes")):
            table.add_row(title, *(f"{details['models'][name][key] / 1e6:.2f}" for name in names))
        table.add_section()
        for row in details["speed"]:
            for what in ("prefill", "decode"):
                title = f"{what}, ms per token, {row['length']} tokens, batch {row['batch']}"
                table.add_row(title, *(number(1e3 * row[name][f"{what}_seconds_per_token"]) for name in names))
        Console().print(table)


@app.command()
def demo(
    scheme: Annotated[str, typer.Option(help="As for quantize.")] = "int3-g64",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Keep the best checkpoint there.")] = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Quantize the embedded model by nearest rounding, by GPTQ and by Roundel, and compare them on held-out text."""
    methods: dict[str, dict[str, Any]] = {"nearest": NEAREST, "activation (GPTQ)": GPTQ, "Roundel": BEST}
    progress = make_progress(quiet=quiet)
    if output is not None:
        check_output(output)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="roundel-demo-") as scratch:
        for index, (title, recipe) in enumerate(methods.items()):
            progress.say(f"--- {title}")
            best = index == len(methods) - 1
            rows[title] = run_quantize(
                "demo",
                output=output if best and output is not None else Path(scratch) / str(index),
                scheme=scheme,
                calibration="stdlib",
                eval_data="stdlib-heldout",
                sequences=192,
                seq_len=256,
                eval_sequences=96,
                progress=progress,
                **{**recipe, "error_aware": False},  # minutes more, for some 15 % less
            )
    _emit({title: result.details for title, result in rows.items()}, json_file)
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


def _print_rows(title: str, rows: list[list[str]]) -> None:
    table = Table(title=title, show_header=False)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)


def _emit(details: dict[str, Any], json_file: Path | None) -> None:
    if json_file is None:
        return
    if str(json_file) == "-":
        print(json.dumps(details, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        write_json(json_file, details)


def main() -> None:
    """The console script: one clear line for each foreseen error, and an exit code for it."""

    def terminated(_signal: int, _frame: Any) -> None:
        raise SystemExit(143)  # unwinds, so that half-written output is removed

    signal.signal(signal.SIGTERM, terminated)
    keep_freed_memory()
    # torch 2.11 on a GPU, in the thread of a backward pass; it then does what it should
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS", UserWarning)
    try:
        app()  # ends in SystemExit: 0, 2 for wrong usage, 130 for Ctrl-C
    except RoundelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == 130:
            print("interrupted; nothing was left behind", file=sys.stderr)
        raise
