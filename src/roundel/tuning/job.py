"""What both kinds of tuning are given, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roundel.artifacts.source import Source
from roundel.tuning.saved import Saved
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["Job", "Tuned", "stored_values"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One tuning."""

    source: Source
    """The original."""
    rounded: Mapping[str, RoundedWeight]
    """Where to start, by module."""
    tokens: TokenBatch
    """Calibration text; a step takes about `step_tokens` of it, in an order drawn by `seed`, again and again."""
    unseen: TokenBatch
    """Text to choose the best state by."""
    steps: int
    """How many; for each layer, where layers are tuned by themselves."""
    step_tokens: int
    """Tokens of one step."""
    others: Mapping[str, torch.dtype]
    """Further parameters, such as norms and the embedding, that move too, and the types in which they are stored."""
    moved: Mapping[str, Tensor] = field(default_factory=dict)
    """Those that have been moved before, and where to."""
    seed: int
    """Of the order."""
    batch_size: int
    """Sequences per pass of the held-out measurement."""
    work: Path | None = None
    """Directory where the state is kept; what is there of the same job is gone on with."""
    advance: Callable[[int], None] = lambda _n: None
    """Called with 1 after each step."""

    def saved(self, method: str, rows: int, **more: float) -> Saved:
        """The file of its state, with all in the digest that decides where it ends; a step has `rows` sequences."""
        settings = {
            "tune": method,
            "steps": self.steps,
            "rows": rows,
            "others": list(self.others),
            "seed": self.seed,
            "dtype": str(self.source.model.dtype),
            **more,
        }
        return Saved.of(self.work, self.rounded, self.moved, (self.tokens, self.unseen), settings)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Tuned weights, and how the KL went."""

    rounded: dict[str, RoundedWeight]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Other parameters of the model that have moved, now or before, by name, in their own type."""
    history: list[dict[str, Any]]
    best_step: int
    """0: the start."""
    held_out_kl: tuple[float, float]
    """Before and after, nats per token."""


def stored_values(parameters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """As they would be written."""
    return {name: parameter.detach().to("cpu", dtypes[name], copy=True) for name, parameter in parameters.items()}
