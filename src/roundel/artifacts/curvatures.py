"""What a linear is rounded with, on disk, for each group of decoder layers, until the group is rounded.

    0007-00.safetensors, 0007-01.safetensors    matrices of some of the group's linears
    0007.safetensors                            all else that is known of them, and which of these files has them: the group is finished

Of symmetric factors only the lower triangle is written. A file is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from roundel.errors import StorageError, damaged
from roundel.linalg.gram import symmetrise
from roundel.store import staged_file, storage
from roundel.types import Factors, GroupedFactors, KroneckerFactors

__all__ = ["AGAIN", "Curvatures", "LinearCurvature", "lower_of", "pack_lower", "symmetric_of"]

AGAIN = "it is damaged; remove the work directory and start again"


@dataclass(frozen=True, kw_only=True)
class LinearCurvature:
    """What one linear is rounded with."""

    factors: Factors
    damping: float = 1.0
    """What the recipe's damping is multiplied by."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """What the report says of the choice."""


@dataclass(frozen=True, kw_only=True)
class Curvatures:
    """A directory of them."""

    path: Path
    factor_type: str = "float32"
    """Of the matrices on the disk; read back they are float32."""

    def file(self, index: int, portion: int | None = None) -> Path:
        """Of a group of layers, or of matrices of some of its linears."""
        return self.path / (f"{index:04d}.safetensors" if portion is None else f"{index:04d}-{portion:02d}.safetensors")

    def has(self, index: int) -> bool:
        """Whether the group is finished."""
        return self.file(index).is_file()

    def put(self, index: int, portion: int, linears: Mapping[str, LinearCurvature]) -> dict[str, Any]:
        """Writes the matrices of some linears of a group; returns their notes, for `save`.

        Raises:
            StorageError: the disk refuses.
        """
        tensors: dict[str, Tensor] = {}
        notes: dict[str, Any] = {}
        for name, own in linears.items():
            groups = own.factors.row_groups()
            for place, (_, group) in enumerate(groups):
                for side, H in (("H_out", group.H_out), ("H_in", group.H_in)):
                    tensors[f"{name}/{place}/{side}"] = pack_lower(H.to(getattr(torch, self.factor_type)))
            scales = [group.scale for _, group in groups]
            notes[name] = {"scales": scales, "damping": own.damping, "row": dict(own.row), "portion": portion}
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with staged_file(self.file(index, portion)) as temporary:
            save_file(tensors, temporary)
        return notes

    def save(self, index: int, notes: Mapping[str, Any], skipped: Mapping[str, str]) -> None:
        """All linears of a group have been `put`; `skipped`: those that cannot be rounded, and why.

        Raises:
            StorageError: the disk refuses.
        """
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with staged_file(self.file(index)) as temporary:
            save_file({}, temporary, metadata={"roundel": json.dumps({"skipped": dict(skipped), "linears": dict(notes)})})

    def notes(self, index: int) -> dict[str, Any]:
        """What is known of a group beside its matrices: `linears` with their rows, and `skipped`.

        Raises:
            StorageError: the file is damaged.
        """
        with damaged(StorageError, self.file(index), AGAIN), safe_open(self.file(index), framework="pt") as stored:
            found: dict[str, Any] = json.loads(stored.metadata()["roundel"])
            return {"linears": dict(found["linears"]), "skipped": dict(found["skipped"])}

    def load(self, index: int, names: Sequence[str] | None = None) -> dict[str, LinearCurvature]:
        """A group's, or that of some of its linears.

        Raises:
            StorageError: a file is damaged.
        """
        notes, found = self.notes(index)["linears"], {}
        with damaged(StorageError, self.file(index), AGAIN):
            for name in notes if names is None else names:
                own = notes[name]
                with safe_open(self.file(index, own["portion"]), framework="pt") as stored:
                    groups = [
                        KroneckerFactors(
                            H_out=symmetric_of(stored.get_tensor(f"{name}/{place}/H_out")),
                            H_in=symmetric_of(stored.get_tensor(f"{name}/{place}/H_in")),
                            scale=float(scale),
                        )
                        for place, scale in enumerate(own["scales"])
                    ]
                found[name] = LinearCurvature(
                    factors=groups[0] if len(groups) == 1 else GroupedFactors(groups=tuple(groups)),
                    damping=float(own["damping"]),
                    row=own["row"],
                )
        return found

    def remove(self, index: int) -> None:
        """A group that is not needed any more."""
        for path in [self.file(index), *self.path.glob(f"{index:04d}-*.safetensors")]:
            path.unlink(missing_ok=True)


def pack_lower(matrix: Tensor) -> Tensor:
    """The lower triangle of a square matrix, row by row."""
    own = matrix.cpu()
    return torch.cat([row[: index + 1] for index, row in enumerate(own)])


def lower_of(packed: Tensor) -> Tensor:
    """A packed lower triangle in its place, zeros above it.

    Row by row in both directions: indices of all entries would take four times the memory of the matrix.

    Raises:
        ValueError: it is no triangle.
    """
    size = int((2 * packed.numel() + 0.25) ** 0.5)
    if packed.ndim != 1 or size * (size + 1) // 2 != packed.numel():
        raise ValueError(f"{packed.numel()} numbers are no triangle")
    full = torch.zeros(size, size, dtype=packed.dtype)
    for index, row in enumerate(packed.split(list(range(1, size + 1)))):
        full[index, : index + 1] = row
    return full


def symmetric_of(packed: Tensor) -> Tensor:
    """The float32 matrix of a packed lower triangle.

    Raises:
        ValueError: it is no triangle.
    """
    return symmetrise(lower_of(packed).float())
