"""Codes of a model on disk, one file for each group of decoder layers, read one linear at a time.

The tensors are those of the native format, whatever format is written in the end, or codes and scales as they are of grids that it does not
hold. A file is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from roundel import processes
from roundel.artifacts.curvatures import AGAIN
from roundel.errors import SchemeError, StorageError, damaged
from roundel.formats import FORMATS
from roundel.grids import parse_scheme
from roundel.rotation import Permutation, Rotation
from roundel.store import staged_file, storage
from roundel.types import RoundedWeight

__all__ = ["RoundedFiles", "shared"]

COLUMNS = "columns"
"""A part for the order of columns."""


@dataclass(frozen=True, kw_only=True)
class RoundedFiles(Mapping[str, RoundedWeight]):
    """Rounded weights by module."""

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The report's of each."""
    _groups: dict[str, int] = field(default_factory=dict)

    def has(self, index: int) -> bool:
        """Whether a group is finished; its rows are then known."""
        if not self._file(index).is_file():
            return False
        with damaged(StorageError, self._file(index), AGAIN), safe_open(self._file(index), framework="pt") as stored:
            rows: dict[str, dict[str, Any]] = {name: dict(row) for name, row in json.loads(stored.metadata()["roundel"]).items()}
        self.rows.update(rows)
        self._groups.update(dict.fromkeys(rows, index))
        return True

    def save(self, index: int, weights: Mapping[str, RoundedWeight], rows: Mapping[str, dict[str, Any]]) -> None:
        """Writes a group.

        Raises:
            StorageError: the disk refuses.
        """
        tensors = {f"{name}/{part}": t for name, weight in weights.items() for part, t in _parts(weight).items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with staged_file(self._file(index)) as temporary:
            save_file(tensors, temporary, metadata={"roundel": json.dumps(dict(rows))})
        self.rows.update(rows)
        self._groups.update(dict.fromkeys(rows, index))

    def __getitem__(self, name: str) -> RoundedWeight:
        """Reads a weight.

        Raises:
            StorageError: the file is damaged.
        """
        index, row = self._groups[name], self.rows[name]
        with damaged(StorageError, self._file(index), AGAIN), safe_open(self._file(index), framework="pt") as stored:
            parts = {key.removeprefix(f"{name}/"): stored.get_tensor(key) for key in stored.keys() if key.startswith(f"{name}/")}  # noqa: SIM118
            return _weight(parts, row["scheme"], (row["shape"][0], row["shape"][1]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _file(self, index: int) -> Path:
        return self.path / f"{index:04d}.safetensors"


def shared(
    weights: Mapping[str, RoundedWeight], rows: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, RoundedWeight], dict[str, dict[str, Any]]]:
    """Rounded weights and their rows of all processes, by names of which no two have the same."""
    if processes.world() == 1:
        return dict(weights), dict(rows)
    tensors = {f"{name}/{part}": t for name, weight in weights.items() for part, t in _parts(weight).items()}
    notes = {name: {"row": rows[name], "scheme": weight.scheme, "shape": list(weight.shape)} for name, weight in weights.items()}
    found, known = processes.exchanged(tensors, notes)
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in known}
    for key, tensor in found.items():
        name, _, part = key.rpartition("/")
        parts[name][part] = tensor
    everything = {name: _weight(parts[name], own["scheme"], (own["shape"][0], own["shape"][1])) for name, own in known.items()}
    return everything, {name: own["row"] for name, own in known.items()}


def _parts(weight: RoundedWeight) -> dict[str, Tensor]:
    if isinstance(weight.rotation, Permutation):
        return {**_parts(replace(weight, rotation=None)), COLUMNS: weight.rotation.columns}
    try:
        return FORMATS["native"].pack(weight)
    except SchemeError:
        parts = {"plain.codes": weight.codes, **{f"plain.scale.{name}": scale for name, scale in weight.scales.items()}}
        if isinstance(rotation := weight.rotation, Rotation):
            parts |= {f"plain.rotation.{rotation.kind}.out": rotation.signs_out, f"plain.rotation.{rotation.kind}.in": rotation.signs_in}
        return parts


def _weight(parts: Mapping[str, Tensor], scheme: str, shape: tuple[int, int]) -> RoundedWeight:
    if COLUMNS in parts:
        own = _weight({name: part for name, part in parts.items() if name != COLUMNS}, scheme, shape)
        return replace(own, rotation=Permutation(columns=parts[COLUMNS]))
    if "plain.codes" not in parts:
        return FORMATS["native"].unpack(parts, parse_scheme(scheme), shape)
    scales = {key.removeprefix("plain.scale."): scale for key, scale in parts.items() if key.startswith("plain.scale.")}
    kinds = {key.split(".")[2] for key in parts if key.startswith("plain.rotation.")}
    rotation = None
    for kind in kinds:
        signs = {f"signs_{side}": parts[f"plain.rotation.{kind}.{side}"] for side in ("out", "in")}
        rotation = Rotation(kind=kind, shape=shape, **signs)
    return RoundedWeight(scheme=scheme, codes=parts["plain.codes"], scales=scales, shape=shape, rotation=rotation)
