"""The search for scales of groups of integers on the CPU: one pass over a group, which stays in the cache, for all candidates.

The specification is `grids.uniform.Uniform.search`: 48 magnitudes of both signs, each judged by `<w x, q>^2 / <w q, q>` of its codes `q`
and replaced by its best scale `<w x, q> / <w q, q>`. In plain tensors that is a thousand elementwise operations over the whole weight, in
threads that wait for each other after each; here each thread takes some rows. Sums are in another order, so that of two candidates that are
equally good up to rounding another may be taken.

Cost: `2 * 48 * 7` flops per weight.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

__all__ = ["search"]

_Array = np.ndarray[Any, np.dtype[Any]]


def search(grouped: Tensor, weights: Tensor, low: int, high: int, fractions: Tensor) -> Tensor:
    """The best scale of each group.

    Args:
        grouped: `(rows, columns, size)` in float32, groups of size about 1.
        weights: `(columns, size)`, of their errors.
        low: Least code.
        high: Greatest code.
        fractions: Magnitudes to try, in units of the smallest that clips neither tail.

    Returns:
        `(rows, columns)`.
    """
    found = torch.empty(grouped.shape[:2], dtype=torch.float32)
    values, columns = grouped.contiguous().numpy(), weights.contiguous().numpy()
    tried, best = fractions.to(torch.float32).numpy(), found.numpy()
    workers = max(1, min(torch.get_num_threads(), len(values)))
    ends = np.linspace(0, len(values), workers + 1).astype(int)
    if workers == 1:
        _search(values, columns, low, high, tried, best)
    else:
        with ThreadPoolExecutor(workers) as pool:
            parts = itertools.pairwise(ends)
            list(pool.map(lambda part: _search(values[part[0] : part[1]], columns, low, high, tried, best[part[0] : part[1]]), parts))
    return found


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "arcp", "nsz"})
def _search(values: _Array, weights: _Array, low: int, high: int, fractions: _Array, best: _Array) -> None:
    rows, columns, size = values.shape
    least, most = np.float32(low), np.float32(high)
    for row in range(rows):
        for column in range(columns):
            x, w = values[row, column], weights[column]
            top, bottom = np.float32(0.0), np.float32(0.0)
            for k in range(size):
                top = max(top, x[k])
                bottom = max(bottom, -x[k])
            best_gain, best_scale = np.float32(-1.0), np.float32(0.0)
            for side in range(2):
                sign = np.float32(1.0 if side == 0 else -1.0)
                positive, negative = (top, bottom) if side == 0 else (bottom, top)
                unclipped = max(positive / most, negative / -least)
                for fraction in fractions:
                    scale = sign * fraction * unclipped
                    inverse = np.float32(1.0) / scale if scale != 0 else np.float32(1.0)
                    cross, norm = np.float32(0.0), np.float32(0.0)
                    for k in range(size):
                        q = min(max(np.rint(x[k] * inverse), least), most)
                        weighted = w[k] * q
                        cross += weighted * x[k]
                        norm += weighted * q
                    gain = cross * cross / norm if norm > 0 else np.float32(0.0)
                    if gain > best_gain:
                        best_gain = gain
                        best_scale = cross / norm if norm > 0 else scale
            best[row, column] = best_scale
