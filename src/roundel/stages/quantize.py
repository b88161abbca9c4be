"""`quantize`: all stages, from a model and text to a checkpoint with its report; each is entered once and reads what the one before made.

    (text -> how many sequences, with `--sequences auto`)
    text -> tokens -> curvature of every linear -> schemes -> codes of embedding and head -> codes -> tuned codes -> checkpoint
         -> measured and predicted KL -> report

Of several processes (`roundel.processes`) each goes through all stages, with its part of the sequences and of the linears.

Everything between is in the job's directory (`artifacts.work`); the output directory appears when everything is measured.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from roundel import processes
from roundel.artifacts.factors import FactorsDirectory
from roundel.artifacts.source import load_source
from roundel.artifacts.work import open_work
from roundel.progress import Progress, Silent
from roundel.recipes import Recipe, with_block_type
from roundel.stages.curvature import check_model, measure_curvature, safe_batch
from roundel.stages.ends import round_ends
from roundel.stages.finish import finish, warn_of_source, weights_of
from roundel.stages.inputs import check_cache
from roundel.stages.notes import Notes
from roundel.stages.passes import as_many_as_fit
from roundel.stages.plan import say_plan
from roundel.stages.readers import with_readable_format
from roundel.stages.report import Quantized
from roundel.stages.rounding import choose_schemes, round_model, rounding_digest
from roundel.stages.rounding.sweep import steps_taken
from roundel.stages.sequences import enough_sequences, without_auto
from roundel.stages.size import with_bits_for_size
from roundel.stages.space import say_space
from roundel.stages.text import default_batch, fingerprinted, read_text
from roundel.stages.tuning import tune_model
from roundel.store import check_output

__all__ = ["quantize"]


@processes.together
def quantize(
    model: str | Path,
    *,
    output: str | Path,
    factors: str | Path | None = None,
    work: str | Path | None = None,
    memory: str | int | None = None,
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
        work: A directory for what is finished or half done: hidden states, factors, rounded weights, the state of tuning. The same call
            goes on from there after a crash, and ends with the same checkpoint. It may be removed afterwards.
        memory: What each process may use, such as `8G`, a quarter of it for hidden states; by default most of what is free. A model whose
            weights do not fit into half of it stays on the disk but for one decoder layer at a time; hidden states that do not fit go to
            the disk. Never changes the result.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: In which the model runs: `auto`, `float32` or `bfloat16`.
        batch_size: Sequences per pass; by default about 4096 tokens. Changes speed and memory, never the result.
        progress: Where to report; silent by default.
        settings: The fields of `Recipe`; `sequences` may be `auto` (`stages.sequences`).

    Returns:
        The output's path, the measured divergence and the contents of roundel.json.

    Raises:
        RoundelError: see `roundel.errors`; no output is left then.
    """
    searched, settings = without_auto(settings)
    recipe, notes, target = Recipe.of(**with_block_type(settings)), Notes(progress or Silent()), Path(output)
    check_output(target)
    stored = None if factors is None else FactorsDirectory.open(Path(factors))
    if stored is not None:
        recipe, settings = stored.header.applied_to(recipe), {**settings, "sequences": stored.header.sequences}
        searched = False  # the factors' number, as with one that is given

    stages = weights_of(recipe, tried=searched)
    with open_work(None if work is None else Path(work), beside=target, memory=memory) as place, notes.progress.job(stages):
        with notes.timed("load"):
            source = load_source(str(model), recipe, device, dtype, work=place, warn=notes.warn)
            warn_of_source(source, notes)
            recipe = with_readable_format(recipe, source, notes)
            check_cache(recipe, source)
            recipe = with_bits_for_size(recipe, source)
            if stored is not None:
                check_model(stored, source)
        if searched:
            number = processes.from_first(lambda: enough_sequences(recipe, source, notes, work=place))
            settings = {**settings, "sequences": number}
            recipe = dataclasses.replace(recipe, sequences=settings["sequences"])
        split = read_text(recipe, source, notes, known=frozenset(stored.header.sequence_ids) if stored else None, given=settings)
        place.claim(rounding_digest(recipe, source, split))
        if processes.first():
            say_space(recipe, source, split, stored, notes, work=place)
        if processes.world() == 1:
            say_plan(recipe, source, notes, work=place)
        safe = partial(safe_batch, source, split, recipe)
        measured, batch = as_many_as_fit(
            lambda size: measure_curvature(recipe, source, split, stored, notes, batch_size=size, work=place),
            safe(batch_size or default_batch(source.length)),
            safe=safe,
            warn=notes.warn,
        )
        chosen = choose_schemes(recipe, source, measured)
        ends = round_ends(recipe, source, chosen.ends, notes, work=place)
        rounded, batch = as_many_as_fit(
            lambda size: round_model(recipe, source, split, measured, chosen, ends, notes, batch_size=size, work=place),
            batch,
            safe=safe,
            warn=notes.warn,
            again=lambda: place.kept or not steps_taken(place.rounded),  # else moved weights were in memory only
        )
        seen = fingerprinted(split, notes)
        rounded = tune_model(recipe, source, split, rounded, notes, batch_size=batch, work=place)
        return finish(target, recipe, source, split, rounded, notes, seen=seen, batch_size=batch, work=place)
