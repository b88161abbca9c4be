"""Feedback and descent for grids that round tiles of many weights at once.

As for scalars (`feedback`, `descent`), with blocks in place of entries. `H = L D L^T` with `L` unit *block* lower triangular, whose
diagonal blocks are identities: no error is fed back inside a tile, what is inside is the coder's business (`ldl.block_lower`; YAQA, arXiv
2505.22988, section 3.3). Its own loss in a tile is then `tr(eta^T D_out,i eta D_in,j)`; coders know independent weights only, so the
diagonals of both blocks weigh the entries.

    target_ij = W_ij + F_ij + R_ij,    F_i,<j += E_ij L_in[j, <j],    R_<i,j += L_out[i, <i]^T (E_ij + F_ij)

Tiles of an anti-diagonal do not depend on each other and go to the coder in one call. A sweep visits every tile again with all others
fixed: the best real-valued tile is `W_hat + H_out,ii^-1 P H_in,jj^-1`, `P` the tile of `H_out E H_in`; it is coded, and the new codes are
taken if the loss, with all that the other tiles of the call have changed, falls. A call holds tiles of different rows and columns.

A wave of one matrix has few tiles, too few to fill the lanes of a processor or the multiprocessors of a GPU. So both loops are generators:
they yield the tiles that they want coded and are sent the codes, and whoever runs several of them (`in_step`) puts the tiles of one wave of
each into one call of the coder.

Flops besides the coder's: `4 d_out d_in (d_out + d_in)` for the feedback (products with the zeros above the diagonal included),
`2 d_out d_in (d_out + d_in)` for a sweep; memory four matrices of the weight's size and the factors once more.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from roundel.grids.base import Scales, TileGrid
from roundel.linalg.ldl import block_lower
from roundel.types import RoundingProblem

__all__ = ["Coding", "Wanted", "feedback_tiles", "in_step", "sweep_tiles"]

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Tiles to be coded, with the weights of their entries."""

    values: Float[Tensor, "tiles size"]
    weights: Float[Tensor, "tiles size"]


Coding = Generator[Wanted, Tensor, Result]
"""Yields tiles, is sent their codes, and returns a result."""


def in_step(loops: Sequence[Coding[Result]], grid: TileGrid) -> list[Result]:
    """The results of all loops, whose tiles are coded together, one yield of each at a time."""
    results: dict[int, Result] = {}
    wanted: dict[int, Wanted] = {}

    def resume(index: int, codes: Tensor | None) -> None:
        try:
            wanted[index] = next(loops[index]) if codes is None else loops[index].send(codes)
        except StopIteration as stop:
            results[index] = stop.value

    for index in range(len(loops)):
        resume(index, None)
    while wanted:
        asked, wanted = wanted, {}
        codes = grid.encode_tiles(torch.cat([each.values for each in asked.values()]), torch.cat([each.weights for each in asked.values()]))
        for index, own in zip(asked, codes.split([len(each.values) for each in asked.values()]), strict=True):
            resume(index, own)
    return [results[index] for index in range(len(loops))]


