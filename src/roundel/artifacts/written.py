"""What a directory under way holds, parameter by parameter, for the evaluation of what was written.

Codes are unpacked and decoded from the written tensors, dense weights read as they are. A GGUF file is read whole, as its users' engine
would (`checkpoints.load_written`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roundel.artifacts.checkpoints import GGUF_FILE, load_written, owners
from roundel.artifacts.source import Source
from roundel.errors import in_layer
from roundel.formats import FORMATS
from roundel.grids import parse_scheme
from roundel.models import Checkpoint
from roundel.models.experts import split_experts
from roundel.rounding.round import dequantized

__all__ = ["Written"]


class Written:
    """Values of the original's parameters in a directory that was written of it."""

    def __init__(self, path: Path, source: Source, form: str, layers: Mapping[str, Mapping[str, Any]], moved: Mapping[str, Tensor]) -> None:
        """Opens a directory.

        Args:
            path: The directory.
            source: The original.
            form: The format's name.
            layers: Rows of the report, by quantized linear.
            moved: Other parameters that differ from the original's, by name.
        """
        self._source, self._form, self._layers, self._moved = source, form, layers, moved
        self._engine = None
        if (path / GGUF_FILE).is_file():
            self._engine = load_written(path, device=torch.device("cpu"), dtype=source.model.dtype)
            split_experts(self._engine)
            return
        self._checkpoint = Checkpoint.open(path)
        self._tensors: dict[str, list[str]] = {}
        for tensor, module in owners(self._checkpoint, layers).items():
            self._tensors.setdefault(module, []).append(tensor)

    def of_group(self, index: int) -> dict[str, Tensor]:
        """Parameters of a group of decoder layers that may differ from the original's, by name."""
        layers = self._source.layers
        if self._engine is not None:
            prefixes = tuple(f"{name}." for name in layers.groups[index])
            return {name: p.data for name, p in self._engine.named_parameters() if name.startswith(prefixes)}
        quantized = {f"{name}.weight": self._weight(name) for name in layers.inside(index, self._source.linears) if name in self._layers}
        prefixes = tuple(f"{name}." for name in layers.groups[index])
        return quantized | {name: value for name, value in self._moved.items() if name.startswith(prefixes)}

    def outside(self) -> dict[str, Tensor]:
        """The same of all other parameters."""
        layers = self._source.layers
        prefixes = tuple(f"{name}." for name in layers.names)
        if self._engine is not None:
            return {name: p.data for name, p in self._engine.named_parameters() if not name.startswith(prefixes)}
        quantized = {f"{name}.weight": self._weight(name) for name in self._layers if not name.startswith(prefixes)}
        return quantized | {name: value for name, value in self._moved.items() if not name.startswith(prefixes)}

    def _weight(self, module: str) -> Tensor:
        names, row = self._tensors[module], self._layers[module]
        if self._form not in FORMATS:
            W = self._checkpoint.read(names[0]).float()
            return W.T if row.get("turned") else W
        prefix = f"{names[0].rpartition('.')[0]}."
        with in_layer(module):
            parts = {name.removeprefix(prefix): self._checkpoint.read(name) for name in names}
            return dequantized(FORMATS[self._form].unpack(parts, parse_scheme(row["scheme"]), (row["shape"][0], row["shape"][1])))
