"""`refine`: a quantized model that somebody has made, better, in the same bytes.

    read what it holds (`roundel.given`) -> text, curvature of the original
    -> layer after layer, on the inputs that the better ones before it give: codes from those that are there, and from new scales; layers
       are taken up to where the KL of the whole model is least (`stages.judge`)
    -> tuned codes, by effort -> measured before and after, on two kinds of text -> the same files with other bytes

Nothing but codes and scales changes, those of a quantized embedding and output head among them, unless the reference is another model than
it was made of (`transplant`): then everything else is the reference's, and no layer is judged, since mixtures of two models mean little.
Where the KL on held-out text has not fallen the files are copied as they are.

Cost: that of `quantize`, two roundings of each linear instead of one, and the judging.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roundel.artifacts.source import Source, load_source
from roundel.artifacts.work import Work, open_work
from roundel.calibration import Split
from roundel.curvature import parse_curvature
from roundel.errors import ModelError, SchemeError
from roundel.evaluate import Divergence
from roundel.evaluate.card import refined_card
from roundel.formats import FORMATS
from roundel.given import Given, open_given, scales_of
from roundel.given.base import check_near
from roundel.grids import parse_scheme
from roundel.models.ends import ends_of
from roundel.progress import Progress, Silent
from roundel.recipes import Recipe
from roundel.rotation import Permutation
from roundel.rounding.round import dequantized
from roundel.stages.curvature import measure_curvature, safe_batch
from roundel.stages.ends import Ends, round_ends
from roundel.stages.evaluation import continue_written, evaluate_values, predict
from roundel.stages.finish import weights_of
from roundel.stages.judge import JUDGED, Judge, values_of_group
from roundel.stages.notes import Notes
from roundel.stages.plan import peak_memory
from roundel.stages.report import Quantized, report_details
from roundel.stages.rounding import Rounded, choose_schemes, round_model, rounding_digest
from roundel.stages.space import bound, say_space
from roundel.stages.text import default_batch, evaluation_tokens, fingerprinted, read_text
from roundel.stages.tuning import tune_model
from roundel.store import check_output, copy_files, staged_directory, write_json, write_shards, write_text
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["refinable", "refine"]

ANY_SHAPE = "int8-channel"
"""A scheme that every linear fits."""

SAME = 0.02
"""How far a tensor that is not quantized may be from the original's, in units of that: storing it in 16 bits takes a tenth of it."""

OTHER_TEXT = "stdlib"
"""Measured on beside the held-out text."""

REPORT = "refined.json"


