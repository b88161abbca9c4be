"""What `quantize` and `tune` have in common: the way from codes to a directory with its report, and what a job's stages weigh."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from roundel import processes
from roundel.artifacts.source import Source
from roundel.artifacts.work import Work
from roundel.artifacts.written import Written
from roundel.calibration import Fingerprint, Split
from roundel.recipes import Recipe
from roundel.stages.curvature import safe_batch
from roundel.stages.evaluation import PREDICTED, continue_written, evaluate_values, predict
from roundel.stages.notes import Notes
from roundel.stages.passes import as_many_as_fit
from roundel.stages.report import Quantized, report_details, write_report
from roundel.stages.rounding import Rounded
from roundel.stages.writing import write_model
from roundel.store import staged_directory

__all__ = ["finish", "warn_of_source", "weights_of"]


def finish(
    target: Path,
    recipe: Recipe,
    source: Source,
    split: Split,
    rounded: Rounded,
    notes: Notes,
    *,
    seen: tuple[Fingerprint, float],
    batch_size: int,
    work: Work,
) -> Quantized:
    """Writes, measures, predicts and reports; `target` is there whole or not at all."""
    with staged_directory(target) as staging:
        size = processes.from_first(lambda: write_model(staging, recipe, source, rounded, notes))
        written = Written(staging, source, recipe.written_format(), {**rounded.layers, **rounded.ends.rows}, rounded.others)
        fitting = partial(as_many_as_fit, safe=partial(safe_batch, source, split, recipe), warn=notes.warn)
        divergence, batch = fitting(lambda size: evaluate_values(written, source, split, notes, batch_size=size, work=work), batch_size)
        continuations = continue_written(written, source, split, notes)
        prediction, _ = fitting(lambda size: predict(recipe, source, split, rounded, notes, batch_size=size, work=work), batch)
        details = processes.from_first(
            lambda: report_details(
                recipe,
                source,
                split,
                rounded,
                notes,
                prediction=prediction,
                divergence=divergence,
                continuations=continuations,
                written=size,
                seen=seen,
            )
        )
        write_report(staging, details)
    return Quantized(path=target, report=divergence, details=details)


def weights_of(recipe: Recipe, *, tried: bool = False) -> dict[str, float]:
    """What each stage of a job is expected to take, in passes of one sequence through the model; `tried`: numbers of sequences are."""
    collected, held = recipe.sequences, recipe.eval_sequences
    places, steps = recipe.natural_steps(collected, recipe.seq_len, weights=0)  # it is not read yet
    found = {"number of sequences": 2.0 * collected} if tried else {}
    found |= {
        "curvature": 6.0 * collected,
        "rounding": 6.0 * recipe.prefix_count + 20.0 * recipe.sweeps + (30.0 if recipe.sweeps else 0.0) + 16.0 * places * steps,
    }
    if recipe.tune != "none":
        found["tuning"] = 6.0 * recipe.steps * recipe.step_tokens / recipe.seq_len
    return found | {"writing": 4.0, "evaluation": 2.0 * held, "prediction": 3.0 * PREDICTED}


def warn_of_source(source: Source, notes: Notes) -> None:
    """Says before the work if little of the model is reached, and what a fused rotation has cost."""
    if source.quantized is not None:
        notes.warn(f"the original is itself quantized ({source.quantized}): all numbers are relative to its weights decoded to bfloat16")
    if (message := source.coverage().warning) is not None:
        notes.warn(message)
    if source.fusion and source.fusion["untied"]:
        added = source.fusion["added_parameters"]
        notes.warn(f"the output head is no longer tied to the embedding, so that the rotation could be fused: {added} weights more")
