"""What long work keeps on disk, so that a killed run goes on where it was and ends in the same place.

One safetensors file, replaced as a whole: tensors, and in its metadata JSON with the numbers beside them and a digest of the job. A file of
another job - other codes to start from, other text, other settings - is refused, never taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from roundel import processes
from roundel.errors import StorageError, damaged
from roundel.formats import FORMATS
from roundel.grids import parse_scheme
from roundel.store import staged_file, storage
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["Saved", "kinds_of", "others_of", "packed", "unpacked"]

FILE = "tuning.safetensors"
OTHER = "other."
VERSION = 3
"""Of what steps keep; a file of another version is another job's."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The file of one job; with None for the path nothing is kept."""

    path: Path | None
    digest: str

    @classmethod
    def of(
        cls,
        work: Path | None,
        rounded: Mapping[str, RoundedWeight],
        others: Mapping[str, Tensor],
        texts: tuple[TokenBatch, ...],
        settings: Mapping[str, Any],
    ) -> Saved:
        """That of a tuning in the directory `work`: of these codes and other parameters, texts and settings."""
        if work is None:
            return cls(path=None, digest="")
        digest = hashlib.sha256(json.dumps({"version": VERSION, **settings}, sort_keys=True).encode())
        for name, tensor in sorted(packed(rounded, others).items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for text in texts:
            digest.update(text.ids.contiguous().numpy().tobytes())
        return cls(path=work / FILE, digest=digest.hexdigest())

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and numbers, if there are any.

        Raises:
            StorageError: the file is of another job, or damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        with self.read(), safe_open(self.path, framework="pt") as handle:
            notes = dict(json.loads((handle.metadata() or {}).get("roundel", "{}")))
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        if notes.get("digest") != self.digest:
            raise StorageError(f"{self.path} is of another run: another model, text or setting; choose another --work, or remove it")
        return tensors, notes

    def read(self) -> AbstractContextManager[None]:
        """Within the context whatever does not fit is one error about the file."""
        return damaged(StorageError, self.path, "remove it to start again")

    def save(self, tensors: Callable[[], Mapping[str, Tensor]], notes: Mapping[str, Any]) -> None:
        """Replaces the file, of several processes the first does; `tensors`, which all call, is only called if there is one.

        Raises:
            StorageError: the disk refuses.
        """
        if self.path is None:
            return
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors().items()}
        if not processes.first():
            return
        with storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(self.path) as temporary:
            save_file(whole, temporary, metadata={"roundel": json.dumps({**notes, "digest": self.digest})})


def packed(rounded: Mapping[str, RoundedWeight], others: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights as the tensors of the native format, by module, and other parameters by name."""
    tensors = {f"{name}/{part}": tensor for name, weight in rounded.items() for part, tensor in FORMATS["native"].pack(weight).items()}
    return tensors | {f"{OTHER}{name}": value for name, value in (others or {}).items()}


def others_of(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The other parameters that `packed` was given, those of a model.

    Raises:
        ValueError: one has another shape than the model's.
    """
    found = {name.removeprefix(OTHER): value for name, value in tensors.items() if name.startswith(OTHER)}
    for name, value in found.items():
        if value.shape != model.get_parameter(name).shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}")
    return found


def unpacked(tensors: Mapping[str, Tensor], kinds: Mapping[str, tuple[str, tuple[int, int]]]) -> dict[str, RoundedWeight]:
    """Inverse of `packed`, for weights of given schemes and shapes; those that are not there are left out."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, slash, part = name.rpartition("/")
        if slash and module in kinds:
            found.setdefault(module, {})[part] = tensor
    return {
        name: FORMATS["native"].unpack(found[name], parse_scheme(scheme), shape) for name, (scheme, shape) in kinds.items() if name in found
    }


def kinds_of(rounded: Mapping[str, RoundedWeight]) -> dict[str, tuple[str, tuple[int, int]]]:
    """The scheme and shape of each."""
    return {name: (weight.scheme, weight.shape) for name, weight in rounded.items()}