def refine(
    quantized: str | Path,
    *,
    reference: str | Path,
    output: str | Path,
    transplant: bool = False,
    work: str | Path | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Quantized:
    """Makes a quantized model better, in the same format, names and bytes.

    Args:
        quantized: A `.gguf` file, a directory or a Hub id, of any tool: GGUF, compressed-tensors, GPTQ, AWQ, AutoRound, MLX, EXL3.
        reference: The original that it was made of: a local directory or a Hub id.
        output: Directory to make; must not exist, or be empty.
        transplant: Whether the reference is another model of the same shape, such as a fine-tuned one: its weights in the layout of these
            files.
        work: As for `quantize`.
        memory: As for `quantize`.
        device: As for `quantize`.
        dtype: As for `quantize`.
        batch_size: As for `quantize`.
        progress: As for `quantize`.
        settings: Fields of `Recipe` that are about text, curvature, rounding and tuning.

    Returns:
        The output's path, what was measured afterwards, and the contents of refined.json.

    Raises:
        RoundelError: see `roundel.errors`; no output is left then.
    """
    notes, target = Notes(progress or Silent()), Path(output)
    check_output(target)
    recipe = _recipe(settings)
    with open_work(None if work is None else Path(work), beside=target, memory=memory) as place, notes.progress.job(weights_of(recipe)):
        job = _begun(quantized, reference, recipe, settings, notes, transplant=transplant, device=device, dtype=dtype, work=place)
        source, given, ends, split = job.source, job.given, job.ends, job.split
        say_space(recipe, source, split, None, notes, work=place)
        digest = f"{rounding_digest(recipe, source, split)} {given.digest} {transplant}"
        place.claim(hashlib.sha256(digest.encode()).hexdigest())
        batch = safe_batch(source, split, recipe, batch_size or default_batch(source.length))
        with notes.timed("before"):
            texts = {"held out": split} | _other_text(recipe, source, split)
            before = {name: _measured(source, source.given, ends, own, notes, batch, place) for name, own in texts.items()}
        measured = measure_curvature(recipe, source, split, None, notes, batch_size=batch, work=place)
        judge = None if transplant else Judge(source, ends.values, job.judged, batch_size=batch, store=place.passing("judge"))
        chosen = choose_schemes(recipe, source, measured)
        given_ends, ends = ends, _ends_taken(ends, round_ends(recipe, source, chosen.ends, notes, work=place), judge)
        rounded = round_model(recipe, source, split, measured, chosen, ends, notes, batch_size=batch, work=place, judge=judge)
        rounded = _tuned(recipe, source, split, rounded, notes, batch=batch, work=place)
        with notes.timed("after"):
            after = {name: _measured(source, rounded.weights, ends, own, notes, batch, place) for name, own in texts.items()}
        better = transplant or after["held out"].kl_mean < before["held out"].kl_mean
        if not better:
            notes.warn("the KL on held-out text has not fallen: the files are as they were, byte for byte")
        kept = rounded.weights if better else source.given
        prediction = predict(recipe, source, split, rounded, notes, batch_size=batch, work=place)
        with staged_directory(target) as staging:
            changed = {name: weight for name, weight in rounded.weights.items() if rounded.layers[name].get("taken", True)} | dict(
                ends.weights
            )
            changed = changed if better else {}
            size = given.copy_to(staging, changed, job.moved if better else {})
            found = (after if better else before)["held out"]
            details = report_details(
                recipe,
                source,
                split,
                rounded,
                notes,
                prediction=prediction,
                divergence=found,
                continuations=continue_written(_Values(source, kept, ends if better else given_ends), source, split, notes),
                written=size,
                seen=fingerprinted(split, notes),
            )
            details |= {
                "scheme": Counter(source.given_schemes.values()).most_common(1)[0][0],
                "format": given.form,
                "refined": {
                    "from": str(quantized),
                    "better": better,
                    "transplant": transplant,
                    "linears_changed": len(changed),
                    "linears": len(source.given_schemes),
                    "left": dict(given.left),
                    "bytes": size,
                    "texts": {name: {"before": before[name].as_json(), "after": after[name].as_json()} for name in texts},
                },
            }
            write_json(staging / REPORT, details)
            _write_card(staging, details)
    return Quantized(path=target, report=found, details=details)


def refinable(
    quantized: str | Path,
    *,
    reference: str | Path,
    output: str | Path,
    transplant: bool = False,
    memory: str | int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What `refine` would change, and the memory and disk that it would take: it reads and checks everything, and writes nothing.

    Returns:
        `format`, `bytes`, `schemes` (how many linears have each), `left` (reasons), `memory`, `disk` (bytes, at most), `warnings`.

    Raises:
        RoundelError: what `refine` would refuse before its work.
    """
    notes, target = Notes(progress or Silent()), Path(output)
    check_output(target)
    recipe = _recipe(settings)
    with open_work(None, beside=target, memory=memory) as place:
        job = _begun(quantized, reference, recipe, settings, notes, transplant=transplant, device=device, dtype=dtype, work=place)
        source = job.source
        return {
            "format": job.given.form,
            "bytes": sum(file.stat().st_size for file in job.given.files),
            "schemes": dict(Counter(source.given_schemes.values()).most_common()),
            "left": dict(job.given.left),
            "memory": peak_memory(source, source.layers.names, recipe, source.model.dtype, place.memory, place.hidden)["main"],
            "disk": bound(recipe, source, job.split, place).total,
            "warnings": notes.warnings,
        }


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that is known before the work."""

    source: Source
    given: Given
    ends: Ends
    """As they are in the file."""
    moved: Mapping[str, Tensor]
    """Of the stored tensors that are not quantized those that will change."""
    split: Split
    judged: TokenBatch


def _recipe(settings: Mapping[str, Any]) -> Recipe:
    recipe = Recipe.of(**settings, scheme=ANY_SHAPE, format="dense", tune_rest=False)
    if parse_curvature(recipe.curvature).row_groups > 1:
        raise SchemeError(f"{recipe.curvature} has curvature of its own for groups of rows, which refine does not use; take another one")
    return recipe


def _begun(
    quantized: str | Path,
    reference: str | Path,
    recipe: Recipe,
    settings: Mapping[str, Any],
    notes: Notes,
    *,
    transplant: bool,
    device: str,
    dtype: str,
    work: Work,
) -> _Job:
    """Both models and the text; what cannot be is refused here."""
    with notes.timed("load"):
        source = load_source(str(reference), recipe, device, dtype, work=work, warn=notes.warn)
        given = open_given(str(quantized), source)
        if changes := scales_of(given, source.checkpoint, source.checkpoint.weight_of):
            place_of = _scaled(source, changes, work.path / "scaled")
            named = source
            source = load_source(str(place_of), recipe, device, dtype, work=work, warn=notes.warn)
            source = dataclasses.replace(source, name=named.name, origin=named.origin, quantized=named.quantized)
            given = open_given(str(quantized), source)
            notes.warn(f"channels of {len(changes)} tensors are scaled in {quantized}, as AWQ does: so they are in the original now")
        source, ends, moved = _prepared(source, given, notes, transplant=transplant)
    more = dataclasses.replace(recipe, eval_sequences=recipe.eval_sequences + JUDGED)
    split = read_text(more, source, notes, given={name: value for name, value in settings.items() if name != "eval_sequences"})
    judged, split = _set_apart(split)
    return _Job(source=source, given=given, ends=ends, moved=moved, split=split, judged=judged)


def _scaled(source: Source, changes: Mapping[str, Callable[[Tensor], Tensor]], target: Path) -> Path:
    """The original as a directory in which some tensors are other ones, in float32; made once."""
    if not target.is_dir():
        sizes = {name: size * (2 if name in changes else 1) for name, size in source.checkpoint.sizes.items()}

        def produce(name: str) -> dict[str, Tensor]:
            own = source.checkpoint.read(name)
            return {name: changes[name](own).float().contiguous() if name in changes else own}

        with staged_directory(target) as staging:
            write_shards(staging, sizes, produce)
            copy_files(source.path, staging, leave_out={"model.safetensors.index.json"})
    return target


def _prepared(source: Source, given: Given, notes: Notes, *, transplant: bool) -> tuple[Source, Ends, dict[str, Tensor]]:
    """The original with what it was quantized to; other parameters as they will be; and of the stored tensors those that will change.

    Raises:
        ModelError: what is not quantized is not the original's.
    """
    inside = tuple(f"{name}." for name in source.layers.names)
    linears = {name: linear for name, linear in source.linears.items() if name in given and name.startswith(inside)}
    if not linears:
        raise ModelError(f"{given.path}: none of the decoder layers' linears is quantized in a way that is known")
    for name in source.linears:
        if name not in linears:
            source.skipped[name] = given.left.get(name, "not quantized in the file")
    if given.left:
        name, reason = next(iter(given.left.items()))
        if transplant:
            raise ModelError(f"--transplant: {name} of {given.path} would stay as it is, another model's: {reason}")
        notes.warn(f"{len(given.left)} quantized linears stay as they are, such as {name}: {reason}")
    if not transplant:
        for name in linears:
            check_near(name, dequantized(given[name]), source.checkpoint.read(source.checkpoint.weight_of(name) or name), given.path)
    known = {source.checkpoint.weight_of(name) for name in linears}
    outer: dict[str, Tensor] = {}
    fixed: dict[str, Callable[[], Tensor]] = {}
    moved: dict[str, Tensor] = {}
    for name, _ in source.model.named_parameters():
        stored = source.checkpoint.stored(name)
        value = None if stored is None or stored in known else given.value_of(stored)
        if value is None or stored is None:
            continue
        own = source.checkpoint.read(stored).float()
        if value.shape != own.shape:
            raise ModelError(f"{stored} is {tuple(value.shape)} in {given.path}, and {tuple(own.shape)} in the original: another model")
        if torch.equal(value, own):
            continue
        if transplant:
            moved[stored] = own
        elif given.is_dense(stored):
            if (value - own).norm() > SAME * own.norm():
                raise ModelError(
                    f"{stored} of {given.path} is not the original's: it is of another model (--transplant), or scaled otherwise"
                )
        else:
            check_near(stored, value, own, given.path)
        if not transplant and name.startswith(inside):
            fixed[name] = partial(given.held, stored)
        elif not transplant:
            outer[name] = value
    unread = [name for name in given.left if given.value_of(source.checkpoint.weight_of(name) or name) is None]
    if unread:
        notes.warn(f"values of {len(unread)} of them cannot be read, such as {unread[0]}: they count as the original's")
    known_ends = [end.name for end in ends_of(source.model, source.checkpoint) if end.name in given and end.name not in linears]
    moved = {stored: value for stored, value in moved.items() if stored not in map(source.checkpoint.weight_of, known_ends)}
    schemes = {name: given.slots[name].scheme for name in [*linears, *known_ends]}
    ready = dataclasses.replace(source, linears=linears, given=given, given_schemes=schemes, fixed=fixed)
    return ready, Ends(fixed=lambda: outer), moved


def _ends_taken(given: Ends, found: Ends, judge: Judge | None) -> Ends:
    """Embedding and output head as they were found, if the KL falls by that."""
    if not found.weights:
        return given
    both = dataclasses.replace(found, fixed=given.fixed)
    if judge is None:
        return both
    before, after = judge.ends(both.values)
    rows = {name: {**row, "taken": after < before, "judged_kl": {"before": before, "after": after}} for name, row in found.rows.items()}
    return dataclasses.replace(both, rows=rows) if after < before else given


def _set_apart(split: Split) -> tuple[TokenBatch, Split]:
    """Held-out text to judge layers by, and the rest."""
    count = min(JUDGED, len(split.heldout) // 2)
    whole = len(split.heldout)
    return split.heldout[whole - count :], dataclasses.replace(split, heldout=split.heldout[: whole - count])


def _other_text(recipe: Recipe, source: Source, split: Split) -> dict[str, Split]:
    if OTHER_TEXT in (recipe.calibration, recipe.eval_data):
        return {}
    tokens = evaluation_tokens(OTHER_TEXT, source.tokenizer, source.length, len(split.heldout))
    return {OTHER_TEXT: dataclasses.replace(split, heldout=tokens)}


class _Values:
    """A model's parameters with these weights, for its evaluation."""

    def __init__(self, source: Source, weights: Mapping[str, RoundedWeight], ends: Ends) -> None:
        self._source, self._weights, self._ends = source, weights, ends

    def outside(self) -> dict[str, Tensor]:
        return self._ends.values()

    def of_group(self, index: int) -> dict[str, Tensor]:
        return values_of_group(self._source, index, self._weights)


def _measured(
    source: Source, weights: Mapping[str, RoundedWeight], ends: Ends, split: Split, notes: Notes, batch: int, work: Work
) -> Divergence:
    return evaluate_values(_Values(source, weights, ends), source, split, notes, batch_size=batch, work=work)


def _tuned(recipe: Recipe, source: Source, split: Split, rounded: Rounded, notes: Notes, *, batch: int, work: Work) -> Rounded:
    """By effort, where the schemes allow it."""
    if recipe.tune == "none":
        return rounded
    for name, weight in rounded.weights.items():
        try:
            FORMATS["native"].check(parse_scheme(weight.scheme), None)
        except SchemeError:
            notes.warn(f"not tuned: {name} has the scheme {weight.scheme}, whose codes cannot be")
            return rounded
        if isinstance(weight.rotation, Permutation):
            notes.warn(f"not tuned: the columns of {name} are in another order (activation order)")
            return rounded
    return tune_model(recipe, source, split, rounded, notes, batch_size=batch, work=work)


def _write_card(staging: Path, details: dict[str, Any]) -> None:
    """README.md that names both origins; one that came with the files is kept beside it."""
    card = staging / "README.md"
    if card.is_file():
        card.rename(staging / "README.original.md")
    write_text(card, refined_card(details))
