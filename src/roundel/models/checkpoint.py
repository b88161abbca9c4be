"""The tensors of a model directory by name, read one at a time from its safetensors files.

The quantized checkpoint is the source checkpoint with the weights of quantized linears replaced, so everything else -
biases, norms, tied or untied embeddings, names that only a later version of the architecture reads - stays bit for
bit what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from roundel.errors import ModelError, damaged
from roundel.models.names import StoredNames, stored_names

__all__ = ["Checkpoint"]

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which file holds which tensor, and how large it is."""

    files: dict[str, Path]
    sizes: dict[str, int]
    names: StoredNames = field(default_factory=StoredNames)
    """Of the parameters of the model that is loaded from it."""

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Reads the headers of all safetensors files in `directory`.

        Raises:
            ModelError: a file is truncated or no safetensors file.
        """
        files: dict[str, Path] = {}
        sizes: dict[str, int] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with damaged(ModelError, path), safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    part = handle.get_slice(name)
                    files[name] = path
                    sizes[name] = prod(part.get_shape()) * _SIZES.get(part.get_dtype(), 1)
        return cls(files=files, sizes=sizes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, name: str) -> Tensor:
        """One tensor, or one expert's part of one under the name of `stored`; weights are `(d_out, d_in)` however they are stored.

        Raises:
            ModelError: the file is damaged.
        """
        if name in self.files:
            with damaged(ModelError, self.files[name]), safe_open(self.files[name], framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
                return tensor.T.contiguous() if name in self.names.turned else tensor
        whole, part = self.names.parts[name]
        with damaged(ModelError, self.files[whole]), safe_open(self.files[whole], framework="pt") as handle:
            return part.of(handle.get_slice(whole)[part.expert : part.expert + 1], first=part.expert).contiguous()

    def of(self, model: nn.Module) -> Checkpoint:
        """The same, with the names of the model that is loaded from it."""
        return replace(self, names=stored_names(model, self.files, self._shape))

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Of a stored tensor; None where there is only a config.json."""
        if self.files[name].suffix != ".safetensors":
            return None
        with damaged(ModelError, self.files[name]), safe_open(self.files[name], framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())

    def fused_in(self, model: nn.Module) -> dict[str, list[str]]:
        """The model's parameters of three dimensions that are stored in pieces (one for each expert), with the pieces' names."""
        return {
            name: self.names.made[name] for name, parameter in model.named_parameters() if name in self.names.made and parameter.ndim == 3
        }

    def stored(self, name: str) -> str | None:
        """The tensor that has the values of a parameter of the model, if there is one."""
        found = self.names.same.get(name, name)
        return found if found in self.files or found in self.names.parts else None

    def part_of(self, name: str) -> str | None:
        """The tensor that this one is only a part of."""
        return self.names.parts[name][0] if name in self.names.parts else None

    def weight_of(self, module: str) -> str | None:
        """The tensor that has a module's weight."""
        return self.stored(f"{module}.weight")
