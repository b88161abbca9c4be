"""Everything that decides a quantized checkpoint, in one value; and the named recipes.

Two runs with equal recipes, model and text write the same bytes. What only changes speed or memory (device, batch size) is no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from roundel.curvature import parse_curvature
from roundel.curvature.fisher import LABEL_KINDS
from roundel.errors import SchemeError
from roundel.grids import parse_scheme

__all__ = ["BEST", "GPTQ", "NEAREST", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one quantization; validated when made.

    Raises:
        SchemeError: a name is unknown or a number out of range.
    """

    scheme: str = "int4-g128"
    curvature: str = "auto"
    labels: str = "sampled"
    calibration: str = "self"
    sequences: int = 512
    seq_len: int = 512
    eval_data: str | None = None
    eval_sequences: int = 64
    sweeps: int = 4
    damping: float = 0.1
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_scheme(self.scheme)
        parse_curvature(self.curvature)
        if self.labels not in LABEL_KINDS:
            raise SchemeError(f"labels {self.labels!r}: expected one of {', '.join(LABEL_KINDS)}")
        lowest = {"sequences": 1, "seq_len": 2, "eval_sequences": 1, "sweeps": 0, "seed": 0}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise SchemeError(f"{name} is {getattr(self, name)}: expected {least} or more")
        if not 0 < self.damping <= 10:
            raise SchemeError(f"damping is {self.damping}: expected more than 0 and at most 10, relative to the mean diagonal")

    def as_json(self) -> dict[str, Any]:
        """Plain values by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


NEAREST: dict[str, Any] = {"curvature": "identity", "sweeps": 0}
"""Nearest rounding with searched, signed scales."""

GPTQ: dict[str, Any] = {"curvature": "activation", "sweeps": 0}
"""LDLQ: one-sided feedback under the input's second moment."""

BEST: dict[str, Any] = {}
"""The defaults of `Recipe`."""
