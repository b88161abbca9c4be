"""`plan`: what a job will make and take, before it is started and without reading a weight.

*What*: the model is built without storage, and linears are chosen as `quantize` chooses them; sizes are those of the formats' own tensors.
*Time*: `stages.timing`. *Memory*: a sum of what is there at once, from shapes (`Memory.of`).

Cost: some seconds. Not done: memory of a GPU by itself; bytes of a GGUF's own embedding and head (counted as the original's).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from roundel.artifacts.memory import stays_on_disk
from roundel.artifacts.source import Source, outlined_source
from roundel.artifacts.work import Work, budgets
from roundel.errors import RoundelError, SchemeError
from roundel.grids import parse_scheme
from roundel.models.coverage import coverage_of
from roundel.models.ends import head_of_its_own
from roundel.models.load import pick_device, pick_dtype
from roundel.progress import Progress, Silent
from roundel.progress import duration as spoken
from roundel.recipes import MOST_BITS, Recipe, size_in_bytes, with_block_type
from roundel.settings import EFFORTS
from roundel.stages.curvature import PORTION, STATES
from roundel.stages.ends import schemes_of_ends
from roundel.stages.inputs import check_cache
from roundel.stages.linears import schemes_of, stored_bits
from roundel.stages.notes import Notes
from roundel.stages.readers import with_readable_format
from roundel.stages.sequences import without_auto
from roundel.stages.text import default_batch
from roundel.stages.timing import seconds, timing_of, units_of
from roundel.sweeps.layers import SLICE, decoder_layers

__all__ = ["duration", "peak_memory", "plan", "say_plan"]

WORTH_PLANNING = 50_000_000
"""Quantized weights from which on a job says at its beginning how long it will take."""

BUSY = 0.2
"""What part of the time other programs may have had the processors while a layer was timed."""

PROGRAM, TOKEN = 650_000_000, 600
"""Bytes of Python, torch, Transformers and what is compiled, and of a token in the tokenizer."""

LOGITS = 6
"""Slices of logits."""

ROUNDED, FACTORS = 48, 26
"""Bytes for each weight of a linear while it is rounded, and for each entry of its squares: moments, factors, and these in float64."""

SLACK = 1.2
"""What the process has over what is alive at once: memory that is free again but kept, and what is converted on the way; where the model
stays on the disk nothing is kept (`allocator`)."""


def plan(
    model: str | Path,
    *,
    memory: str | int | None = None,
    limit: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What `quantize` would make of a model, and what it would take on this machine.

    Args:
        model: As there; config.json is enough.
        memory: As there.
        limit: Seconds that there are: says which effort fits into them, and into the memory.
        device: As there.
        dtype: As there.
        progress: Where to warn.
        settings: The fields of `Recipe`; `sequences` may be `auto`.

    Returns:
        `linears`, how many; `coverage`, `skipped` (reasons and how many), `scheme`, `format`, `bits_per_weight`, `bytes` (`output`,
        `source`), `memory` (`budget`, `main`, `disk`; bytes), `seconds` by stage, `total_seconds`, `timed` (which layer), `warnings`, and
        `fits`, where there is a limit.

    Raises:
        RoundelError: what `quantize` would refuse before its work.
    """
    searched, settings = without_auto(settings)
    recipe, notes = Recipe.of(**with_block_type(settings)), Notes(progress or Silent())
    if searched:
        notes.warn(f"--sequences auto is found out on text; this is for {recipe.sequences}, as many as --effort {recipe.effort} takes")
    source = outlined_source(str(model), recipe)
    names = decoder_layers(source.model)
    coverage = coverage_of(source.model, names, source.linears.keys(), source.skipped)
    if coverage.warning:
        notes.warn(coverage.warning)
    recipe = with_readable_format(recipe, source, notes)
    check_cache(recipe, source)
    if recipe.target_size is not None:  # about: what beside weights is in a file is not counted
        sizes = _sizes(source, recipe)
        left = 8 * (size_in_bytes(recipe.target_size) - sizes["bytes"]["output"]) / _weights(source, recipe) + sizes["bits_per_weight"]
        recipe = dataclasses.replace(recipe, bits=min(max(left, 1.0), MOST_BITS))
    place = pick_device(device)
    kind, (budget, hidden) = pick_dtype(dtype, place, notes.warn), budgets(memory)
    timing = timing_of(source, names, recipe, place, kind)
    if timing.waited > BUSY:
        notes.warn(
            f"other programs had the processors for {timing.waited:.0%} of the time that was tried: the seconds are those of a machine "
            "that does nothing else, and too many even so; plan again when it is idle"
        )

    def taken(recipe: Recipe) -> dict[str, float]:
        on_disk = stays_on_disk(source.parameters * kind.itemsize, budget)
        return seconds(recipe, units_of(source), timing, item=kind.itemsize, on_disk=on_disk)

    spent = taken(recipe)
    found = {
        "model": str(model),
        "parameters": source.parameters,
        "linears": len(source.linears),
        "coverage": coverage.as_json(),
        "skipped": dict(Counter(source.skipped.values()).most_common()),
        "scheme": recipe.mix or recipe.scheme if recipe.bits is None else f"{recipe.bits:g} bits",
        "format": recipe.written_format(),
        "effort": recipe.effort,
        **_sizes(source, recipe),
        "memory": {"budget": budget, **peak_memory(source, names, recipe, kind, budget, hidden)},
        "seconds": spent,
        "total_seconds": sum(spent.values()),
        "timed": timing.what,
        "warnings": notes.warnings,
    }
    if limit is not None:
        efforts, best = {}, None
        for effort in EFFORTS:
            other = Recipe.of(**with_block_type({**settings, "effort": effort}))
            total, main = sum(taken(other).values()), peak_memory(source, names, other, kind, budget, hidden)["main"]
            efforts[effort] = {"seconds": total, "main": main}
            best = effort if total <= limit and main <= budget else best
        found["fits"] = {"limit_seconds": limit, "efforts": efforts, "best": best}
    return found


