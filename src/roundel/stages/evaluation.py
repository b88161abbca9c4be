"""What the rounded model costs: measured on held-out text by one forward sweep, and predicted from gradients of some of it.

All sequences pass each group of decoder layers twice, with the original's weights and with those that were written, before the next group
is loaded; at the end the head compares them in slices of tokens. A model that is in memory also continues some of the text, before and
after.

Cost: two forward passes; for the prediction a forward and a backward pass of `PREDICTED` sequences; for the continuations some 4000 tokens.
Memory: one group, and hidden states as the store decides; for the continuations the model once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from roundel import processes
from roundel.artifacts.source import Source, positions
from roundel.artifacts.work import Work
from roundel.calibration import Split
from roundel.curvature import predicted_kl
from roundel.curvature.collect import Prediction
from roundel.evaluate import Comparison, Divergence
from roundel.evaluate.continuations import beginnings, continued, told
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized
from roundel.settings import NEW_TOKENS
from roundel.stages.notes import Notes
from roundel.stages.rounding import Rounded
from roundel.sweeps.gradients import batches, steps

__all__ = ["PREDICTED", "Values", "continue_written", "evaluate_values", "predict"]

PREDICTED = 8
"""Sequences that the KL is predicted on."""


def predict(
    recipe: Recipe,
    source: Source,
    split: Split,
    rounded: Rounded,
    notes: Notes,
    *,
    batch_size: int,
    work: Work,
    sequences: int = PREDICTED,
) -> Prediction:
    """The KL that gradients on held-out text predict for the errors of all linears."""
    chosen, some = {name: source.linears[name] for name in rounded.weights}, split.heldout[:sequences]
    with notes.timed("prediction"), notes.progress.stage("prediction", steps(source.layers, chosen) * len(some)) as advance:
        return predicted_kl(
            source.layers,
            chosen,
            lambda name: chosen[name].weight.float().cpu() - dequantized(rounded.weights[name]),
            some,
            seed=recipe.seed,
            batch_size=batch_size,
            labels=recipe.labels,
            store=work.passing("prediction"),
            advance=advance,
        )


class Values(Protocol):
    """Parameters of a model that is measured, where they may differ from the original's."""

    def outside(self) -> Mapping[str, Tensor]:
        """Of those outside of the decoder layers, by name."""

    def of_group(self, index: int) -> Mapping[str, Tensor]:
        """Of those of a group of layers."""


@torch.no_grad()
def evaluate_values(written: Values, source: Source, split: Split, notes: Notes, *, batch_size: int, work: Work) -> Divergence:
    """The KL on held-out text of a model with these values: those in a directory (`artifacts.written`), or in memory."""
    layers, tokens, store = source.layers, split.heldout, work.passing("evaluation")
    rows, (count, length) = processes.own_rows(range(len(tokens))), tokens.ids.shape
    with notes.timed("evaluation"), notes.progress.stage("evaluation", (len(layers) + 1) * len(rows)) as advance:

        def ids(part: object) -> torch.Tensor:
            return tokens.ids[list(part)].to(layers.device)  # type: ignore[call-overload]

        outer = written.outside()
        first = layers.embed(ids([0]))
        shape = (count, *first.shape[1:])
        x, xq = (store.new(f"{path}-000", shape, first.dtype) for path in ("original", "written"))
        for part in batches(rows, batch_size):
            x.write(part, layers.embed(ids(part)))
        with layers.replaced(outer):
            for part in batches(rows, batch_size):
                xq.write(part, layers.embed(ids(part)))
        for index in range(len(layers)):
            after, afterq = (store.new(f"{path}-{index + 1:03d}", shape, first.dtype) for path in ("original", "written"))
            with layers.loaded(index):
                for part in batches(rows, batch_size):
                    after.write(part, layers.run(index, ids(part), x.read(part).to(layers.device)))
                with layers.replaced(written.of_group(index)):
                    for part in batches(rows, batch_size):
                        afterq.write(part, layers.run(index, ids(part), xq.read(part).to(layers.device)))
                        advance(len(part))
            store.drop(x)
            store.drop(xq)
            x, xq = after, afterq
        found, slices = Comparison(), layers.slices(length)
        for row in rows:
            h, hq = (states.read([row]).to(layers.device) for states in (x, xq))
            found.add_states(layers, tokens.ids[row], hq, h, outer, slices)
            advance(1)
        store.drop(x)
        store.drop(xq)
        found = found.of_all(rows)
    return found.result()


def continue_written(written: Values, source: Source, split: Split, notes: Notes) -> list[dict[str, Any]]:
    """Beginnings of the held-out text, continued by the original and by what a directory holds; none of a model that stays on the disk."""
    if source.weights is not None:
        return []
    layers, prompts = source.layers, beginnings(split.heldout)
    end, longest = source.tokenizer.eos_token_id, positions(source.model.config)

    def texts() -> list[dict[str, Any]]:
        original = continued(layers, prompts, NEW_TOKENS, end=end, longest=longest)
        with ExitStack() as stack:
            for values in (written.outside(), *(written.of_group(index) for index in range(len(layers)))):
                stack.enter_context(layers.replaced(values))
            quantized = continued(layers, prompts, NEW_TOKENS, end=end, longest=longest)
        return told(source.tokenizer, prompts, original, {"quantized": quantized})

    with notes.timed("continuations"):
        return processes.from_first(texts)
