"""The sums of an importance matrix of llama.cpp, `--curvature imatrix:FILE`, by the linears of a model.

In place of sums over the calibration text, as those of a factors directory: no gradient is needed, and none is known, so that the proxy
losses of reports are in units of their own. The file's matrices go by the names that llama.cpp gives the model's, those of experts by
their place among the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from roundel.artifacts.source import Source
from roundel.curvature import Sketch, parse_curvature
from roundel.curvature.sketches import Imatrix
from roundel.errors import FactorsError
from roundel.formats import imatrix
from roundel.formats.gguf_tensors import EXPERT
from roundel.recipes import Recipe
from roundel.store import storage

__all__ = ["ImatrixSums", "digest", "imatrix_file", "imatrix_sums"]


@dataclass(frozen=True, kw_only=True)
class ImatrixSums:
    """Of each linear the sums of its inputs' squares, `(d_in,)`, over so many tokens, and its shape."""

    sums: dict[str, tuple[Tensor, float]]
    shapes: dict[str, tuple[int, int]]

    def sketches(self, names: Iterable[str], device: torch.device) -> dict[str, Sketch]:
        """As of text that these were collected on, with gradients of norm 1."""
        return {name: self._sketch(name, device) for name in names}

    def _sketch(self, name: str, device: torch.device) -> Sketch:
        sums, tokens = self.sums[name]
        sketch = Imatrix().sketch(*self.shapes[name], device)
        sketch.sums["squares"].copy_(sums)
        sketch.sums["trace"].fill_(sums.double().sum())
        sketch.tokens = sketch.rows = round(tokens)
        return sketch


def imatrix_file(recipe: Recipe) -> Path | None:
    """That `recipe.curvature` names."""
    estimator = parse_curvature(recipe.curvature)
    return Path(estimator.file) if isinstance(estimator, Imatrix) and estimator.file else None


def digest(file: Path) -> str:
    """SHA-256 of the file.

    Raises:
        StorageError: it cannot be read.
    """
    with storage(file, "reading"), file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def imatrix_sums(recipe: Recipe, source: Source) -> ImatrixSums | None:
    """What the recipe's file has of the model's linears; None if it names none. Linears that the file lacks are skipped.

    Raises:
        FactorsError: the file is no importance matrix, or one of another model.
        ModelError: llama.cpp has no names for the model's matrices.
    """
    if (file := imatrix_file(recipe)) is None:
        return None
    stored = imatrix.read(file)
    modules = {name: EXPERT.sub(".experts.", name) for name in source.linears}
    names = imatrix.tensor_names(imatrix.architecture(source.config["model_type"]), dict.fromkeys(modules.values()))
    sums: dict[str, tuple[Tensor, float]] = {}
    for name, module in modules.items():
        if (tensor := names.get(module)) not in stored:
            continue
        (own, counts), width, part = stored[tensor], source.linears[name].in_features, EXPERT.search(name)
        if part and len(counts) == 1 and own.numel() % width == 0:  # the older form
            own = own.reshape(-1, width)
            counts = counts.expand(len(own))
        at = int(part[1]) if part else 0
        if own.shape[1] != width or at >= len(own):
            raise FactorsError(f"{file}: {tensor} has {' x '.join(map(str, own.shape))} columns, {name} {width}: it is of another model")
        sums[name] = (own[at], float(counts[at]))
    for name in set(source.linears) - set(sums):
        source.skipped[name] = f"not in {file.name}"
        del source.linears[name]
    if not sums:
        raise FactorsError(f"{file} has none of the linears to be quantized: it is of another model")
    return ImatrixSums(sums=sums, shapes={name: (linear.out_features, linear.in_features) for name, linear in source.linears.items()})
