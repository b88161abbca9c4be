"""`evaluate`, `compare`, `bench`, `serve-check`: what measures models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from roundel.commands.line.options import DEFAULT, Batch, Device, Dtype, JsonFile, Quiet, listed, whole
from roundel.commands.line.output import emit, print_rows
from roundel.errors import SchemeError
from roundel.settings import ABLATION, NEW_TOKENS

__all__ = ["bench", "compare", "evaluate", "serve_check"]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="The quantized model's directory or GGUF file; several are put beside each other."),
    ],
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
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Text that all models continue; repeatable. Of several models the default is beginnings of the data."
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="With at most so many tokens.")] = NEW_TOKENS,
    html_file: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report there as a page with plots.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Measure KL(reference || MODEL) per token on text, accuracies on tasks, and perplexities, with their standard errors."""
    from roundel.progress import make_progress
    from roundel.store import write_text

    shared: dict[str, Any] = {
        "reference": reference,
        "sequences": sequences,
        "seq_len": seq_len,
        "cache": cache,
        "cache_gib": cache_gib,
        "prompts": prompt or (),
        "new_tokens": new_tokens,
        "device": device,
        "dtype": dtype,
        "batch_size": batch_size,
        "progress": make_progress(quiet=quiet),
    }
    several = list(dict.fromkeys(models))
    if len(several) > 1:
        if tasks is not None or perplexity:
            raise SchemeError("--tasks and --perplexity are measured of one model at a time; several are compared on --data")
        from roundel.commands.evaluate import evaluate_several
        from roundel.evaluate.side_by_side import compared_page

        details, page = evaluate_several(several, data=data or (), **shared), compared_page
    else:
        from roundel.commands.evaluate import evaluate as run
        from roundel.evaluate.report import evaluated_page

        details, page = (
            run(
                several[0],
                data=data,
                tasks=list(dict.fromkeys(listed(tasks))) if tasks is not None else (),
                task_data=task_data,
                task_limit=task_limit,
                num_fewshot=num_fewshot,
                perplexity=perplexity,
                window=window,
                **shared,
            ).details,
            evaluated_page,
        )
    emit(details, json_file)
    if html_file is not None:
        write_text(html_file, page(details))
    if not quiet and str(json_file) != "-":
        (_print_several if len(several) > 1 else _print_evaluation)(details)


def _print_evaluation(details: dict[str, Any]) -> None:
    from roundel.evaluate.report import divergence_rows, duplicate_row, evaluated_texts, perplexity_rows

    title = f"{details['model']} against {details['reference']}"
    texts = evaluated_texts(details)
    for spec, found in texts.items():
        print_rows(f"{title}: {spec}" if len(texts) > 1 else title, [*divergence_rows(found), duplicate_row(found)])
    for named, found in details.get("windowed_perplexity", {}).items():
        print_rows(title, [["text", named], *perplexity_rows(found)])
    if "tasks" in details:
        _print_tasks(title, details["tasks"])
    _print_continuations(details.get("continuations", []))


def _print_several(details: dict[str, Any]) -> None:
    """In Markdown, to be pasted somewhere."""
    from roundel.evaluate.report import labels
    from roundel.evaluate.side_by_side import COLUMNS, compared_rows, markdown, texts_of

    for spec in texts_of(details):
        print(f"Against {details['reference']} on {spec}:\n\n{markdown(COLUMNS, compared_rows(details, spec))}\n")
    _print_continuations(details["continuations"], labels(details["models"]))


def _print_continuations(found: list[dict[str, Any]], known: dict[str, str] | None = None) -> None:
    from roundel.evaluate.report import continuation_rows

    for row in found:
        print(f"{row['prompt']!r} is continued by")
        for name, _, text in continuation_rows(row, known):
            print(f"    {name}: {text!r}")


