"""`collect`: curvature into a factors directory (`artifacts.factors`), for many quantizations of one model; and opening it again.

A directory is collected in parts, by several processes, or resumed after the last finished group of layers; its sums add up to those of a
single run. Under torchrun each process takes some runs of the sequences through all layers (`roundel.processes`), and the first writes.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roundel import processes
from roundel.artifacts import factors as factor_files
from roundel.artifacts.factors import FactorsDirectory, Header
from roundel.artifacts.source import Source, load_source
from roundel.artifacts.work import open_work
from roundel.calibration import data_hash
from roundel.curvature import parse_curvature
from roundel.curvature.collect import collect_visit, passes
from roundel.errors import DataError, SchemeError
from roundel.grids import Grid, parse_scheme
from roundel.progress import Progress, Silent
from roundel.recipes import Recipe
from roundel.stages.curvature import check_model
from roundel.stages.notes import Notes
from roundel.stages.passes import as_many_as_fit
from roundel.stages.text import check_vocabulary, default_batch, evaluation_tokens, split_text
from roundel.store import check_output, common, locked
from roundel.sweeps import gradient_visits, safe_batch_size
from roundel.sweeps.gradients import steps
from roundel.types import Factors, TokenBatch

__all__ = ["OpenFactors", "collect_factors", "open_factors"]


@processes.together
def collect_factors(
    model: str | Path,
    *,
    output: str | Path,
    resume: bool = False,
    part: tuple[int, int] = (1, 1),
    layers: tuple[int, int] | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Header:
    """Collects curvature into a factors directory, for `quantize(factors=...)`.

    Under `torchrun` the sequences are split over the processes and their sums added; only the first process writes.

    Args:
        model: As for `quantize`.
        output: The factors directory.
        resume: Go on with what `output` holds of the same collection, if anything.
        part: `(k, n)`: only the k-th of n parts of the sequences; `factors.merge` adds the parts up.
        layers: `(a, b)`: only decoder layers `a .. b - 1`; `factors.merge` joins the windows.
        memory: As for `quantize`.
        device: As for `quantize`.
        dtype: As for `quantize`.
        batch_size: As for `quantize`.
        progress: As for `quantize`.
        settings: The fields of `Recipe` that concern curvature and text.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    recipe, target = Recipe.of(**{**settings, "scheme": "int8-channel"}), Path(output)
    progress = progress or Silent()
    going_on = processes.from_first(lambda: resume and (target / "header.json").exists())
    if not going_on and processes.first():
        check_output(target)
    with open_work(None, beside=target, memory=memory) as work, ExitStack() as held:
        source = load_source(str(model), recipe, device, dtype, work=work, warn=progress.warn)
        linears = {name: linear for name, linear in source.linears.items() if layers is None or layers[0] <= _layer_of(name) < layers[1]}
        if not linears:
            raise SchemeError(f"--layers {layers}: the model has no linear in these decoder layers")
        notes = Notes(progress)
        split = split_text(recipe, source, notes, given=settings)
        tokens, used = split.calibration, split.used
        check_vocabulary(source.model, tokens)
        estimator = parse_curvature(recipe.curvature)
        pilot = estimator.pilot(len(tokens))
        rest = range(pilot, len(tokens))[part[0] - 1 :: part[1]]
        tokens = tokens.select([*range(pilot), *rest])
        header = Header(
            model=str(model),
            revision=source.revision,
            model_fingerprint=factor_files.model_fingerprint(source.checkpoint),
            curvature=recipe.curvature,
            labels=recipe.labels,
            seed=recipe.seed,
            calibration=recipe.calibration,
            sequences=len(used),
            seq_len=source.length,
            tokens_sha256=data_hash(tokens),
            sequence_ids=tokens.sequence_ids,
            pilot=pilot,
            factor_type=recipe.factor_type,
            layers={name: (linear.out_features, linear.in_features) for name, linear in linears.items()},
        )
        if processes.first():
            if not going_on:
                check_output(target)  # another process may have begun meanwhile
                FactorsDirectory.create(target, header)
            held.enter_context(locked(target / "header.json"))
        processes.wait()
        common(target)
        directory = FactorsDirectory.open(target)
        directory.header.check_same(header)
        if directory.complete:
            return directory.header
        parts = [range(pilot), *[range(pilot, len(tokens))] * (estimator.passes - 1)] if pilot else passes(estimator, len(tokens))
        own = sorted({row for rows in parts for row in processes.own_rows(rows, estimator.together)})
        together = [len(run) for rows in parts for run in processes.runs(rows, estimator.together)]

        def safe(wanted: int) -> int:
            return safe_batch_size(source.layers, linears, tokens, batch_size=wanted, parts=[*together, len(own)], quickly=True)

        def gather(size: int) -> None:
            indices = range(len(source.layers) + 1)
            finished = [index for index in indices if all(name in directory.files for name in _names(source, linears, index))]
            processes.wait()  # nobody writes before all have looked
            with progress.stage("curvature", steps(source.layers, linears) * len(own)) as advance:
                visits = gradient_visits(
                    source.layers,
                    linears,
                    tokens,
                    seed=recipe.seed,
                    labels=recipe.labels,
                    batch_size=size,
                    store=work.store("collect"),
                    advance=advance,
                    finished=finished.__contains__,
                    quickly=True,
                    rows=own,
                )
                for visit in visits:
                    measured = collect_visit(
                        visit, source.linears, {"": estimator}, {"": parts}, batch_size=size, device=source.layers.device, fast=True
                    )[""]
                    if processes.first():
                        directory.save(visit.index, measured.sketches, measured.previous)
                    processes.wait()

        as_many_as_fit(gather, safe(batch_size or default_batch(source.length)), safe=safe, warn=progress.warn)
    return header


def _names(source: Source, linears: dict[str, Any], index: int) -> list[str]:
    """Those of a group, or of what comes after all groups."""
    return source.layers.inside(index, linears) if index < len(source.layers) else source.layers.outside(linears)


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
    stored = FactorsDirectory.open(Path(factors))
    header = stored.header
    stored.check_complete()
    recipe = header.applied_to(Recipe.of(**settings))
    if recipe.eval_data == "self":
        raise DataError("held-out text of its own must be a file, a directory or a Hub dataset; by default it is that of the factors")
    grid = parse_scheme(recipe.scheme)
    source = load_source(str(model or header.model), recipe, device, dtype, warn=(progress or Silent()).warn)
    check_model(stored, source)
    known = frozenset(header.sequence_ids)
    if recipe.eval_data:
        heldout = evaluation_tokens(recipe.eval_data, source.tokenizer, header.seq_len, recipe.eval_sequences)
        unseen = [row for row, sequence in enumerate(heldout.sequence_ids) if sequence not in known]
        heldout = TokenBatch(ids=heldout.ids[unseen], sequence_ids=tuple(heldout.sequence_ids[row] for row in unseen))
    else:
        given = {**settings, "sequences": recipe.sequences}
        heldout = split_text(recipe, source, Notes(progress or Silent()), known=known, given=given).heldout
    if len(heldout):
        check_vocabulary(source.model, heldout)
    return OpenFactors(header=header, recipe=recipe, grid=grid, source=source, factors=stored.factors(), heldout=heldout)


def _layer_of(name: str) -> int:
    """Index of the decoder layer in a module's name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)
