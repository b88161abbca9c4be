"""Files of a quantized model, what is known of them, and copies of them with other codes.

Cost: a copy of the files, and the bytes of what has changed. One weight at a time is in memory.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from roundel.errors import ModelError, in_layer
from roundel.store import storage
from roundel.types import RoundedWeight

__all__ = ["FAR", "Given", "Patch", "Slot", "check_near"]

FAR = 0.7
"""How far a quantized weight is from its original at most, in units of that; two others are about 1.4 apart. Two bits lose .3."""


class Patch(NamedTuple):
    """Bytes for a place of a file."""

    file: Path
    offset: int
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One quantized weight."""

    scheme: str
    read: Callable[[], RoundedWeight]
    patches: Callable[[RoundedWeight], list[Patch]]
    """What a weight of the same scheme, shape and types of scales makes of the files."""


@dataclass(frozen=True, kw_only=True)
class Given(Mapping[str, RoundedWeight]):
    """A quantized model; a mapping of its quantized linears by the original's names."""

    path: Path
    """As it was asked for: a directory, or a file."""
    form: str
    """What its format is called."""
    slots: Mapping[str, Slot]
    left: Mapping[str, str] = field(default_factory=dict)
    """Linears of the original that are quantized in it, but stay as they are, and why."""
    value_of: Callable[[str], Tensor | None]
    """The values that a stored tensor of the original has in it, in float32 `(d_out, d_in)`; None: it is not in there."""
    is_dense: Callable[[str], bool]
    """Whether a stored tensor of the original is in it in 16 bits or more."""
    others: Callable[[Mapping[str, Tensor]], list[Patch]]
    """What tensors of the original that are not quantized make of the files, by their stored names."""

    def __getitem__(self, name: str) -> RoundedWeight:
        with in_layer(name):
            return self.slots[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def held(self, stored: str) -> Tensor:
        """The values of a tensor that is in it."""
        value = self.value_of(stored)
        assert value is not None
        return value

    @property
    def files(self) -> list[Path]:
        """All of its files."""
        return [self.path] if self.path.is_file() else sorted(file for file in self.path.rglob("*") if file.is_file())

    @property
    def digest(self) -> str:
        """Of what its files are: names, sizes and times of change."""
        known = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in self.files]
        return hashlib.sha256("\n".join(known).encode()).hexdigest()

    def copy_to(self, target: Path, changed: Mapping[str, RoundedWeight], others: Mapping[str, Tensor]) -> int:
        """The same files in a directory, with other codes for some linears and other values for some tensors; their bytes together.

        Raises:
            StorageError: the disk refuses.
        """
        base = self.path.parent if self.path.is_file() else self.path
        with storage(target):
            for file in self.files:
                place = target / file.relative_to(base)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
            for name, weight in changed.items():
                with in_layer(name):
                    _write(target, base, self.slots[name].patches(weight))
            _write(target, base, self.others(others))
        return sum(file.stat().st_size for file in self.files)


def _write(target: Path, base: Path, patches: list[Patch]) -> None:
    for patch in patches:
        with (target / patch.file.relative_to(base)).open("r+b") as opened:
            opened.seek(patch.offset)
            opened.write(patch.data)


def check_near(name: str, W_hat: Tensor, W: Tensor, what: Any) -> None:
    """Refuses a weight that is none of the original's.

    Raises:
        ModelError: it is too far away.
    """
    W = W.float()
    if not torch.isfinite(W_hat).all():
        raise ModelError(f"{name} of {what} holds NaN or infinite values; the file is damaged")
    if (W_hat - W).norm() > FAR * W.norm():
        raise ModelError(f"{name} of {what} is not the original's with some bits less: it is another model's, or a transformed one")
