"""The tensors of a model directory by name, read one at a time from its safetensors files.

The quantized checkpoint is the source checkpoint with the weights of quantized linears replaced, so everything else -
biases, norms, tied or untied embeddings, names that only a later version of the architecture reads - stays bit for
bit what it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from roundel.errors import ModelError

__all__ = ["Checkpoint"]

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which file holds which tensor, and how large it is."""

    files: dict[str, Path]
    sizes: dict[str, int]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Reads the headers of all safetensors files in `directory`.

        Raises:
            ModelError: a file is truncated or no safetensors file.
        """
        files: dict[str, Path] = {}
        sizes: dict[str, int] = {}
        for path in sorted(directory.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (not a dict)
                        part = handle.get_slice(name)
                        files[name] = path
                        sizes[name] = prod(part.get_shape()) * _SIZES.get(part.get_dtype(), 1)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read: {error}") from error
        return cls(files=files, sizes=sizes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self.files[name], framework="pt") as handle:
            return handle.get_tensor(name)  # type: ignore[no-any-return]

    def fused_in(self, model: nn.Module) -> dict[str, list[str]]:
        """The model's parameters of three dimensions that are stored in pieces (one for each expert), with the pieces' names.

        A quantized checkpoint stores such a parameter whole, as the model has it: the conversion that Transformers 5 makes of the pieces
        takes them for packed weights as soon as the checkpoint is a compressed-tensors one.
        """
        fused = {}
        unknown = [stored for stored in self.files.keys() - model.state_dict().keys() if ".experts." in stored]
        for name, parameter in model.named_parameters():
            if parameter.ndim != 3 or name in self.files:
                continue
            layer = re.match(r"\D*\d+\.", name)  # "model.layers.0.": below it, pieces may have other names than the parameter
            pieces = sorted(stored for stored in unknown if layer and stored.startswith(layer[0]))
            if pieces:
                fused[name] = pieces
        return fused

    def weight_of(self, module: str) -> str | None:
        """The stored name of a module's weight: its own, or without the leading name that a checkpoint of a base model leaves out."""
        full = f"{module}.weight"
        if full in self.files:
            return full
        shorter = full.partition(".")[2]
        return shorter if shorter in self.files else None
