"""GGUF files of llama.cpp's quantizer, or of any other: one file, or several that are one model.

Every tensor has a type of its own; those of `roundel.grids.blocks` and `.codebooks`, and mxfp4, are known. Blocks whose scale is zero get
the least one and codes of zero, which is the same to some 1e-7, so that rounding can go on from them.

Not done: types without a grid here (q4_1, q5_1, iq1, tq, nvfp4), architectures that `formats.gguf` does not write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import ReaderTensor
from torch import Tensor

from roundel.artifacts.source import Source
from roundel.errors import ModelError
from roundel.formats.gguf_blocks import PACKERS, unpack
from roundel.formats.gguf_reader import Reader
from roundel.formats.gguf_tensors import EXPERT, Counterparts, data_of, decoded, halves_apart, halves_together, parts_of, tensors_of
from roundel.given.base import Given, Patch, Slot
from roundel.grids import ScalarGrid, parse_scheme
from roundel.grids.base import spread
from roundel.models.ends import ends_of
from roundel.rounding.round import stacked
from roundel.types import RoundedWeight

__all__ = ["gguf_files", "open_gguf"]

DENSE = ("F32", "F16", "BF16", "F64")
LEAST = 2.0**-24
"""Of float16."""

CHECKED = 4
"""Rows of each tensor that are compared with what the package `gguf` reads."""


def gguf_files(path: Path) -> list[Path]:
    """Those of a model: the path itself, or those of a directory, projectors of images aside."""
    if path.is_file():
        return [path] if path.suffix == ".gguf" else []
    return sorted(file for file in path.glob("*.gguf") if not file.name.startswith("mmproj"))


def open_gguf(path: Path, source: Source) -> Given:
    """The quantized linears of a model, by its original.

    Raises:
        ModelError: it is another model's, none of its weights is in a type that is known, or it is damaged.
    """
    names = source.checkpoint.names.parts
    wholes = {whole for whole, _ in names.values()}
    counterparts = Counterparts(source.config, [*(name for name in source.checkpoint.files if name not in wholes), *names])
    tensors: dict[str, tuple[Path, ReaderTensor]] = {}
    for file in gguf_files(path):
        for name, tensor in tensors_of(file).items():
            if name in tensors:
                raise ModelError(f"{name} is in {tensors[name][0].name} and in {file.name}: give the file of one model")
            tensors[name] = (file, tensor)
    kind = Reader(next(iter(tensors.values()))[0]).get_field("general.architecture") if tensors else None
    if kind is None or kind.contents() != counterparts.architecture:
        named = "none" if kind is None else kind.contents()
        raise ModelError(f"{path} is of the architecture {named}, and its original would be {counterparts.architecture}: another model")
    slots: dict[str, Slot] = {}
    left: dict[str, str] = {}
    for module in dict.fromkeys([*source.linears, *(end.name for end in ends_of(source.model, source.checkpoint))]):
        stored = source.checkpoint.weight_of(module)
        assert stored is not None
        parts = {part: counterparts.names.get(part, part) for part in parts_of(stored)}
        for target in parts.values():
            if target not in tensors:
                raise ModelError(f"{path} lacks {target}: it is another model, or damaged")
        rows, columns = source.model.get_parameter(f"{module}.weight").shape
        height = rows // len(parts)
        for target in parts.values():
            whole = tuple(int(side) for side in tensors[target][1].shape[::-1])
            if whole[-2:] != (height, columns):
                raise ModelError(f"{target} is {whole} in {path}, and the original's {module} is {(rows, columns)}: another model")
        kinds = {tensors[target][1].tensor_type.name for target in parts.values()}
        if kinds <= set(DENSE):
            continue
        if any(counterparts.moves_columns(target, columns) for target in parts.values()):
            left[module] = "its columns are in another order in the file"
            continue
        if len(kinds) > 1:
            left[module] = f"its rows are in tensors of the types {' and '.join(sorted(kinds))}"
            continue
        if (own := kinds.pop()).lower() not in PACKERS:
            left[module] = f"the type {own} has no grid here"
            continue
        slots[module] = _joined(
            [_slot(*tensors[target], (height, columns), part, counterparts.order(target, height)) for part, target in parts.items()]
        )
    if not slots:
        raise ModelError(f"{path}: nothing in it can be refined: {next(iter(left.values()), 'its linears are not quantized')}")

    def value_of(name: str) -> Tensor | None:
        parts = {part: counterparts.names.get(part, "") for part in parts_of(name)}
        if not tensors.keys() >= set(parts.values()):
            return None
        values = {part: counterparts.restored(target, decoded(tensors[target][1], part)) for part, target in parts.items()}
        return halves_together(values)[name]

    def is_dense(name: str) -> bool:
        return all(tensors[counterparts.names[part]][1].tensor_type.name in DENSE for part in parts_of(name))

    def others(new: Mapping[str, Tensor]) -> list[Patch]:
        found = []
        part_of = halves_apart(lambda name: new[name])
        for part in (part for name in new for part in parts_of(name)):
            file, tensor = tensors[counterparts.names[part]]
            data = counterparts.stored(tensor.name, part_of(part), tensor.tensor_type).tobytes()
            if len(data) != tensor.n_bytes:
                raise ModelError(f"{tensor.name} has {tensor.n_bytes} bytes in {file}, and {len(data)} would take its place")
            found.append(Patch(file, int(tensor.data_offset), data))
        return found

    return Given(path=path, form="gguf", slots=slots, left=left, value_of=value_of, is_dense=is_dense, others=others)


def _joined(slots: list[Slot]) -> Slot:
    """Tensors of one type and shape as one weight, rows of one after the other's."""
    if len(slots) == 1:
        return slots[0]

    def patches(weight: RoundedWeight) -> list[Patch]:
        height = weight.shape[0] // len(slots)
        found = []
        for at, slot in enumerate(slots):
            own = slice(at * height, (at + 1) * height)
            scales = {name: scale[own] for name, scale in weight.scales.items()}
            found += slot.patches(replace(weight, codes=weight.codes[own], scales=scales, shape=(height, weight.shape[1])))
        return found

    return Slot(scheme=slots[0].scheme, read=lambda: stacked([slot.read() for slot in slots]), patches=patches)