def say_plan(recipe: Recipe, source: Source, notes: Notes, *, work: Work) -> None:
    """Tells the user how long a job will take, if it is no short one, and notes it for the report."""
    if sum(linear.weight.numel() for linear in source.linears.values()) < WORTH_PLANNING:
        return
    kind, names = source.model.dtype, source.layers.names
    with notes.timed("plan"):
        try:
            timing = timing_of(source, names, recipe, source.layers.device, kind)
        except (RoundelError, RuntimeError) as error:
            notes.warn(f"how long this takes could not be tried: {error}")
            return
        on_disk = source.weights is not None
        spent = seconds(recipe, units_of(source), timing, item=kind.itemsize, on_disk=on_disk)
        main = peak_memory(source, names, recipe, kind, work.memory, work.hidden)["main"]
    notes.planned = {"seconds": spent, "total_seconds": sum(spent.values()), "peak_memory": main}
    notes.progress.say(f"about {spoken(sum(spent.values()))} and {main / 1e9:.1f} GB of memory")


def _weights(source: Source, recipe: Recipe) -> int:
    """Those whose bits are given by an average, where one is: linears, and ends that there is to choose for."""
    free = [name for name, (_, schemes) in schemes_of_ends(recipe, source).items() if len(schemes) > 1]
    return sum(source.model.get_parameter(f"{name}.weight").numel() for name in [*source.linears, *free])


