"""Which text tuning is judged by: none that rounding has fitted."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from e2e import tiny
from roundel.calibration import read_documents, split_tokens, windows
from roundel.recipes import Recipe
from roundel.stages.text import along, fresh, set_apart

RECIPE = Recipe(scheme="int4-g32", sequences=32, eval_sequences=4, tune="end-to-end")


@pytest.mark.parametrize("choice", [0, 6])
def test_rounding_does_not_go_along_what_tuning_is_judged_by(choice: int) -> None:
    split = split_tokens(torch.arange(400).reshape(50, 8), calibration=32, choice=choice, heldout=4, more=5, seed=0, source="numbers")
    apart = set(set_apart(split)[1].sequence_ids)
    recipe = dataclasses.replace(RECIPE, prefix_sequences=100)
    assert len(apart) == (choice or 4)
    assert set(along(recipe, split).sequence_ids) == set(split.everything.sequence_ids) - apart
    assert len(along(dataclasses.replace(recipe, prefix_sequences=7), split)) == 7
    untuned = dataclasses.replace(recipe, tune="none")
    assert along(untuned, split).sequence_ids == split.everything.sequence_ids


@pytest.mark.parametrize("characters", [20_000, 250])
def test_what_no_rounding_has_seen(characters: int, tmp_path: Path) -> None:
    """An eighth of the calibration sequences where there is more text, none where all of it is used."""
    file, tokenizer = tmp_path / "text.txt", tiny.make_tokenizer(starts=False)
    file.write_text(tiny.make_text(characters), encoding="utf-8")
    available = windows(read_documents(str(file), tokenizer), tokenizer, 8)
    count = min(32, len(available) - 4)
    split = split_tokens(available, calibration=count, heldout=4, seed=0, source="text", most=4 * 36)
    source = SimpleNamespace(tokenizer=tokenizer, length=8)
    found = fresh(dataclasses.replace(RECIPE, calibration=str(file)), source, split)  # type: ignore[arg-type]
    assert len(found) == (4 if count == 32 else 0)
    assert (count == 32) == (characters == 20_000)
    assert not {*found.sequence_ids} & {*split.everything.sequence_ids, *split.heldout.sequence_ids}
