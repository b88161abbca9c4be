"""The block types of llama.cpp, with scales as they are stored.

Blocks of 32 columns have one float16 scale `d`; superblocks of 256 columns have small integers for each group of 16 or 32, in units of one
or two float16 numbers for the superblock:

    q4_0    d q, q in -8..7                     q4_k  d sc q - dmin m, groups of 32, sc and m in 0..63, q in 0..15
    q5_0    d q, q in -16..15                   q5_k  the same, q in 0..31
    q8_0    d q, q in -127..127                 q2_k  d sc q - dmin m, groups of 16, sc and m in 0..15, q in 0..3
    iq4_nl  d t[q], 16 levels, none of them 0
    iq4_xs  d sc t[q], groups of 32, sc in -32..31, the same levels
    q3_k    d sc q, groups of 16, sc in -32..31, q in -4..3
    q6_k    d sc q, groups of 16, sc in -128..127, q in -32..31

Stored: `d`, `dmin` float16; `sc` int8 where signed, else uint8; `m` uint8. Steps are never zero: `sc` is never 0, which costs nothing, as
the code 0 stands for the same value; an all-zero block has the least `d`, 6e-8. Values beyond float16's range are clamped, and where `d`
would be below 6e-8 (weights of 1e-6 and less in a superblock) they become coarse or zero: that is the format.

Fit, in the size of the block: first a real scale (and minimum, by both ends of the range jointly, never negative) of each group for the
least squared error weighted by column. Then `d` and `dmin`: for fixed codes the error is a quadratic in each group's scale and minimum, so
many candidates around `max / most` are judged without a pass over the weights. The best few are judged exactly, with `sc` and `m`
chosen among neighbours by what they round the weights to, and polished in turns with `d` and `dmin` in closed form.
Cost: 50 (blocks) to 100 (superblocks) passes over the weights: 4096 x 4096 takes 2 s (q8_0) to 20 s (q2_k, q4_k) on one core.

Not done: ternary digits (codebooks of 4 or 8 weights: `codebooks.py`); negative `dmin`, which the format would allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from roundel.grids.base import ScalarGrid, Scales, divisor_hint, refuse_width, spread
from roundel.grids.search import by_rows, column_weights, group_size, integers, nonzero, search_range, search_scale, table

__all__ = ["Block", "Superblock", "SuperblockWithMinima", "parse"]


class Layout(NamedTuple):
    """Sizes of one block type."""

    columns: int
    """Columns of a block."""
    bytes: int
    """Bytes of a block."""
    bits: int
    codes: tuple[int, int]
    """Lowest and highest code."""
    group: int
    """Columns that share `sc`."""
    steps: tuple[int, int] = (0, 0)
    """Smallest and largest `sc`, and `m`."""


LAYOUTS = {
    "q4_0": Layout(32, 18, 4, (-8, 7), 32),
    "q5_0": Layout(32, 22, 5, (-16, 15), 32),
    "q8_0": Layout(32, 34, 8, (-127, 127), 32),  # llama.cpp never writes -128
    "iq4_nl": Layout(32, 18, 4, (-8, 7), 32),
    "iq4_xs": Layout(256, 136, 4, (-8, 7), 32, (-32, 31)),
    "q2_k": Layout(256, 84, 2, (0, 3), 16, (0, 15)),
    "q3_k": Layout(256, 110, 3, (-4, 3), 16, (-32, 31)),
    "q4_k": Layout(256, 144, 4, (0, 15), 32, (0, 63)),
    "q5_k": Layout(256, 176, 5, (0, 31), 32, (0, 63)),
    "q6_k": Layout(256, 210, 6, (-32, 31), 16, (-128, 127)),
}

IQ4_LEVELS = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))

_LEAST_SIZE = 2.0**-40
"""Blocks whose largest weight is below this are fitted at this size: no float16 scale can hold them anyway."""

_FINALISTS = 3
"""How many candidates of `d` are judged exactly."""


@dataclass(frozen=True, kw_only=True)
class _LlamaBlock(ScalarGrid):
    """What all block types share."""

    kind: str

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.kind]

    @property
    def name(self) -> str:
        return self.kind

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def code_range(self) -> tuple[int, int]:
        return self.layout.codes

    @property
    def levels(self) -> tuple[float, ...] | None:
        return IQ4_LEVELS if self.kind.startswith("iq4") else None

    def check(self, d_out: int, d_in: int) -> None:
        if d_in % self.layout.columns:
            blocks = ["q4_0", "q5_0", "iq4_nl", "q8_0"] if d_in % 32 == 0 else []
            integer = [f"int{self.bits}-g{size}" for size in divisor_hint(d_in)[:1]]
            raise refuse_width(self.name, self.layout.columns, d_in, " or ".join(blocks or [*integer, f"int{self.bits}-channel"]))

    def stored(self, name: str, values: Tensor, like: Tensor) -> Tensor:
        return _half(values)

    def stored_bits(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        self.check(*shape)
        return shape[0] * (shape[1] // self.layout.columns) * self.layout.bytes * 8

    def nearest(self) -> Callable[[Tensor], Tensor]:
        """The level next to each value."""
        return integers(*self.code_range) if self.levels is None else table(self.levels, 0.5)

    def ends(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        levels = self.levels or tuple(map(float, self.code_range))
        return levels[0], levels[-1]

    def grouped(self, rows: Tensor) -> Tensor:
        """Rows, or weights of columns, by block and group."""
        blocks: Tensor = rows.unflatten(-1, (-1, self.layout.columns // self.layout.group, self.layout.group))
        return blocks


class Block(_LlamaBlock):
    """32 columns with one float16 scale `d` of either sign."""

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        self.check(*W.shape)
        w = column_weights(weights, W).unflatten(0, (-1, self.layout.columns))
        nearest, ends = self.nearest(), self.ends()
        fractions = torch.linspace(0.9 if self.kind == "q8_0" else 0.5, 1.1, 25).tolist()
        signs = (1.0,) if self.kind == "q8_0" else (1.0, -1.0)

        def fit(rows: Tensor) -> dict[str, Tensor]:
            x = rows.unflatten(1, (-1, self.layout.columns))
            size = group_size(x, _LEAST_SIZE)
            scale = search_scale(x / size.unsqueeze(-1), w, nearest, ends=ends, fractions=fractions, signs=signs)
            return {"d": _half(scale * size)}

        return by_rows(W, fit)

    def affine(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, None]:
        return spread(scales["d"].to(dtype), shape), None

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"d": self.units(codes, dtype)}


class Superblock(_LlamaBlock):
    """256 columns: signed scales `sc` of 16 columns, in units of `d`, which has either sign."""

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        self.check(*W.shape)
        w = self.grouped(column_weights(weights, W))
        nearest, ends = self.nearest(), self.ends()
        low, high = self.layout.steps
        fractions = (torch.linspace(0.76, 1.08, 17) if self.kind == "q6_k" else torch.linspace(0.46, 1.09, 22)).tolist()

        def fit(rows: Tensor) -> dict[str, Tensor]:
            x = self.grouped(rows)
            size = group_size(x.flatten(2), _LEAST_SIZE)
            x = x / size[..., None, None]
            weighted = w * x
            real = search_scale(x, w, nearest, ends=ends, fractions=fractions)
            norm = (w * nearest(x / nonzero(real).unsqueeze(-1)).square_()).sum(-1)

            candidates, costs = [], []
            for sign in (1.0, -1.0):
                base = torch.maximum((sign * real).amax(-1) / high, (sign * real).amin(-1) / low)
                for fraction in torch.linspace(0.85, 1.2, 22).tolist():
                    d = _half_in(size, sign * fraction * base)
                    sc = _nonzero_steps(real / d.unsqueeze(-1), low, high)
                    candidates.append(d)
                    costs.append((norm * (d.unsqueeze(-1) * sc - real).square_()).sum(-1))

            best_error = torch.full_like(size, torch.inf)
            best_d, best_sc = torch.ones_like(size), torch.ones_like(real)

            def judge(d: Tensor, centre: Tensor) -> None:
                """The exact error, with the best of three steps around `centre` in each group."""
                nonlocal best_error, best_d, best_sc
                error, chosen = torch.full_like(real, torch.inf), torch.ones_like(real)
                for offset in (0, -1, 1):
                    sc = _nonzero_steps(centre + offset, low, high)
                    scale = (d.unsqueeze(-1) * sc).unsqueeze(-1)
                    tried = (w * (x - scale * nearest(x / scale)).square_()).sum(-1)
                    chosen = torch.where(tried < error, sc, chosen)
                    error = torch.minimum(tried, error)
                better = error.sum(-1) < best_error
                best_error = torch.where(better, error.sum(-1), best_error)
                best_d = torch.where(better, d, best_d)
                best_sc = torch.where(better.unsqueeze(-1), chosen, best_sc)

            stacked = torch.stack(candidates)
            for index in torch.stack(costs).topk(_FINALISTS, dim=0, largest=False).indices:
                d = stacked.gather(0, index.unsqueeze(0))[0]
                judge(d, real / d.unsqueeze(-1))
            for _ in range(2):
                q = nearest(x / (best_d.unsqueeze(-1) * best_sc).unsqueeze(-1))
                along = (best_sc * (weighted * q).sum(-1)).sum(-1)
                norm = (best_sc.square() * (w * q.square_()).sum(-1)).sum(-1)
                judge(_half_in(size, torch.where(norm > 0, along / nonzero(norm), best_d)), best_sc)
            return {"d": _half(best_d * size), "sc": best_sc.flatten(1).to(torch.int8)}

        return by_rows(W, fit)

    def affine(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, None]:
        return spread(_products(scales["d"], scales["sc"], dtype), shape), None

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"d": spread(scales["sc"].to(dtype), shape) * self.units(codes, dtype)}


class SuperblockWithMinima(_LlamaBlock):
    """256 columns: unsigned scales `sc` and minima `m` of 16 or 32 columns, in units of `d` and `dmin`."""

    def fit_scales(self, W: Float[Tensor, "d_out d_in"], weights: Float[Tensor, " d_in"], dtype: torch.dtype) -> dict[str, Tensor]:
        self.check(*W.shape)
        w = self.grouped(column_weights(weights, W))
        total = w.sum(-1)
        top_code, most = self.code_range[1], self.layout.steps[1]
        nearest = integers(0, top_code)
        fractions = torch.linspace(0.85, 1.25, 17).tolist()

        def fit(rows: Tensor) -> dict[str, Tensor]:
            x = self.grouped(rows.clamp(-65504 * most, 65504 * most))
            size = group_size(x.flatten(2), _LEAST_SIZE)
            x = x / size[..., None, None]
            along_one = (w * x).sum(-1)

            def moments(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                """`<w x, q>`, `<w, q>`, `<w q, q>` of the codes of a scale and a minimum."""
                q = nearest((x + minimum.unsqueeze(-1)) / scale.unsqueeze(-1))
                wq = w * q
                return (wq * x).sum(-1), wq.sum(-1), (wq * q).sum(-1)

            def closed_form(scale: Tensor, minimum: Tensor) -> tuple[Tensor, ...]:
                """For those codes the gain, and the scale and minimum, not below zero, of least error."""
                xq, q, qq = moments(scale, minimum)
                determinant = total * qq - q * q
                free = torch.where(determinant > 1e-6 * total * qq, (total * xq - along_one * q) / nonzero(determinant), scale)
                fitted = (free * q - along_one) / total
                scale = torch.where(fitted >= 0, free, torch.where(qq > 0, xq / nonzero(qq), scale)).clamp(min=_TINY)
                minimum = fitted.clamp(min=0)
                gain = 2 * (scale * xq - minimum * along_one) - scale * (scale * qq - 2 * minimum * q) - minimum.square() * total
                return gain, scale, minimum

            def score(low: Tensor, top: Tensor) -> tuple[Tensor, ...]:
                minimum = (-low).clamp(min=0)
                return closed_form(((top + minimum) / top_code).clamp(min=_TINY), minimum)

            scale, minimum = search_range(x.amin(-1).clamp(max=0), x.amax(-1), score)
            for _ in range(2):
                _, scale, minimum = closed_form(scale, minimum)
            xq, q, qq = moments(scale, minimum)

            # for fixed codes, the error of all pairs of candidates up to a constant
            d_base, dmin_base = scale.amax(-1) / most, minimum.amax(-1) / most
            dmins = torch.stack([_half_in(size, fraction * dmin_base) for fraction in fractions])
            ds = torch.stack([_half_in(size, fraction * d_base) for fraction in fractions])
            costs = []
            for d in ds:
                s = d.unsqueeze(-1) * (scale / d.unsqueeze(-1)).round_().clamp_(1, most)
                wanted = (s * q - along_one) / total
                m = dmins.unsqueeze(-1) * (wanted / dmins.unsqueeze(-1)).round_().clamp_(0, most)
                costs.append((s * (s * qq - 2 * xq) + m * (m * total + 2 * (along_one - s * q))).sum(-1))

            best_error = torch.full_like(size, torch.inf)
            best_d, best_dmin = torch.ones_like(size), torch.ones_like(size)
            best_sc, best_m = torch.ones_like(scale), torch.zeros_like(scale)

            def judge(d: Tensor, dmin: Tensor, centre: Tensor, q: Tensor) -> None:
                """The exact error, with the best of three `sc` around `centre` and three `m` around what suits each in every group."""
                nonlocal best_error, best_d, best_dmin, best_sc, best_m
                error, chosen_sc, chosen_m = torch.full_like(scale, torch.inf), best_sc, best_m
                for offset in (0, -1, 1):
                    sc = (centre + offset).round_().clamp_(1, most)
                    s = d.unsqueeze(-1) * sc
                    wanted = (s * q - along_one) / total / dmin.unsqueeze(-1)
                    for offset_m in (0, -1, 1):
                        m = (wanted + offset_m).round_().clamp_(0, most)
                        shifted = x + (dmin.unsqueeze(-1) * m).unsqueeze(-1)
                        step = s.unsqueeze(-1)
                        tried = (w * (shifted - step * nearest(shifted / step)).square_()).sum(-1)
                        better = tried < error
                        chosen_sc, chosen_m = torch.where(better, sc, chosen_sc), torch.where(better, m, chosen_m)
                        error = torch.minimum(tried, error)
                better = error.sum(-1) < best_error
                best_error = torch.where(better, error.sum(-1), best_error)
                best_d, best_dmin = torch.where(better, d, best_d), torch.where(better, dmin, best_dmin)
                best_sc = torch.where(better.unsqueeze(-1), chosen_sc, best_sc)
                best_m = torch.where(better.unsqueeze(-1), chosen_m, best_m)

            for index in torch.stack(costs).flatten(0, 1).topk(_FINALISTS, dim=0, largest=False).indices:
                d = ds.gather(0, (index // len(dmins)).unsqueeze(0))[0]
                judge(d, dmins.gather(0, (index % len(dmins)).unsqueeze(0))[0], scale / d.unsqueeze(-1), q)
            for _ in range(2):
                xq, q, qq = moments(best_d.unsqueeze(-1) * best_sc, best_dmin.unsqueeze(-1) * best_m)
                a, b, c = (best_sc.square() * qq).sum(-1), (best_sc * best_m * q).sum(-1), (best_m.square() * total).sum(-1)
                right, left = (best_sc * xq).sum(-1), (best_m * along_one).sum(-1)
                determinant = a * c - b * b
                regular = determinant > 1e-5 * a * c
                d = torch.where(regular, (c * right - b * left) / nonzero(determinant), right / nonzero(a))
                dmin = torch.where(regular, (b * right - a * left) / nonzero(determinant), best_dmin)
                judge(_half_in(size, torch.where(d > 0, d, best_d)), _half_in(size, torch.where(dmin > 0, dmin, best_dmin)), best_sc, q)
            return {
                "d": _half(best_d * size),
                "dmin": _half(best_dmin * size),
                "sc": best_sc.flatten(1).to(torch.uint8),
                "m": best_m.flatten(1).to(torch.uint8),
            }

        return by_rows(W, fit)

    def affine(self, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return (
            spread(_products(scales["d"], scales["sc"], dtype), shape),
            spread(-_products(scales["dmin"], scales["m"], dtype), shape),
        )

    def parts(self, codes: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "d": spread(scales["sc"].to(dtype), shape) * codes.to(dtype),
            "dmin": spread(-scales["m"].to(dtype), shape),
        }


_TINY = 1e-7
"""Least scale of a group in units of its superblock's largest weight."""


