"""The text of a call: calibration and evaluation sequences, from what the recipe names.

Sequences are all of one length. The seed chooses among up to four times as many as are needed; what is held out is never calibrated on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from roundel import processes
from roundel.artifacts.source import Source
from roundel.calibration import Fingerprint, Split, read_documents, sample_from_model, split_tokens, windows
from roundel.curvature import parse_curvature
from roundel.curvature.collect import pilot_first
from roundel.errors import DataError, ModelError
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
from roundel.stages.opening import settle_opening
from roundel.types import TokenBatch

__all__ = [
    "BATCH_TOKENS",
    "OVERLAP_WARNING",
    "along",
    "check_vocabulary",
    "default_batch",
    "evaluation_tokens",
    "fingerprinted",
    "fresh",
    "read_text",
    "set_apart",
    "split_text",
]

BATCH_TOKENS = 4096
BATCH_SEQUENCES = 16
OVERLAP_WARNING = 0.01
"""Part of the evaluation text that may occur in the calibration text."""


def read_text(
    recipe: Recipe, source: Source, notes: Notes, *, known: frozenset[int] | None = None, given: Mapping[str, Any] | None = None
) -> Split:
    """All sequences of the recipe, of which the model has all tokens.

    Args:
        recipe: As asked for.
        source: The model.
        notes: For warnings and progress.
        known: The ids of sequences that factors have seen.
        given: The settings that a user has given: numbers that are not among them shrink where there is less text.
    """
    with notes.timed("text"):
        split = split_text(recipe, source, notes, known=known, given=given)
    check_vocabulary(source.model, split.everything, split.heldout)
    return split


def split_text(
    recipe: Recipe, source: Source, notes: Notes, *, known: frozenset[int] | None = None, given: Mapping[str, Any] | None = None
) -> Split:
    """Calibration and evaluation sequences; see `read_text`."""
    settle_opening(source, recipe.calibration, notes)
    heldout, length = 0 if recipe.eval_data else recipe.eval_sequences, source.length
    sequences, wanted = recipe.sequences, recipe.sequences + heldout
    more, asked = max(0, recipe.prefix_count - sequences), (given or {}).get("prefix_sequences") is not None
    # Up to four times what is needed, so that the seed has something to choose from; also where other text is held out, because factors may
    # have been collected where it was not.
    most = 4 * (sequences + recipe.eval_sequences)
    if recipe.calibration == "self":
        sampled = wanted + (more if asked else 0)  # not for a default: it takes long
        with notes.progress.stage("sampling text from the model", sampled) as advance:
            model = source.whole("sampling calibration text from the model (--calibration names text instead)")

            def drawn() -> list[list[int]]:
                found: list[list[int]] = sample_from_model(
                    model, source.tokenizer, sampled, length, seed=recipe.seed, advance=advance
                ).tolist()
                return found

            available = torch.tensor(processes.from_first(drawn), dtype=torch.long)
    else:
        available = windows(read_documents(recipe.calibration, source.tokenizer), source.tokenizer, length, most=most + more)
    if len(available) < wanted:
        sequences, heldout = _within(len(available), sequences, heldout, given or {})
        if (sequences, heldout) != (recipe.sequences, heldout if recipe.eval_data else recipe.eval_sequences):
            notes.warn(
                f"{recipe.calibration} has {len(available)} sequences of {length} tokens: {sequences} calibrate"
                + (f" and {heldout} are held out" if heldout else "")
                + f", instead of {recipe.sequences} and {recipe.eval_sequences}"
            )
    if asked and len(available) < more + sequences + heldout:
        raise DataError(
            f"{recipe.calibration} has {len(available)} sequences of {length} tokens, {heldout} of which are held out: too few for "
            f"--prefix-sequences {recipe.prefix_sequences}; give more text or a smaller number"
        )
    split = split_tokens(
        available,
        calibration=sequences,
        heldout=heldout,
        choice=parse_curvature(recipe.curvature).held_out(sequences),
        more=more,
        most=most,
        seed=recipe.seed,
        source=recipe.calibration,
        known=known,
    )
    split = dataclasses.replace(split, calibration=pilot_first(parse_curvature(recipe.curvature), split.calibration))
    if recipe.eval_data:
        other = evaluation_tokens(recipe.eval_data, source.tokenizer, length, recipe.eval_sequences)
        split = dataclasses.replace(split, heldout=other)
    return split


def _within(count: int, sequences: int, heldout: int, given: Mapping[str, Any]) -> tuple[int, int]:
    """How many calibrate and are held out of fewer sequences than the defaults ask for; numbers that were given stay."""
    if "eval_sequences" not in given:
        least = max(1, count // 8)
        heldout = min(heldout, max(least, count - sequences) if "sequences" in given else least)
    if "sequences" not in given:
        sequences = max(1, min(sequences, count - heldout))
    return sequences, heldout


def evaluation_tokens(source: str, tokenizer: PreTrainedTokenizerBase, length: int, most: int) -> TokenBatch:
    """Up to `most` sequences, as many as the text has."""
    available = windows(read_documents(source, tokenizer), tokenizer, length, most=most)
    if not len(available):
        raise DataError(f"too little text in {source}: not one sequence of {length} tokens; give more text or a smaller --seq-len")
    return TokenBatch.of(available)


def check_vocabulary(model: PreTrainedModel, *texts: TokenBatch) -> None:
    """Refuses text with tokens that the model does not have."""
    largest, size = max(int(tokens.ids.max()) for tokens in texts), int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if largest >= size:
        raise ModelError(f"the text has token {largest}, but the model's vocabulary has {size} tokens: the tokenizer is another model's")


def fingerprinted(split: Split, notes: Notes) -> tuple[Fingerprint, float]:
    """Of the calibration text, and how much of the held-out text is in it, which is warned of."""
    fingerprint = Fingerprint.of(split.everything)
    overlap = Fingerprint.of(split.heldout).overlap(fingerprint)
    if overlap > OVERLAP_WARNING:
        notes.warn(f"{100 * overlap:.1f} % of the evaluation text's 32-token windows occur in the calibration text: its KL is too good")
    return fingerprint, overlap


def set_apart(split: Split) -> tuple[TokenBatch, TokenBatch]:
    """Calibration text to tune on, and to choose by: the sequences that factors are chosen by, if there are any, else the last eighth."""
    if len(split.choice):
        return split.calibration, split.choice
    kept = max(1, len(split.calibration) // 8)
    if len(split.calibration) <= kept:
        raise DataError("tuning needs two calibration sequences at least: one of them to choose by")
    return split.calibration[: len(split.calibration) - kept], split.calibration[len(split.calibration) - kept :]


def fresh(recipe: Recipe, source: Source, split: Split) -> TokenBatch:
    """Of the calibration text, what no rounding by this recipe has seen: an eighth of the sequences that calibrate, or what there is."""
    if recipe.calibration == "self":
        return split.calibration[:0]
    count, used = max(1, len(split.calibration) // 8), recipe.sequences + recipe.eval_sequences
    text = evaluation_tokens(recipe.calibration, source.tokenizer, source.length, 4 * used + recipe.prefix_count + count)
    known = {*split.everything.sequence_ids, *split.heldout.sequence_ids}
    return text.select([row for row, own in enumerate(text.sequence_ids) if own not in known][-count:])


def along(recipe: Recipe, split: Split) -> TokenBatch:
    """What prefix-aware rounding goes through, which fits it: not what tuning is judged by, or every step away would look like a loss."""
    text = split.everything
    if recipe.tune != "none":
        judged_by = set(set_apart(split)[1].sequence_ids)
        text = text.select([row for row, own in enumerate(text.sequence_ids) if own not in judged_by])
    return text[: recipe.prefix_count]


def default_batch(length: int) -> int:
    """Sequences per pass that make about `BATCH_TOKENS` tokens, but not many: the first batch is also run one by one, to compare."""
    return max(1, min(BATCH_TOKENS // length, BATCH_SEQUENCES))
