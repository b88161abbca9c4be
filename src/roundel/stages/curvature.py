"""Curvature: from text to the factors of every linear, in memory for `quantize` or as a factors directory (`artifacts.factors`).

A directory is collected in parts, by several processes, or resumed; its sums add up to those of a single run. Under torchrun each process
takes every n-th run of sequences, and only the first one writes, at the end of it all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from roundel.artifacts import factors as factor_files
from roundel.artifacts.factors import Header
from roundel.artifacts.source import Source, device_of, load_source
from roundel.calibration import Split, data_hash
from roundel.curvature import Sketch, collect, parse_curvature
from roundel.curvature.collect import Collection, passes, safe_batch_size
from roundel.errors import DataError, FactorsError, SchemeError
from roundel.grids import Grid, parse_scheme
from roundel.progress import Progress, Silent
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
from roundel.stages.text import check_vocabulary, default_batch, evaluation_tokens, sequence_length, split_text
from roundel.store import check_output
from roundel.types import Factors, TokenBatch

__all__ = ["OpenFactors", "check_model", "collect_factors", "collect_for", "measure_curvature", "open_factors"]

COLLECTED = ("curvature", "labels", "calibration", "sequences", "seq_len", "eval_sequences", "seed")
"""Settings of a recipe that factors depend on, fused rotations aside."""


def measure_curvature(
    recipe: Recipe,
    source: Source,
    split: Split,
    stored: tuple[Header, dict[str, Tensor]] | None,
    notes: Notes,
    *,
    batch_size: int | None,
) -> tuple[dict[str, Sketch], int]:
    """Sums for the factors of each linear, collected from the text, or those that are `stored`; and a batch size that is safe for it."""
    with notes.timed("curvature"):
        estimator = parse_curvature(recipe.curvature)
        parts = passes(estimator, split.calibration)
        wanted = batch_size or default_batch(sequence_length(source.model, recipe))
        batch = _safe_batch(source.model, source.linears, parts, recipe, wanted)
        if stored is not None:
            return factor_files.restore(*stored, torch.device("cpu")).sketches, batch
        with notes.progress.stage("curvature", sum(map(len, parts))) as advance:
            collected = collect(
                source.model,
                source.linears,
                split.calibration,
                estimator,
                seed=recipe.seed,
                batch_size=batch,
                labels=recipe.labels,
                advance=advance,
            )
        return collected.sketches, batch


def collect_factors(
    model: str | Path,
    *,
    output: str | Path,
    resume: bool = False,
    part: tuple[int, int] = (1, 1),
    layers: tuple[int, int] | None = None,
    save_every: float = 120.0,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Header:
    """Collects curvature into a factors directory, for `quantize(factors=...)`.

    Under `torchrun` the sequences are split over the processes and their sums added; only the first process writes, at the end.

    Args:
        model: As for `quantize`.
        output: The factors directory.
        resume: Go on with what `output` holds of the same collection, if anything.
        part: `(k, n)`: only the k-th of n parts of the sequences; `factors.merge` adds the parts up.
        layers: `(a, b)`: only decoder layers `a .. b - 1`, to bound memory; `factors.merge` joins the windows.
        save_every: Seconds between saved states.
        device: As for `quantize`.
        dtype: As for `quantize`.
        batch_size: As for `quantize`.
        progress: As for `quantize`.
        settings: The fields of `Recipe` that concern curvature and text.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    recipe, target = Recipe(**{**settings, "scheme": "int8-channel"}), Path(output)
    rank, world = _processes()
    progress = progress if progress is not None and rank == 0 else Silent()
    going_on = resume and (target / "header.json").exists()
    if not going_on and rank == 0:
        check_output(target)
    source = load_source(str(model), recipe, device, dtype)
    linears = {name: linear for name, linear in source.linears.items() if layers is None or layers[0] <= _layer_of(name) < layers[1]}
    if not linears:
        raise SchemeError(f"--layers {layers}: the model has no linear in these decoder layers")
    length = sequence_length(source.model, recipe)
    tokens = split_text(recipe, source, length, progress).calibration
    check_vocabulary(source.model, tokens)
    estimator = parse_curvature(recipe.curvature)
    pilot = estimator.pilot(len(tokens))
    rest = range(pilot, len(tokens))[part[0] - 1 :: part[1]]
    parts = [tokens.select(range(pilot)), tokens.select(rest)] if pilot else [tokens.select(rest)] * estimator.passes
    tokens = tokens.select([*range(pilot), *rest])
    header = Header(
        model=str(model),
        revision=source.revision,
        model_fingerprint=factor_files.model_fingerprint(source.checkpoint),
        curvature=recipe.curvature,
        labels=recipe.labels,
        seed=recipe.seed,
        calibration=recipe.calibration,
        sequences=recipe.sequences,
        seq_len=length,
        tokens_sha256=data_hash(tokens),
        sequence_ids=tokens.sequence_ids,
        pilot=pilot,
        layers={name: (linear.out_features, linear.in_features) for name, linear in linears.items()},
    )
    start = None
    if going_on:
        found, tensors = factor_files.load(target)
        found.check_same(header, "index", "done", "sums")
        if found.complete:
            return found
        start = factor_files.restore(found, tensors, device_of(source.model))
    shares = [_share(each, estimator.together, rank, world) for each in parts]
    batch = _safe_batch(source.model, linears, shares, recipe, batch_size or default_batch(length))
    saved = time.monotonic()

    def each_batch(state: Collection) -> None:
        nonlocal saved
        if world == 1 and time.monotonic() - saved >= save_every:
            factor_files.save(target, header, state)
            saved = time.monotonic()

    with _joined(world), progress.stage("curvature", sum(map(len, shares))) as advance:
        state = collect(
            source.model,
            linears,
            tokens,
            estimator,
            parts=shares,
            seed=recipe.seed,
            batch_size=batch,
            labels=recipe.labels,
            advance=advance,
            start=start if world == 1 else None,
            each_batch=each_batch,
            each_pass=lambda state: _add_processes(state, world),
        )
    state.done = len(parts[-1])
    return factor_files.save(target, header, state) if rank == 0 else header