def _slot(file: Path, tensor: ReaderTensor, shape: tuple[int, int], stored: str, order: Tensor) -> Slot:
    scheme = tensor.tensor_type.name.lower()
    back, data = torch.argsort(order), data_of(tensor, stored)
    size = data.nbytes
    offset = int(tensor.data_offset) + size * (int(expert[1]) if (expert := EXPERT.search(stored)) else 0)

    def rows(some: slice = slice(None)) -> Tensor:
        return torch.from_numpy(np.array(data[some]).view(np.uint8).reshape(-1, size // shape[0]))

    codes, scales = unpack(scheme, rows(slice(CHECKED)))
    own = parse_scheme(scheme).dequantize(codes, scales, (len(codes), shape[1]), torch.float32)
    finite = all(torch.isfinite(scale).all() for scale in unpack(scheme, rows())[1].values())
    if not finite or not torch.equal(own, decoded(tensor, stored, slice(CHECKED))):
        raise ModelError(f"{tensor.name} of {file} is not what its type says, or holds NaN or infinite scales; the file is damaged")

    def read() -> RoundedWeight:
        codes, scales = unpack(scheme, rows()[back])
        return _usable(RoundedWeight(scheme=scheme, codes=codes, scales=scales, shape=shape))

    def patches(weight: RoundedWeight) -> list[Patch]:
        packed = PACKERS[scheme](weight.codes, weight.scales)[order].contiguous().numpy().tobytes()
        assert len(packed) == size
        return [Patch(file, offset, packed)]

    return Slot(scheme=scheme, read=read, patches=patches)


def _usable(weight: RoundedWeight) -> RoundedWeight:
    """The same values, with steps that are not zero: codes of zero in their place, if there is one, or the least step."""
    grid, scales, codes = parse_scheme(weight.scheme), dict(weight.scales), weight.codes
    signed = isinstance(grid, ScalarGrid) and grid.levels is None
    if "sc" in scales and signed:
        none = scales["sc"] == 0
        codes = torch.where(spread(none, weight.shape), 0, codes)
        scales["sc"] = scales["sc"].masked_fill(none, 1)
    if "d" in scales:
        none = scales["d"] == 0
        if signed:
            codes = torch.where(spread(none, weight.shape), 0, codes)
        scales["d"] = scales["d"].masked_fill(none, LEAST)
    return replace(weight, codes=codes, scales=scales)
