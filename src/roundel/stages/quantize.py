"""`quantize`: all stages, from a model and text to a checkpoint with its report.

The reference model stays in memory throughout; factors of a linear are dropped as soon as it is rounded. The output directory appears when
everything is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from roundel.artifacts import factors as factor_files
from roundel.artifacts.source import load_source
from roundel.progress import Progress, Silent
from roundel.recipes import Recipe, with_block_type
from roundel.stages.curvature import check_model, collect_for, measure_curvature
from roundel.stages.evaluation import evaluate_written, predict
from roundel.stages.notes import Notes
from roundel.stages.report import Quantized, report_details, write_report
from roundel.stages.rounding import round_model
from roundel.stages.text import fingerprinted, read_text
from roundel.stages.tuning import tune_model
from roundel.stages.writing import write_model
from roundel.store import check_output, staged_directory

__all__ = ["quantize"]


def quantize(
    model: str | Path,
    *,
    output: str | Path,
    factors: str | Path | None = None,
    work: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Quantizes a causal language model into a directory that Transformers and vLLM load.

    Args:
        model: A local directory or a Hub id; `demo` is the embedded model.
        output: Directory to make; must not exist, or be empty.
        factors: A directory that `collect_factors` made of the same model: nothing is collected then, and its curvature, labels, text,
            sequences and seed take the place of the recipe's.
        work: A directory for what is finished or half done: factors, rounded weights, the state of tuning. The same call goes on from there
            after a crash, and ends with the same checkpoint. It may be removed afterwards.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: In which the model runs: `auto`, `float32` or `bfloat16`.
        batch_size: Sequences per pass; by default about 4096 tokens. Changes speed and memory, never the result.
        progress: Where to report; silent by default.
        settings: The fields of `Recipe`.

    Returns:
        The output's path, the measured divergence and the contents of roundel.json.

    Raises:
        RoundelError: see `roundel.errors`; no output is left then.
    """
    recipe, notes, target = Recipe(**with_block_type(settings)), Notes(progress or Silent()), Path(output)
    kept = None if work is None else Path(work)
    check_output(target)

    if kept is not None and factors is None:
        factors = collect_for(recipe, model, kept / "factors", device=device, dtype=dtype, batch_size=batch_size, progress=notes.progress)
    stored = None if factors is None else factor_files.load(Path(factors))
    if stored is not None:
        recipe = stored[0].applied_to(recipe)

    with notes.timed("load"):
        source = load_source(str(model), recipe, device, dtype)
        if source.fusion and source.fusion["untied"]:
            added = source.fusion["added_parameters"]
            notes.warn(f"the output head is no longer tied to the embedding, so that the rotation could be fused: {added} weights more")
        if stored is not None:
            check_model(stored[0], source)

    split = read_text(recipe, source, notes, known=frozenset(stored[0].sequence_ids) if stored else None)
    sketches, batch = measure_curvature(recipe, source, split, stored, notes, batch_size=batch_size)
    rounded = round_model(recipe, source, split, sketches, notes, batch_size=batch, work=kept)
    seen = fingerprinted(split, notes)
    rounded = tune_model(recipe, source, split, rounded, notes, batch_size=batch, work=kept)
    prediction = predict(recipe, source, split, rounded, notes, batch_size=batch)
    with staged_directory(target) as staging:
        written = write_model(staging, recipe, source, rounded, notes)
        divergence = evaluate_written(staging, recipe, source, split, rounded, notes, batch_size=batch)
        details = report_details(
            recipe, source, split, rounded, notes, prediction=prediction, divergence=divergence, written=written, seen=seen
        )
        write_report(staging, details)
    return Quantized(path=target, report=divergence, details=details)