def _products(super_scales: Tensor, steps: Tensor, dtype: torch.dtype) -> Float[Tensor, "d_out groups"]:
    """The real scale of each group."""
    return spread(super_scales.to(dtype), (steps.shape[0], steps.shape[1])) * steps.to(dtype)


def _half(values: Tensor) -> Tensor:
    """float16, finite and not zero."""
    stored = values.clamp(-65504, 65504).to(torch.float16)
    return torch.where(stored == 0, torch.copysign(torch.full_like(stored, 2.0**-24), values.to(torch.float16)), stored)


def _half_in(size: Tensor, values: Tensor) -> Tensor:
    """Values in units of `size` that are float16 in units of 1."""
    return _half(values * size).to(size.dtype) / size


def _nonzero_steps(values: Tensor, low: int, high: int) -> Tensor:
    """Nearest integers but zero."""
    steps = values.round().clamp_(low, high)
    return torch.where(steps == 0, torch.where(values < 0, -1.0, 1.0), steps)


def parse(name: str) -> _LlamaBlock | None:
    """The grid of a block type's name, such as `q4_k`, else None."""
    if name not in LAYOUTS:
        return None
    layout = LAYOUTS[name]
    family = Block if layout.columns == 32 else SuperblockWithMinima if layout.codes[0] == 0 else Superblock
    return family(kind=name)