def _print_tasks(title: str, tasks: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from roundel.evaluate.report import TASK_COLUMNS, task_rows

    table = Table(title=f"{title}, in %")
    for column in TASK_COLUMNS:
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", no_wrap=column != "metric")
    for cells in task_rows(tasks):
        table.add_row(*cells)
    Console().print(table)


def compare(
    model: Annotated[str, typer.Argument(help="Local directory, Hub id, or demo.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the table, CSV, JSON, page and plots; new or empty.")],
    curvatures: Annotated[
        str, typer.Option(metavar="A,B,...", help="As for quantize, or gptq or nearest; the others are compared with the first.")
    ] = ",".join(ABLATION),
    schemes: Annotated[str, typer.Option(metavar="A,B,...", help="As for quantize.")] = "int3-g32,int4-g32",
    sequences: Annotated[str, typer.Option(metavar="N,M,...", help="Numbers of calibration sequences; several give a curve.")] = "512",
    seeds: Annotated[int, typer.Option(help="So many seeds, from 0.")] = 3,
    calibration: Annotated[str, typer.Option(metavar="SPEC", help="As for quantize.")] = DEFAULT.calibration,
    seq_len: Annotated[int, typer.Option(help="Tokens in each sequence, at most the model's positions.")] = DEFAULT.seq_len,
    eval_data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Evaluation text; default: held out from the calibration text.")
    ] = None,
    eval_sequences: Annotated[int, typer.Option(help="Evaluation sequences.")] = DEFAULT.eval_sequences,
    labels: Annotated[str, typer.Option(help="As for quantize.")] = DEFAULT.labels,
    rotate: Annotated[str, typer.Option(help="As for quantize.")] = DEFAULT.rotate,
    sweeps: Annotated[int, typer.Option(help="As for quantize; gptq and nearest have none.")] = DEFAULT.sweeps,
    damping: Annotated[float, typer.Option(help="As for quantize.")] = DEFAULT.damping,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the directory holds of the same comparison.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compare curvature estimators and schemes: KL on held-out text, with everything else equal."""
    from roundel.commands.compare import compare as run
    from roundel.progress import make_progress

    details = run(
        model,
        output=output,
        curvatures=listed(curvatures),
        schemes=listed(schemes),
        sequences=[whole(item, "--sequences") for item in listed(sequences)],
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
    emit(details, json_file)
    if not quiet and str(json_file) != "-":
        _print_comparison(details)
        print(f"{output}: index.html has the plots, compare.json everything")


def _print_comparison(details: dict[str, Any]) -> None:
    """A table for each scheme, narrow enough for most terminals; a terminal that is narrower breaks its lines, and nothing is cut off."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from roundel.commands.compare import PRINTED, compared_rows

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
    from rich.console import Console
    from rich.table import Table

    from roundel.commands.bench import bench as run
    from roundel.evaluate.card import number
    from roundel.progress import make_progress

    details = run(
        model,
        reference=reference,
        lengths=[whole(each, "--lengths") for each in listed(lengths)],
        batches=[whole(each, "--batches") for each in listed(batches)],
        tokens=tokens,
        device=device,
        dtype=dtype,
        progress=make_progress(quiet=quiet),
    )
    emit(details, json_file)
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


def serve_check(
    model: Annotated[str, typer.Argument(help="A directory that quantize has written.")],
    engine: Annotated[str, typer.Option(help="vllm, mlx or llama.cpp.")],
    python: Annotated[str | None, typer.Option(metavar="PATH", help="The Python that has the engine; default: this one.")] = None,
    original: Annotated[
        str | None, typer.Option(help="The original: local directory, Hub id, or demo; default: as the report says, if it is there.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Text: file, directory or Hub dataset; default: the report's --eval-data or stdlib-heldout."),
    ] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="At most so many windows; default: the report's, at most 32.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens in each; default: the report's. Large vocabularies have fewer.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="In which the engine computes (llama.cpp: its cache): auto, float32, bfloat16 or float16.")
    ] = "auto",
    noise: Annotated[
        bool | None,
        typer.Option("--noise/--no-noise", help="Serve the original, too: the engine's noise; default: if it is there and below 4 GiB."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Of KL(ours || engine), nats per token; default .005, or ten times the noise if that is more."),
    ] = None,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Write there all that the engine prints.")] = None,
    device: Device = "auto",
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Load MODEL in an installed engine and compare its log-probabilities and greedy text with ours."""
    import sys

    from roundel.commands.serve_check import require
    from roundel.commands.serve_check import serve_check as run
    from roundel.progress import make_progress
    from roundel.store import write_text

    printed: list[str] = []

    def keep(text: str) -> None:
        printed.append(text)
        if log is not None:
            write_text(log, "".join(printed))

    details = run(
        model,
        engine=engine,
        python=python or sys.executable,
        original=original,
        data=data,
        sequences=sequences,
        seq_len=seq_len,
        dtype=dtype,
        noise=noise,
        tolerance=tolerance,
        device=device,
        log=keep,
        progress=make_progress(quiet=quiet),
    )
    emit(details, json_file)
    if not quiet and str(json_file) != "-":
        print_rows(f"{model} in {engine}", _served_rows(details))
    require(details)


def _served_rows(details: dict[str, Any]) -> list[list[str]]:
    from roundel.evaluate.card import number, with_error

    found, noise, kl, greedy = (details[key] for key in ("difference", "noise", "kl", "greedy"))
    rows = [
        ["versions", ", ".join(f"{name} {version}" for name, version in details["versions"].items())],
        *([["kernels", "; ".join(details["kernels"])]] if details["kernels"] else []),
        ["text", f"{details['data']}: {details['windows'][0]} windows of {details['windows'][1]} tokens"],
        ["log-probabilities: largest, mean difference", f"{number(found['logprob_max'])}, {number(found['logprob_mean'])}"],
        ["top-1 agreement", f"{100 * found['top1_agreement']:.2f} %"],
        ["KL(ours, engine), nats per token", f"{with_error(found['kl'], found['kl_stderr'])}; allowed {number(details['tolerance'])}"],
    ]
    if noise is not None:
        rows.append(["that of the original: the engine's noise", with_error(noise["kl"], noise["kl_stderr"])])
    rows.append(["KL(original, ...): report, ours, engine", ", ".join(number(kl[key]) for key in ("report", "ours", "engine"))])
    rows.append(["greedy text", "{equal} of {tokens} tokens equal, {tied} tied, {different} different".format(**greedy)])
    return rows