@dataclass(frozen=True, kw_only=True)
class _Tiling:
    """A problem filled up to whole tiles: `rows x columns` each, `down x across` of them."""

    rows: int
    columns: int
    down: int
    across: int

    @classmethod
    def of(cls, grid: TileGrid, shape: tuple[int, int]) -> _Tiling:
        rows, columns = grid.tile(*shape)
        return cls(rows=rows, columns=columns, down=-(-shape[0] // rows), across=-(-shape[1] // columns))

    def padded(self, matrix: Tensor) -> Tensor:
        """With zeros below and to the right."""
        below, right = self.down * self.rows - matrix.shape[0], self.across * self.columns - matrix.shape[1]
        return torch.nn.functional.pad(matrix, (0, right, 0, below))

    def split(self, matrix: Tensor) -> Tensor:
        """`(down, across, rows, columns)` of a padded matrix; writing to it writes to the matrix."""
        return matrix.view(self.down, self.rows, self.across, self.columns).transpose(1, 2)


def _extended(H: Tensor, size: int) -> Tensor:
    """With an identity in the corner that is filled up."""
    extended = torch.eye(size, dtype=H.dtype, device=H.device)
    extended[: H.shape[0], : H.shape[0]] = H
    return extended


def _importance(H: Tensor, L: Tensor, block: int) -> Float[Tensor, "blocks block"]:
    """Diagonals of the blocks of `D`, `H = L D L^T` with a unit block lower `L`."""
    half = torch.linalg.solve_triangular(L, H, upper=False, unitriangular=True)
    D = torch.linalg.solve_triangular(L, half.T, upper=False, unitriangular=True)
    importance: Tensor = D.diagonal().unflatten(0, (-1, block)).clamp(min=0)
    return importance


def feedback_tiles(problem: RoundingProblem, grid: TileGrid, scales: Scales) -> Coding[Tensor]:
    """Codes `(tile rows, tile columns, symbols)` by two-sided feedback, tiles from the bottom right."""
    tiling = _Tiling.of(grid, problem.shape)
    rows, columns, down, across = tiling.rows, tiling.columns, tiling.down, tiling.across
    steps = grid.steps(scales, problem.shape, problem.W.dtype)[:, :, None, None]
    W = tiling.padded(problem.W)
    inside = tiling.split(tiling.padded(torch.ones_like(problem.W)))
    L_out, L_in = (
        block_lower(_extended(L, size), block) for L, size, block in ((problem.L_out, len(W), rows), (problem.L_in, W.shape[1], columns))
    )
    weigh_out = _importance(_extended(problem.H_out, len(W)), L_out, rows)
    weigh_in = _importance(_extended(problem.H_in, W.shape[1]), L_in, columns)
    identity_out, identity_in = (torch.eye(len(L), dtype=L.dtype, device=L.device) for L in (L_out, L_in))
    below_out = (L_out - identity_out).unflatten(0, (down, rows))  # (down, rows, d_out): what block i feeds to all above
    below_in = (L_in - identity_in).unflatten(0, (across, columns))
    from_columns, from_rows = torch.zeros_like(W), torch.zeros_like(W)
    by_row, by_column = from_columns.unflatten(0, (down, rows)), from_rows.unflatten(1, (across, columns))
    W_tiles, F_tiles, R_tiles = tiling.split(W), tiling.split(from_columns), tiling.split(from_rows)
    codes: Tensor | None = None
    for wave in range(down + across - 2, -1, -1):
        i = torch.arange(max(0, wave - across + 1), min(down, wave + 1), device=W.device)
        j = wave - i
        target = W_tiles[i, j] + F_tiles[i, j] + R_tiles[i, j]
        weights = weigh_out[i].unsqueeze(2) * weigh_in[j].unsqueeze(1) * inside[i, j]
        found = yield Wanted(values=(target / steps[i, j]).flatten(1), weights=_normalised(weights.flatten(1)))
        if codes is None:
            codes = torch.zeros(down, across, found.shape[1], dtype=found.dtype, device=found.device)
        codes[i, j] = found
        E = (W_tiles[i, j] - steps[i, j] * grid.decode_tiles(found).to(W.dtype).unflatten(1, (rows, columns))) * inside[i, j]
        Y = E + F_tiles[i, j]
        by_row[i] += E @ below_in[j]
        by_column[:, j] += (below_out[i].transpose(1, 2) @ Y).transpose(0, 1)
    assert codes is not None
    return codes


def sweep_tiles(problem: RoundingProblem, grid: TileGrid, scales: Scales, codes: Tensor) -> Coding[Tensor]:
    """One sweep over all tiles; returns new codes whose proxy loss is not higher."""
    tiling = _Tiling.of(grid, problem.shape)
    rows, columns, down, across = tiling.rows, tiling.columns, tiling.down, tiling.across
    steps = grid.steps(scales, problem.shape, problem.W.dtype)[:, :, None, None]
    W = tiling.padded(problem.W)
    inside = tiling.split(tiling.padded(torch.ones_like(problem.W)))
    H_out, H_in = _extended(problem.H_out, len(W)), _extended(problem.H_in, W.shape[1])
    own_out = torch.stack([H_out[k : k + rows, k : k + rows] for k in range(0, len(W), rows)])
    own_in = torch.stack([H_in[k : k + columns, k : k + columns] for k in range(0, W.shape[1], columns)])
    inverse_out, inverse_in = torch.linalg.inv(own_out.double()).to(W.dtype), torch.linalg.inv(own_in.double()).to(W.dtype)
    weigh_out, weigh_in = own_out.diagonal(dim1=1, dim2=2), own_in.diagonal(dim1=1, dim2=2)
    codes = codes.clone()
    W_hat = tiling.padded(grid.dequantize(codes, scales, problem.shape, W.dtype))
    hat_tiles = tiling.split(W_hat)
    R = (W - W_hat) @ H_in  # (d_out, d_in)
    R_rows, R_columns = R.unflatten(0, (down, rows)), R.unflatten(1, (across, columns))
    out_rows, in_rows = H_out.unflatten(0, (down, rows)), H_in.unflatten(0, (across, columns))
    short, long = min(down, across), max(down, across)
    first = torch.arange(short, device=W.device)
    for turn in range(long):
        second = (first + turn) % long
        i, j = (first, second) if down <= across else (second, first)
        P = out_rows[i] @ R_columns[:, j].transpose(0, 1)
        best = hat_tiles[i, j] + inverse_out[i] @ P @ inverse_in[j]
        weights = weigh_out[i].unsqueeze(2) * weigh_in[j].unsqueeze(1) * inside[i, j]
        found = yield Wanted(values=(best / steps[i, j]).flatten(1), weights=_normalised(weights.flatten(1)))
        values = steps[i, j] * grid.decode_tiles(found).to(W.dtype).unflatten(1, (rows, columns)) * inside[i, j]
        change = values - hat_tiles[i, j]
        curved = own_out[i] @ change @ own_in[j]
        accepted = _accept(change, P, curved, H_out, H_in, i, j, rows, columns)
        i, j, change = i[accepted], j[accepted], change[accepted]
        codes[i, j] = found[accepted]
        hat_tiles[i, j] = values[accepted]
        R_rows[i] -= change @ in_rows[j]
    return codes


def _accept(
    change: Tensor, P: Tensor, curved: Tensor, H_out: Tensor, H_in: Tensor, i: Tensor, j: Tensor, rows: int, columns: int
) -> Int[Tensor, " accepted"]:
    """Which of the changes to take, one after the other: those that lower the loss after all that were taken before."""
    gain = (change * P - 0.5 * change * curved).flatten(1).sum(1)
    order = torch.nonzero(gain > 0).flatten()[gain[gain > 0].argsort(descending=True)].tolist()
    taken: list[int] = []
    for k in order:
        if taken:
            others = torch.tensor(taken, device=i.device)
            out = H_out[i[k] * rows : (i[k] + 1) * rows].unflatten(1, (-1, rows))[:, i[others]].transpose(0, 1)  # (taken, rows, rows)
            into = H_in.unflatten(0, (-1, columns))[j[others], :, j[k] * columns : (j[k] + 1) * columns]
            coupled = (out @ change[others] @ into * change[k]).sum()
            if not gain[k] > coupled:
                continue
        taken.append(k)
    return torch.tensor(taken, dtype=torch.long, device=i.device)


def _normalised(weights: Float[Tensor, "tiles size"]) -> Float[Tensor, "tiles size"]:
    """With a mean of 1 in each tile."""
    return weights / weights.mean(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
