"""Directories of safetensors as other tools write them: compressed-tensors, GPTQ, AWQ, AutoRound, MLX, EXL3.

Layouts are those of `roundel.formats`; what others do beside them:

    compressed-tensors  any global scale of nvfp4 (it stays as it is); weight_g_idx, the group of each column
    gptq                any zero points; version 2 of the format, which stores them as they are; 2 to 8 bits; g_idx in activation order
    auto-round          either of the two, or awq
    mlx                 biases of any value, settings of some modules by name
    exl3                any vectors `suh`, `svh`, which stay as they are, and so does the scale in them

Columns whose groups are not side by side are put so (`rotation.Permutation`).
Not done: activations in few bits, fp8 in blocks, int8 as bytes, bitsandbytes, HQQ; experts in one tensor; mxfp4 and nvfp4 of MLX, ModelOpt.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roundel.artifacts.source import Source
from roundel.errors import ModelError, RoundelError
from roundel.formats import FORMATS
from roundel.formats.bits import unpack_rows
from roundel.formats.exl3 import MARKERS
from roundel.formats.gptq import pack_groups, unpack_groups
from roundel.given.base import Given, Patch, Slot
from roundel.grids import parse_scheme
from roundel.models import Checkpoint
from roundel.models.ends import ends_of
from roundel.models.load import PLAIN, quantization_settings, read_config
from roundel.rotation import Permutation
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

__all__ = ["open_directory"]

Parts = Mapping[str, Tensor]
Settings = Mapping[str, Any]
Shape = tuple[int, int]
Pack = Callable[[RoundedWeight], dict[str, Tensor]]


def open_directory(path: Path, source: Source) -> Given:
    """The quantized linears of a directory, by an original of the same names.

    Raises:
        ModelError: its format is none of these, none of its weights is quantized, or it is damaged.
    """
    by_mlx = read_config(path).get("quantization")
    settings = by_mlx if isinstance(by_mlx, dict) else quantization_settings(path)
    method = "mlx" if settings is by_mlx else str(settings.get("quant_method"))
    if method not in READERS:
        raise ModelError(f"{path} is quantized by {method}: of directories {', '.join(READERS)} can be refined, and GGUF files")
    checkpoint = Checkpoint.open(path)
    places = {file: _places(file) for file in set(checkpoint.files.values())}
    slots: dict[str, Slot] = {}
    left: dict[str, str] = {}
    own: dict[str, list[str]] = {}
    for tensor in checkpoint:
        own.setdefault(tensor.rpartition(".")[0], []).append(tensor)
    weights = dict.fromkeys([*source.linears, *(end.name for end in ends_of(source.model, source.checkpoint))])
    stored_as = {name: source.checkpoint.weight_of(name) or f"{name}.weight" for name in weights}
    for name, weight in stored_as.items():
        stem = weight.removesuffix(".weight")
        found = [tensor for tensor in own.get(stem, []) if not tensor.endswith((".bias", "_zero_point_input", ".input_scale"))]
        if not found or (len(found) == 1 and found[0].endswith(".weight") and places[checkpoint.files[found[0]]][found[0]][0] in PLAIN):
            continue
        shape = source.model.get_parameter(f"{name}.weight").shape
        try:
            slots[name] = _slot(checkpoint, places, found, READERS[method], settings, (shape[0], shape[1]), name)
        except RoundelError as error:
            left[name] = str(error)
    modules = {weight: name for name, weight in stored_as.items() if name in slots or name in left}

    def value_of(stored: str) -> Tensor | None:
        if stored in modules:
            return dequantized(slots[modules[stored]].read()) if modules[stored] in slots else None
        return checkpoint.read(stored).float() if stored in checkpoint.files else None

    def others(new: Mapping[str, Tensor]) -> list[Patch]:
        return _patches(checkpoint, places, {stored: value.to(checkpoint.read(stored).dtype) for stored, value in new.items()})

    if not slots:
        reason = next(iter(left.values()), "no linear of the original has codes in it")
        raise ModelError(f"{path}: nothing in it can be refined: {reason}")
    return Given(
        path=path, form=method, slots=slots, left=left, value_of=value_of, is_dense=lambda stored: stored not in modules, others=others
    )


def _places(file: Path) -> dict[str, tuple[str, int, int]]:
    """Type, offset and bytes of each tensor of a safetensors file that has been opened once."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {
        name: (entry["dtype"], 8 + size + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _slot(
    checkpoint: Checkpoint,
    places: Mapping[Path, Mapping[str, tuple[str, int, int]]],
    tensors: Sequence[str],
    reader: Callable[[Parts, Settings, Shape, str], tuple[RoundedWeight, Pack]],
    settings: Settings,
    shape: Shape,
    name: str,
) -> Slot:
    """What is known of a weight, once its bytes have been read and written again.

    Raises:
        ModelError: they do not come out the same.
    """
    prefix = f"{tensors[0].rpartition('.')[0]}."

    def read() -> tuple[RoundedWeight, Pack]:
        return reader({tensor.removeprefix(prefix): checkpoint.read(tensor) for tensor in tensors}, settings, shape, name)

    try:
        weight, pack = read()
        again = pack(weight)
        for part, value in again.items():
            if not _same(value, checkpoint.read(prefix + part)):
                raise ModelError(f"{prefix}{part} is in a layout that is not known here")
    except (RuntimeError, KeyError, IndexError, ValueError, TypeError, AssertionError) as error:
        raise ModelError(
            f"{prefix}* is in a layout that is not known here: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error

    def patches(new: RoundedWeight) -> list[Patch]:
        packed = pack(new)
        changed = {prefix + part: value for part, value in packed.items() if not _same(value, checkpoint.read(prefix + part))}
        return _patches(checkpoint, places, changed)

    return Slot(scheme=weight.scheme, read=lambda: read()[0], patches=patches)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ModelError(f"{a.dtype} {tuple(a.shape)} in the place of {b.dtype} {tuple(b.shape)}")
    return torch.equal(_raw(a), _raw(b))


def _raw(values: Tensor) -> Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


def _patches(
    checkpoint: Checkpoint, places: Mapping[Path, Mapping[str, tuple[str, int, int]]], values: Mapping[str, Tensor]
) -> list[Patch]:
    found = []
    for tensor, value in values.items():
        file = checkpoint.files[tensor]
        _, offset, size = places[file][tensor]
        data = _raw(value).numpy().tobytes()
        if len(data) != size:
            raise ModelError(f"{tensor} has {size} bytes in {file}, and {len(data)} would take its place")
        found.append(Patch(file, offset, data))
    return found


def _by_format(form: str, scheme: str, parts: Parts, shape: Shape) -> tuple[RoundedWeight, Pack]:
    """Where the layout is that of one of our formats."""
    packer, grid = FORMATS[form], parse_scheme(scheme)
    return packer.unpack(parts, grid, shape), packer.pack


def _grouped(weight: RoundedWeight, columns: Tensor, pack: Pack) -> tuple[RoundedWeight, Pack]:
    """With columns of a group side by side, and with them back in their places."""
    back = torch.argsort(columns)

    def packed(new: RoundedWeight) -> dict[str, Tensor]:
        return pack(dataclasses.replace(new, codes=new.codes[:, back], rotation=None))

    return dataclasses.replace(weight, codes=weight.codes[:, columns], rotation=Permutation(columns=columns)), packed


def _order_of(g_idx: Tensor, groups: int) -> Tensor | None:
    """Columns by their groups; None if they are in order.

    Raises:
        ModelError: groups are not of one size.
    """
    of_column = g_idx.long()
    if of_column.min() < 0 or of_column.max() >= groups or (torch.bincount(of_column, minlength=groups) != len(of_column) // groups).any():
        raise ModelError(f"g_idx has groups of different sizes, or not {groups} of them")
    return None if (of_column.diff() >= 0).all() else torch.argsort(of_column, stable=True)


def _compressed_tensors(parts: Parts, settings: Settings, shape: Shape, name: str) -> tuple[RoundedWeight, Pack]:
    groups = list(settings.get("config_groups", {}).values())
    chosen = next((group for group in groups if any(_aims(target, name) for target in group["targets"])), groups[0] if groups else None)
    if chosen is None:
        raise ModelError("the config has no config_groups")
    if chosen.get("input_activations"):
        raise ModelError("activations are quantized too")
    scheme = _scheme_of(chosen["weights"])
    own = dict(parts)
    g_idx = own.pop("weight_g_idx", None)
    scale = own.get("weight_global_scale")
    if scale is not None:
        own["weight_global_scale"] = torch.ones_like(scale)
    weight, pack = _by_format("compressed-tensors", scheme, own, shape)
    if scale is not None:

        def kept(new: RoundedWeight) -> dict[str, Tensor]:
            plain = dataclasses.replace(new, scales={**new.scales, "tensor_scale": torch.ones(1, 1)})
            return {part: value for part, value in pack(plain).items() if part != "weight_global_scale"}

        return dataclasses.replace(weight, scales={**weight.scales, "tensor_scale": (1 / scale.float()).reshape(1, 1)}), kept
    order = None if g_idx is None else _order_of(g_idx, weight.scales["scale"].shape[1])
    return (weight, pack) if order is None else _grouped(weight, order, pack)


def _aims(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else name == target or name.endswith(f".{target}")


def _scheme_of(arguments: Mapping[str, Any]) -> str:
    bits, kind, strategy, size = (arguments.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
    if kind == "float":
        names = {"8 channel": "fp8", "8 tensor": "fp8-tensor", "4 tensor_group": "nvfp4", "4 group": "mxfp4"}
        if f"{bits} {strategy}" in names:
            return names[f"{bits} {strategy}"]
    elif kind == "int" and strategy in ("group", "channel"):
        return f"int{bits}-" + (f"g{size}" if strategy == "group" else "channel") + ("" if arguments.get("symmetric", True) else "-asym")
    raise ModelError(f"weights of {bits} bits ({kind}, {strategy})")


def _gptq(parts: Parts, settings: Settings, shape: Shape, name: str) -> tuple[RoundedWeight, Pack]:
    if str(settings.get("packing_format", "")).endswith("awq"):
        return _awq(parts, settings, shape, name)
    stored_less = settings.get("checkpoint_format", "gptq") != "gptq_v2" and settings.get("packing_format") != "auto_round"
    groups, bits = len(parts["scales"]), parts["qzeros"].shape[1] * 32 // shape[0]
    middle = 2 ** (bits - 1)
    if len(parts["qweight"]) * 32 != bits * shape[1] or parts["scales"].shape[1] != shape[0]:
        raise ModelError(f"{bits} bits of {tuple(parts['qweight'].shape)} are no weight of {shape}")
    q, zeros, scales = unpack_groups(parts, bits, shape)
    if stored_less:
        zeros = (zeros + 1) % 2**bits
    even = bool((zeros == middle).all())
    if shape[1] % groups:
        raise ModelError(f"{groups} groups of {shape[1]} columns")
    scheme = f"int{bits}-" + (f"g{shape[1] // groups}" if groups > 1 else "channel") + ("" if even else "-asym")

    def pack(new: RoundedWeight) -> dict[str, Tensor]:
        own = torch.full_like(zeros, middle) if even else new.scales["zero_point"].to(torch.int16) + middle
        if stored_less:
            own = (own - 1) % 2**bits
        return pack_groups(new.codes.to(torch.int16) + middle, own, new.scales["scale"], bits)

    stored = {"scale": scales} if even else {"scale": scales, "zero_point": (zeros - middle).to(torch.int8)}
    weight = RoundedWeight(scheme=scheme, codes=(q - middle).to(torch.int8), scales=stored, shape=shape)
    order = _order_of(parts["g_idx"], groups) if "g_idx" in parts else None
    return (weight, pack) if order is None else _grouped(weight, order, pack)


def _awq(parts: Parts, settings: Settings, shape: Shape, _name: str) -> tuple[RoundedWeight, Pack]:
    zeros = unpack_rows(parts["qzeros"].contiguous(), 4, shape[0])
    scheme = f"int4-g{shape[1] // len(parts['scales'])}" + ("" if (zeros == 8).all() else "-asym")
    return _by_format("awq", scheme, parts, shape)


def _mlx(parts: Parts, settings: Settings, shape: Shape, name: str) -> tuple[RoundedWeight, Pack]:
    if settings.get("mode", "affine") != "affine":
        raise ModelError(f"its mode is {settings['mode']}")
    own = settings.get(name)
    group = int((own if isinstance(own, dict) else settings)["group_size"])
    return _by_format("mlx", f"int{parts['weight'].shape[1] * 32 // shape[1]}-g{group}-affine", parts, shape)


def _exl3(parts: Parts, _settings: Settings, shape: Shape, _name: str) -> tuple[RoundedWeight, Pack]:
    code = next((code for code in MARKERS if code in parts), "3inst")
    return _by_format("exl3", parse_scheme(f"trellis{parts['trellis'].shape[2] // 16}-{code}").name, parts, shape)


READERS: dict[str, Callable[[Parts, Settings, Shape, str], tuple[RoundedWeight, Pack]]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "auto-round": _gptq,
    "awq": _awq,
    "mlx": _mlx,
    "exl3": _exl3,
}
"""By `quant_method`."""