def collect_for(recipe: Recipe, model: str | Path, output: Path, **running: Any) -> Path:
    """Collects, or goes on to collect, what this recipe needs; where and how it runs is as for `collect_factors`."""
    shared = {name: getattr(recipe, name) for name in COLLECTED} | {"rotate": "fused" if recipe.rotate == "fused" else "auto"}
    collect_factors(model, output=output, resume=True, **running, **shared)
    return output


@dataclass(frozen=True, kw_only=True)
class OpenFactors:
    """A factors directory with its model, and text that the factors have not seen."""

    header: Header
    recipe: Recipe
    grid: Grid
    source: Source
    factors: dict[str, Factors]
    heldout: TokenBatch


def open_factors(
    factors: str | Path,
    *,
    model: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> OpenFactors:
    """Loads complete factors, their model and held-out text, as `quantize(factors=...)` does.

    Args:
        factors: A directory that `collect_factors` made.
        model: By default the one that the factors name.
        device: As for `quantize`.
        dtype: As for `quantize`.
        progress: As for `quantize`.
        settings: The fields of `Recipe` that concern rounding and held-out text; the others are the factors'.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    header, sums = factor_files.load(Path(factors))
    header.check_complete()
    recipe = header.applied_to(Recipe(**settings))
    if recipe.eval_data == "self":
        raise DataError("held-out text of its own must be a file, a directory or a Hub dataset; by default it is that of the factors")
    grid = parse_scheme(recipe.scheme)
    source = load_source(str(model or header.model), recipe, device, dtype)
    check_model(header, source)
    known = frozenset(header.sequence_ids)
    if recipe.eval_data:
        heldout = evaluation_tokens(recipe.eval_data, source.tokenizer, header.seq_len, recipe.eval_sequences)
        unseen = [row for row, sequence in enumerate(heldout.sequence_ids) if sequence not in known]
        heldout = TokenBatch(ids=heldout.ids[unseen], sequence_ids=tuple(heldout.sequence_ids[row] for row in unseen))
    else:
        heldout = split_text(recipe, source, header.seq_len, progress or Silent(), known=known).heldout
    if len(heldout):
        check_vocabulary(source.model, heldout)
    measured = factor_files.restore(header, sums, torch.device("cpu")).factors()
    return OpenFactors(header=header, recipe=recipe, grid=grid, source=source, factors=measured, heldout=heldout)


def check_model(header: Header, source: Source) -> None:
    """Refuses incomplete factors and those of another model; linears that they do not hold are skipped."""
    header.check_complete()
    if header.model_fingerprint != factor_files.model_fingerprint(source.checkpoint):
        raise FactorsError(
            f"the factors are of another model than {source.name}, or of another --rotate or --seed with fused rotation; collect them again"
        )
    for name in set(source.linears) - set(header.layers):
        source.skipped[name] = "not in the factors directory"
        del source.linears[name]
    if not source.linears:
        raise FactorsError("the factors hold none of the linears to be quantized")


def _safe_batch(model: nn.Module, linears: dict[str, nn.Linear], parts: Sequence[TokenBatch], recipe: Recipe, wanted: int) -> int:
    """A batch size that is safe for each of these texts."""
    sizes = [
        safe_batch_size(model, linears, part, seed=recipe.seed, batch_size=wanted, labels=recipe.labels) for part in parts if len(part) > 0
    ]
    return min(sizes, default=1)


def _share(tokens: TokenBatch, together: int, rank: int, world: int) -> TokenBatch:
    """The sequences of one of `world` processes: every `world`-th run of `together`."""
    rows = [
        row for start in range(rank * together, len(tokens), world * together) for row in range(start, min(start + together, len(tokens)))
    ]
    return TokenBatch(ids=tokens.ids[rows], sequence_ids=tuple(tokens.sequence_ids[row] for row in rows))


def _layer_of(name: str) -> int:
    """Index of the decoder layer in a module's name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)


def _processes() -> tuple[int, int]:
    """This process's rank and the number of processes that torchrun started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ["RANK"]), world) if world > 1 else (0, 1)


@contextmanager
def _joined(world: int) -> Iterator[None]:
    """The processes connected for as long as it lasts.

    gloo sometimes aborts a process that exits with its group open, upon which torchrun ends the first process, that may still be writing.
    """
    own = world > 1 and not distributed.is_initialized()
    if own:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        if own:
            distributed.destroy_process_group()


def _add_processes(state: Collection, world: int) -> None:
    """Adds up the sums of all processes, in each of them."""
    if world == 1:
        return
    for sketch in state.sketches.values():
        for total in sketch.sums.values():
            distributed.all_reduce(total)
        tokens = torch.tensor(sketch.tokens, device=sketch.device)
        distributed.all_reduce(tokens)
        sketch.tokens = int(tokens)
