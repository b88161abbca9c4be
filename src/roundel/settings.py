"""What decides a quantized checkpoint, and what is taken where nothing is said: plain data.

The command line shows the defaults without what computes with them, which takes seconds to import. `recipes.Recipe` checks the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ABLATION", "EFFORTS", "NEW_TOKENS", "Settings"]

NEW_TOKENS = 24
"""With which models continue a text, in reports."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one quantization, as they are given."""

    effort: str = "normal"
    scheme: str = "int4-g128"
    bits: float | None = None
    target_size: str | None = None
    schemes: tuple[str, ...] = ()
    mix: str | None = None
    embedding: str = "auto"
    head: str = "auto"
    kv_cache: str = "none"
    rotate: str = "auto"
    format: str = "auto"
    curvature: str = "auto"
    labels: str = "sampled"
    factor_type: str = "float32"
    calibration: str = "self"
    sequences: int = 64
    seq_len: int = 512
    eval_data: str | None = None
    eval_sequences: int = 64
    sweeps: int = 4
    damping: float = 0.3
    prefix_aware: bool | None = None
    prefix_sequences: int | None = None
    prefix_strength: float = 0.7
    stream_strength: float = 0.7
    prefix_damping: float = 0.1
    natural_places: int | None = None
    tune: str = "none"
    tune_steps: int | None = None
    tune_tokens: int | None = None
    tune_rest: bool | None = None
    seed: int = 0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


EFFORTS: dict[str, dict[str, Any]] = {
    "quick": {"curvature": "pilot", "sequences": 24, "prefix_sequences": 64, "natural_places": 0, "sweeps": 2, "eval_sequences": 32},
    "normal": {},
    "best": {"sequences": 256, "tune": "end-to-end", "tune_steps": 320},
}
"""What a named effort sets; all else is as in `Settings`, and what is given explicitly comes first.

On two cores and a model of 135 million weights 7, 16 and 86 minutes; twice the steps, the default of `tune`, would be 50 more."""

ABLATION = (
    "auto",
    "pilot",
    "mean",
    "kfac",
    "sketch-b",
    "sketch-a",
    "triangular",
    "power",
    "fastkron",
    "fastkron:batch=16",
    "fastkron:batch=128",
    "guided",
    "diagonal:of=mean",
    "activation",
    "gptq",
    "nearest",
)
"""All rows of the papers' ablations, and ours."""
