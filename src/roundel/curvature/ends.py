"""Curvature of the embedding and the output head: one factor on the input side, and how often each row is used.

A row of either belongs to a token. With rows `e_v` of the error, `n_v` the share of the text that is token `v`, `g` the gradient at what
the embedding returns, `s` what it multiplies its rows by, `h` what the head reads and `p` the model's distribution:

    embedding    KL ~ 1/2 sum_v n_v e_v^T A e_v,          A = s^2 E[g g^T]
    head         KL ~ 1/2 E[var_p(e_v . h)] ~ 1/2 sum_v p_v e_v^T B e_v,      B = k E[h h^T],  k = E[1 - |p|^2]

The first is the Fisher if tokens do not interact and `A` is that of all; the second leaves out that adding one vector to all rows does
nothing, and what `p` has to do with `h`. A model that is any good has `p_v = n_v` on average, so the matrix of a tied model has `A + B`.
`k` is measured, as the square of drawn gradients at the head's output (`sweeps.labels`), so that scaled and capped logits need no case of
their own.

So rows do not depend on each other, and rounding feeds errors on along the columns only, under a factor that all rows share. Their
weights decide nothing but the predicted loss.

Cost: two Gram matrices, and the logits of `GAINED` sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from roundel import processes
from roundel.errors import ModelError
from roundel.sweeps.gradients import Visit, batches
from roundel.sweeps.labels import Labels
from roundel.sweeps.layers import Layers
from roundel.types import KroneckerFactors, TokenBatch

__all__ = ["EndMoments", "end_moments"]

ROWS = 1024
"""Of a problem: rows do not depend on each other, and none needs a factor of all tokens."""

GAINED = 1
"""Sequences of each run whose logits are looked at."""


@dataclass(frozen=True, kw_only=True)
class EndMoments:
    """Of one text."""

    embedding: Float[Tensor, "d d"]
    """`A`."""
    head: Float[Tensor, "h h"]
    """`B`; one zero without a head."""
    share: Float[Tensor, " vocabulary"]
    """`n`, as if every token had been seen once more."""

    def factors(self, *, embeds: bool, heads: bool) -> Iterator[tuple[slice, KroneckerFactors]]:
        """Of a matrix that is one of the ends or both: rows, and theirs."""
        H = torch.stack([*[self.embedding] * embeds, *[self.head] * heads]).sum(0)
        size = H.diagonal().mean().item()
        H, start = H / size, 0
        for share in self.share.split(ROWS):
            rows = slice(start, start + len(share))
            yield rows, KroneckerFactors(H_out=torch.eye(len(share)), H_in=H, scale=share.mean().item() * size)
            start = rows.stop


def end_moments(visit: Visit, layers: Layers, tokens: TokenBatch, rows: Sequence[int], *, seed: int) -> EndMoments:
    """Sums over sequences, in the visit of the ends.

    Raises:
        ModelError: the embedding is more than a table of rows with one factor.
    """
    g, last = visit.g, visit.last
    assert g is not None
    assert last is not None
    runs, device = processes.runs(rows), layers.device
    embedding: nn.Embedding = layers.model.get_input_embeddings()  # type: ignore[operator]
    head = layers.model.get_output_embeddings()  # type: ignore[operator]
    has_head = isinstance(head, nn.Linear)
    width, head_width = embedding.embedding_dim, head.in_features if has_head else 1

    def part(number: int) -> list[Tensor]:
        A, B, rest = torch.zeros(width, width, device=device), torch.zeros(head_width, head_width, device=device), torch.zeros(5)
        for place, own in enumerate(batches(runs[number], 1)):
            ids = tokens.ids[list(own)].to(device)
            leaf, hidden = layers.embedded(ids)
            (found,) = torch.autograd.grad(hidden, leaf, g.read(own).to(device))
            W, out = embedding.weight[ids].detach().double(), leaf.detach().double()
            rest[0] += float((W * out).sum())
            rest[1] += float((W * W).sum())
            rest[2] += float((out * out).sum())
            flat = found.float().flatten(0, -2)
            A += flat.T @ flat
            if not has_head:
                continue
            state = last.read(own).to(device)
            for some in layers.slices(ids.shape[1]):
                h = layers.head_inputs(ids[:, some], state[:, some]).float().flatten(0, -2)
                B += h.T @ h
            if place < GAINED:
                some = layers.slices(ids.shape[1])[0]
                z, logits = layers.head_outputs(ids[:, some], state[:, some])
                drawn = Labels(tokens, own[0], seed).gradient(logits[0].detach(), some)[None]
                (back,) = torch.autograd.grad(logits, z, drawn)
                rest[3] += float(back.double().square().sum())
                rest[4] += back.shape[1]
        return [A, B, rest.to(device)]

    total = [torch.zeros(width, width, device=device), torch.zeros(head_width, head_width, device=device), torch.zeros(5, device=device)]
    A, B, rest = (each.cpu() for each in processes.summed(total, len(runs), part))
    along, own_size, size = rest[:3].tolist()
    if along * along < 0.999 * own_size * size:
        raise ModelError("what the embedding returns is not its rows times one factor")
    chosen = tokens.ids[list(rows)]
    counts = torch.bincount(chosen.flatten(), minlength=embedding.num_embeddings).double() + 1
    return EndMoments(
        embedding=A * (along / own_size) ** 2 / chosen.numel(),
        head=B * float(rest[3] / rest[4].clamp(min=1)) / chosen.numel(),
        share=(counts / counts.sum()).float(),
    )