def _sizes(source: Source, recipe: Recipe) -> dict[str, Any]:
    """Bits of a quantized weight, and bytes of the tensors; with several schemes by the average that is asked for."""
    checkpoint, weights = source.checkpoint, _weights(source, recipe)
    if recipe.written_format() == "dense":
        bits = 16.0 * weights
    elif recipe.bits is not None:
        bits = recipe.bits * weights
    else:
        bits, schemes = 0.0, schemes_of(recipe, source)
        kinds = Counter((linear.weight.shape, schemes[name]) for name, linear in source.linears.items())
        for (shape, scheme), count in kinds.items():
            bits += count * stored_bits(recipe, parse_scheme(scheme), torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    ends, in_ends = schemes_of_ends(recipe, source), 0
    for name, (_, asked) in ends.items():
        if len(asked) == 1:
            shape = source.model.get_parameter(f"{name}.weight").shape
            in_ends += stored_bits(recipe, parse_scheme(asked[0]), torch.empty(shape, dtype=torch.bfloat16, device="meta")) // 8
    replaced = {checkpoint.weight_of(name) or "" for name in [*source.linears, *ends]}
    replaced |= {whole for name in replaced if (whole := checkpoint.part_of(name)) is not None}
    others = sum(size for name, size in checkpoint.sizes.items() if name not in replaced)
    return {
        "bits_per_weight": bits / max(1, weights),
        "bytes": {"output": int(bits / 8) + in_ends + others, "source": sum(checkpoint.sizes.values())},
    }


def peak_memory(source: Source, names: list[str], recipe: Recipe, dtype: torch.dtype, budget: int, held: int) -> dict[str, int]:
    """Bytes at once, at most: `main`, in main memory on a CPU, and `disk`, of temporary files; `held`: hidden states in memory.

    While the model is loaded, its weights beside the mapped files. Later, with `SLACK`, the program, the weights (all, or those outside of
    the decoder layers and one layer), hidden states, and the largest of three: sums of curvature of one layer with a batch of its
    activations, a linear while it is rounded, slices of logits with an output head that was on the disk.
    """
    item, length, stored = dtype.itemsize, source.length, sum(source.checkpoint.sizes.values())
    embedding: Any = source.model.get_input_embeddings()
    in_layer = {name: sum(p.numel() for p in source.model.get_submodule(name).parameters()) for name in names}
    weights, head = source.parameters * item, 0
    on_demand = stays_on_disk(weights, budget)
    if on_demand:
        head = sum(source.model.get_parameter(f"{name}.weight").numel() for name in head_of_its_own(source.model)) * item
        weights = (source.parameters - sum(in_layer.values()) + max(in_layer.values())) * item - head
    by_layer: dict[str, list[nn.Linear]] = {}
    for name, linear in source.linears.items():
        by_layer.setdefault(next((layer for layer in names if name.startswith(f"{layer}.")), ""), []).append(linear)
    squares = [[each.in_features**2 + each.out_features**2 for each in own] for own in by_layer.values()]
    sums = max(4 * STATES * max(*own, min(sum(own), budget // PORTION // (4 * STATES))) for own in squares)
    wide = max(sum(each.in_features + each.out_features for each in own) for own in by_layer.values())
    collecting = sums + default_batch(length) * length * wide * item
    linears = [each for own in by_layer.values() for each in own]
    rounding = max(ROUNDED * each.weight.numel() + FACTORS * (each.in_features**2 + each.out_features**2) for each in linears)
    logits = head + LOGITS * min(SLICE, length * embedding.num_embeddings) * 4
    states = max(recipe.prefix_count, recipe.sequences) + recipe.eval_sequences
    hidden = (len(names) + 3) * states * length * embedding.embedding_dim * item
    codes = sum(each.weight.numel() for each in source.linears.values())
    tuning = 2 * source.parameters * item + 23 * source.parameters if recipe.tune == "end-to-end" else 0
    factors = sum(map(sum, squares)) // 2 * getattr(torch, recipe.factor_type).itemsize
    program = PROGRAM + TOKEN * embedding.num_embeddings
    working = (1 if on_demand else SLACK) * (program + weights + min(hidden, held) + max(collecting, rounding, logits)) + tuning
    loading = program + weights + stored
    if on_demand:  # pages of mapped files go where memory is short
        loading = min(loading, max(budget, program + weights))
    return {
        "main": int(max(loading, working)),
        "disk": int(factors + max(0, hidden - held) + 4 * codes),
    }


def duration(text: str) -> float:
    """Seconds of `90s`, `45m`, `2h` or `1.5d`.

    Raises:
        SchemeError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise SchemeError(f"time {text!r}: expected a duration such as 45m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
