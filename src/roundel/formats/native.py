"""Roundel's own checkpoint format, version 1: every grid and every rotation, read by `import roundel` and Transformers.

Tensors of a linear `M` of shape `(d_out, d_in)`, all little-endian:

    M.weight                 int32, one dimension: rows of codes, each a dense bit stream (`formats.bits`) filled up to whole words
    M.NAME                   each of the grid's scales as the grid has it, but small integers (zero points, `sc`, `m`) as one
                             bit stream over all of them, counted from the least possible, int32 of one dimension
    M.KIND_in, M.KIND_out    with a rotation of that KIND: signs as bits, the first in the lowest, 1 for -1, uint8; or vectors in place
                             of signs, float16
    M.table                  with the code `hyb`: its table, float16 (512, 2)

Rows of codes are, counted from the lowest code: for scalar grids the weight's rows; for `lattice2` its rows of 16-bit codes; for trellises
one row for each tile, its symbols from the last to the first. So a state of the register, the last `state_bits` bits up to symbol `t`, is a
run of the row's bits: from bit `shift (symbols - 1 - t)` on, around the circle.

Since `M.weight` has one dimension, a reader that does not know the method finds a weight of another shape than its own, and stops.

`config.json` says which linears there are, grouped by what they share. Nothing in a checkpoint is executed, and everything that could be
wrong with it is checked before it is used: the header by `parse_config`, tensors by `check_tensors`.

Cost: packing takes 8 bytes for each code of 256 rows at a time, unpacking 16. Not done: fused experts; tables of a model's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, Int8, Integer, UInt8
from torch import Tensor

from roundel.errors import ModelError, SchemeError
from roundel.formats.base import CheckpointFormat, check_inputs, expect
from roundel.formats.bits import pack_rows
from roundel.grids import Grid, ScalarGrid, TileGrid, Uniform, parse_scheme
from roundel.grids.affine import Affine
from roundel.grids.asymmetric import Asymmetric
from roundel.grids.blocks import Block, Superblock, SuperblockWithMinima
from roundel.grids.inputs import CALIBRATED
from roundel.grids.lattice import Lattice
from roundel.grids.minifloat import Fp8, MxFp4, NvFp4
from roundel.grids.trellis import SIZE, Trellis
from roundel.rotation import KINDS, Rotation, rotated_shape
from roundel.types import RoundedWeight

__all__ = [
    "METHOD",
    "VERSION",
    "Layout",
    "Native",
    "check_tensors",
    "codes_of",
    "parse_config",
    "rotation_of",
    "scales_of",
    "trellis_states",
    "trellis_table",
]

METHOD = "roundel"
VERSION = 1

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Types that scales of free type may have, by their names in the header."""

LARGEST_EXPONENT = 252
"""Of `mxfp4`: six times the next power of two would still be finite, that after it would not."""

TABLE_SHAPE = (512, 2)
GRIDS = (Uniform, Asymmetric, Affine, Fp8, MxFp4, NvFp4, Block, Superblock, SuperblockWithMinima, Lattice, Trellis)
"""What version 1 holds."""


class _Field(NamedTuple):
    """One tensor of scales."""

    shape: tuple[int, int]
    dtype: torch.dtype | None
    """As the grid has it; None: free."""
    bits: int = 0
    """Stored in so many bits each; 0: as they are."""
    low: int = 0
    """What is stored as 0."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One linear as the header describes it: all that is to be known of its tensors but their contents."""

    scheme: str
    shape: tuple[int, int]
    """Of the weight, `(d_out, d_in)`."""
    rotation: str | None = None
    vectors: bool = False
    """Whether the rotation has vectors in place of signs."""
    scale_dtype: torch.dtype | None = None
    """Of scales of free type; None where the grid says of which type they are."""

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise SchemeError(f"a weight of shape {self.shape}: expected at least one row and one column")
        if not isinstance(self.grid, GRIDS):
            raise SchemeError(f"{self.scheme}: version {VERSION} of the native format does not hold it")
        if self.rotation not in (None, *KINDS):
            raise SchemeError(f"rotation {self.rotation!r}: expected one of {', '.join(KINDS)}, or none")
        self.grid.check(*self.rotated)
        if self.vectors and self.rotation is None:
            raise SchemeError("vectors without a rotation: expected one of the rotations that they belong to")
        free = any(field.dtype is None for field in self.fields.values())
        if self.scale_dtype not in (SCALE_DTYPES.values() if free else (None,)):
            expected = f"one of {', '.join(SCALE_DTYPES)}" if free else "none, as this scheme has its own"
            raise SchemeError(f"{self.scheme}: scales of type {self.scale_dtype}; expected {expected}")

    @property
    def grid(self) -> Grid:
        """The scheme's grid."""
        return parse_scheme(self.scheme)

    @property
    def rotated(self) -> tuple[int, int]:
        """Shape of what the codes stand for, before the rotation is undone."""
        return rotated_shape(self.rotation, self.shape)

    @property
    def fields(self) -> dict[str, _Field]:
        """The scales."""
        return _fields(self.grid, self.rotated)

    @property
    def stream(self) -> tuple[int, int, int]:
        """Rows of codes, codes in a row, and bits of a code."""
        grid, (d_out, d_in) = self.grid, self.rotated
        if isinstance(grid, ScalarGrid):
            low, high = grid.code_range
            return d_out, d_in, (high - low).bit_length()
        assert isinstance(grid, TileGrid)
        rows, columns = grid.tile(d_out, d_in)
        down, across = -(-d_out // rows), -(-d_in // columns)
        if isinstance(grid, Trellis):
            return down * across, SIZE // grid.values, grid.shift
        return down, across, grid.tile_bits()

    @property
    def words(self) -> int:
        """Words of one row of codes."""
        _, columns, bits = self.stream
        return -(-columns * bits // 32)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and types of all tensors, by their names under the module's."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight": ((self.stream[0] * self.words,), torch.int32)}
        for name, field in self.fields.items():
            if field.bits:
                found[name] = (-(-math.prod(field.shape) * field.bits // 32),), torch.int32
            else:
                dtype = self.scale_dtype if field.dtype is None else field.dtype
                assert dtype is not None
                found[name] = field.shape, dtype
        if self.rotation is not None:
            for side, width in zip(("out", "in"), self.rotated, strict=True):
                found[f"{self.rotation}_{side}"] = ((width,), torch.float16) if self.vectors else ((-(-width // 8),), torch.uint8)
        if isinstance(self.grid, Trellis) and self.grid.code == "hyb":
            found["table"] = TABLE_SHAPE, torch.float16
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> Layout:
        """What tensors of a known scheme and shape say of themselves: the type of scales, and the rotation."""
        rotation = next((kind for kind in KINDS if f"{kind}_in" in tensors), None)
        free = [name for name, field in _fields(grid, rotated_shape(rotation, shape)).items() if field.dtype is None]
        dtype = tensors[free[0]].dtype if free and free[0] in tensors else SCALE_DTYPES["float32"] if free else None
        vectors = rotation is not None and tensors[f"{rotation}_in"].dtype == torch.float16
        return cls(scheme=grid.name, shape=shape, rotation=rotation, vectors=vectors, scale_dtype=dtype)


class Native(CheckpointFormat):
    """The format `native`: holds everything that Roundel rounds to."""

    @property
    def name(self) -> str:
        return "native"

    def check(self, grid: Grid, rotation: str | None) -> None:
        if not isinstance(grid, GRIDS):
            raise SchemeError(
                f"{grid.name}: version {VERSION} of the native format does not hold it; try an integer scheme, such as int4-g128"
            )
        if rotation not in (None, *KINDS):
            raise SchemeError(f"rotation {rotation!r}: expected one of {', '.join(KINDS)}, or none")

    def pack(self, rounded: RoundedWeight) -> dict[str, Tensor]:
        layout = _layout(rounded)
        grid, codes = layout.grid, rounded.codes.cpu()
        rows, columns, bits = layout.stream
        if isinstance(grid, ScalarGrid):
            codes = codes.to(torch.int16) - grid.code_range[0]
        elif isinstance(grid, Trellis):
            codes = codes.flip(-1)
        tensors = {"weight": _pack(codes.reshape(rows, columns), bits).flatten()}
        for name, field in layout.fields.items():
            scale = rounded.scales[name].cpu()
            if scale.shape != field.shape:
                raise ValueError(f"{grid.name}: scales {name!r} of shape {tuple(scale.shape)} where {field.shape} belong")
            if field.bits:
                tensors[name] = _pack((scale.to(torch.int16) - field.low).reshape(1, -1), field.bits).flatten()
            else:
                tensors[name] = scale.contiguous()
        if layout.rotation is not None:
            assert isinstance(rounded.rotation, Rotation)
            for side, signs in (("out", rounded.rotation.signs_out), ("in", rounded.rotation.signs_in)):
                tensors[f"{layout.rotation}_{side}"] = signs.cpu().half().contiguous() if layout.vectors else _pack_signs(signs)
        if "table" in layout.tensors():
            tensors["table"] = _package_table()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> RoundedWeight:
        try:
            layout = Layout.of(tensors, grid, shape)
        except SchemeError as error:
            raise ModelError(str(error)) from error
        check_tensors(tensors, layout)
        if "table" in tensors and not torch.equal(tensors["table"], _package_table()):
            raise ModelError(f"{grid.name}: the table stored is not this version's; only Roundel's Transformers module computes with it")
        return RoundedWeight(
            scheme=grid.name,
            codes=codes_of(tensors["weight"], layout),
            scales=scales_of(tensors, layout),
            shape=shape,
            rotation=rotation_of(tensors, layout),
        )

    def packed_bytes(self, shape: tuple[int, int], grid: Grid, scale_dtype: torch.dtype, rotation: str | None) -> int:
        free = any(field.dtype is None for field in _fields(grid, rotated_shape(rotation, shape)).values())
        layout = Layout(scheme=grid.name, shape=shape, rotation=rotation, scale_dtype=scale_dtype if free else None)
        return sum(math.prod(size) * dtype.itemsize for size, dtype in layout.tensors().values())

    def config(self, rounded: Mapping[str, RoundedWeight], ignore: Sequence[str]) -> dict[str, Any]:
        members: dict[tuple[str, str, bool, str, tuple[int, int]], list[str]] = {}
        for name, weight in rounded.items():
            layout = _layout(weight)
            dtype = _dtype_name(layout.scale_dtype) or ""
            members.setdefault((layout.scheme, layout.rotation or "", layout.vectors, dtype, layout.shape), []).append(name)
        groups = [
            {
                "scheme": scheme,
                "rotation": rotation or None,
                **({"vectors": True} if vectors else {}),
                "scale_dtype": dtype or None,
                "shape": list(shape),
                "modules": sorted(names),
            }
            for (scheme, rotation, vectors, dtype, shape), names in sorted(members.items())
        ]
        return {"quant_method": METHOD, "version": VERSION, "groups": groups, "ignore": sorted(ignore)}


def parse_config(config: Mapping[str, Any]) -> dict[str, Layout]:
    """The linears that a `quantization_config` describes, by module name.

        {"quant_method": "roundel", "version": 1, "ignore": [names of linears that are not quantized],
         "groups": [{"scheme": name, "rotation": kind or null, "scale_dtype": name or null, "shape": [d_out, d_in], "modules": [names]}]}

    A group whose rotation has vectors in place of signs says so by `"vectors": true`; others leave that out.

    Raises:
        ModelError: it is another method's or another version's, or anything in it is not as above.
    """
    _expect(config.get("quant_method") == METHOD, f"quant_method is {config.get('quant_method')!r}, not {METHOD!r}")
    version = config.get("version")
    _expect(type(version) is int, f"version is {version!r}, not a number")
    _expect(version == VERSION, f"version {version} of the format; this Roundel reads version {VERSION}, a later one may read more")
    _expect_keys(config, {"quant_method", "version", "groups", "ignore"}, "the header")
    groups, ignore = config["groups"], config["ignore"]
    _expect(isinstance(groups, list), "groups are no list")
    _expect(_is_names(ignore), "ignore is no list of names")
    layouts: dict[str, Layout] = {}
    for index, group in enumerate(groups):
        where = f"group {index}"
        _expect(isinstance(group, Mapping), f"{where} is no object")
        _expect_keys({"vectors": False, **group}, {"scheme", "rotation", "vectors", "scale_dtype", "shape", "modules"}, where)
        layout = _parse_layout(group, where)
        _expect(_is_names(group["modules"]) and len(group["modules"]) > 0, f"{where}: modules are no list of names")
        for name in group["modules"]:
            _expect(name not in layouts, f"{name} is in two groups")
            layouts[name] = layout
    return layouts


def _parse_layout(group: Mapping[str, Any], where: str) -> Layout:
    scheme, rotation, dtype, shape = (group[key] for key in ("scheme", "rotation", "scale_dtype", "shape"))
    _expect(isinstance(scheme, str) and len(scheme) <= 64, f"{where}: scheme {str(scheme)[:64]!r} is no name")
    _expect(rotation is None or isinstance(rotation, str), f"{where}: rotation {rotation!r} is no name")
    _expect(
        dtype is None or (isinstance(dtype, str) and dtype in SCALE_DTYPES), f"{where}: scale_dtype {str(dtype)[:64]!r} is none of ours"
    )
    vectors = group.get("vectors", False)
    _expect(type(vectors) is bool, f"{where}: vectors is {str(vectors)[:64]!r}, neither true nor false")
    well = isinstance(shape, list) and len(shape) == 2 and all(type(side) is int and 0 < side < 2**31 for side in shape)
    _expect(well, f"{where}: shape {str(shape)[:64]} is not [d_out, d_in]")
    try:
        free = SCALE_DTYPES[dtype] if dtype else None
        layout = Layout(scheme=scheme, shape=(shape[0], shape[1]), rotation=rotation, vectors=vectors, scale_dtype=free)
        check_inputs("native", layout.grid, held=False)
        return layout
    except SchemeError as error:
        raise ModelError(f"quantization_config in config.json: {where}: {error}") from error


def check_tensors(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Refuses tensors of a linear that are not what `layout` says, or stand for no finite weight.

    Raises:
        ModelError: a tensor is missing, of another shape or type, unknown; a code is none of the grid's; a scale is not finite.
    """
    expect(tensors, layout.tensors(), f"a {layout.scheme} weight of shape {layout.shape}")
    for name in layout.fields | {"table": None}:
        if name in tensors and tensors[name].is_floating_point() and not torch.isfinite(tensors[name].float()).all():
            raise ModelError(f"{layout.scheme}: {name} holds NaN or infinite values; the checkpoint is damaged")
    if layout.vectors:
        for vector in (tensors[f"{layout.rotation}_{side}"] for side in ("out", "in")):
            if not (torch.isfinite(vector) & (vector != 0)).all():
                raise ModelError(
                    f"{layout.scheme}: a vector in place of signs holds zeros, NaN or infinite values; the checkpoint is damaged"
                )
    grid = layout.grid
    if isinstance(grid, MxFp4) and (tensors["scale"] > LARGEST_EXPONENT).any():
        raise ModelError(f"mxfp4: exponents above {LARGEST_EXPONENT - 127} make weights infinite; the checkpoint is damaged")
    if isinstance(grid, ScalarGrid) and not _codes_exist(tensors["weight"], grid, layout.stream[2]):
        raise ModelError(f"{layout.scheme}: codes outside {grid.code_range[0]} .. {grid.code_range[1]}; the checkpoint is damaged")


def _codes_exist(words: Int[Tensor, " words"], grid: ScalarGrid, bits: int) -> bool:
    """Whether all codes are the grid's; where not every pattern of bits is one, they are bytes, or 15 of 16."""
    low, high = grid.code_range
    if high - low + 1 == 2**bits:
        return True
    if bits == 8:
        return bool((words.view(torch.uint8) <= high - low).all())
    assert (bits, high - low) == (4, 14)
    return not bool((words & words >> 1 & words >> 2 & words >> 3 & 0x11111111).any())


def codes_of(words: Int[Tensor, " words"], layout: Layout) -> Integer[Tensor, "..."]:
    """The codes in `M.weight` as the grid has them, on any device."""
    rows, columns, bits = layout.stream
    codes = _unpack(words.view(rows, layout.words), bits, columns)
    grid = layout.grid
    if isinstance(grid, ScalarGrid):
        return (codes + grid.code_range[0]).to(torch.int8)
    assert isinstance(grid, TileGrid)
    across = -(-layout.rotated[1] // grid.tile(*layout.rotated)[1])
    tiled: Tensor = codes.flip(-1).to(torch.uint8).unflatten(0, (-1, across)) if isinstance(grid, Trellis) else codes.unsqueeze(-1)
    return tiled


def scales_of(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The scales as the grid has them."""
    return {
        name: (_unpack(tensors[name][None], field.bits, math.prod(field.shape)) + field.low).view(field.shape).to(field.dtype)
        if field.bits
        else tensors[name]
        for name, field in layout.fields.items()
    }


def rotation_of(tensors: Mapping[str, Tensor], layout: Layout) -> Rotation | None:
    """The rotation that was stored."""
    if layout.rotation is None:
        return None
    stored = [tensors[f"{layout.rotation}_{side}"] for side in ("out", "in")]
    signs = stored if layout.vectors else [_unpack_signs(each, width) for each, width in zip(stored, layout.rotated, strict=True)]
    return Rotation(kind=layout.rotation, shape=layout.shape, signs_out=signs[0], signs_in=signs[1])


def trellis_states(words: Int[Tensor, "tiles words"], grid: Trellis) -> Int[Tensor, "tiles symbols"]:
    """The states of tiles, read from their bits, on any device."""
    symbols = SIZE // grid.values
    start = grid.shift * torch.arange(symbols - 1, -1, -1, device=words.device)
    return _runs(torch.cat([words, words[:, :1]], 1), start, grid.state_bits)


def trellis_table(grid: Trellis, table: Float16[Tensor, "512 2"] | None) -> Float[Tensor, "states values"]:
    """What each state stands for, float32; `table` is what is stored with the code `hyb`.

    `(h >> 6) & 511` is the row, `h = s (s + 1)`, and bit 15 of `h` makes its first entry negative (`linalg.codebooks`).
    """
    if table is None:
        return grid.table
    state = torch.arange(2**grid.state_bits) << (16 - grid.state_bits)
    mixed = state * (state + 1)
    values = table.float()[mixed >> 6 & 511]
    return torch.stack([torch.where((mixed >> 15 & 1) == 1, -values[:, 0], values[:, 0]), values[:, 1]], 1)


def _layout(rounded: RoundedWeight) -> Layout:
    grid, rotation = parse_scheme(rounded.scheme), rounded.rotation
    if rotation is not None and not isinstance(rotation, Rotation):
        raise SchemeError(f"the native format holds rotations by signs and Hadamard transforms, not a {type(rotation).__name__}")
    free = [name for name, field in _fields(grid, rounded.rotated_shape).items() if field.dtype is None]
    return Layout(
        scheme=grid.name,
        shape=rounded.shape,
        rotation=rotation.kind if rotation is not None else None,
        vectors=rotation is not None and rotation.has_vectors,
        scale_dtype=rounded.scales[free[0]].dtype if free else None,
    )


def _fields(grid: Grid, shape: tuple[int, int]) -> dict[str, _Field]:
    """The scales of a weight."""
    d_out, d_in = shape
    fields: dict[str, _Field] = {}
    match grid:
        case Uniform():
            fields = {"scale": _Field(grid.scale_shape(d_out, d_in), None)}
        case Asymmetric():
            size = d_out, 1 if grid.group is None else d_in // grid.group
            fields = {"scale": _Field(size, None), "zero_point": _Field(size, torch.int8, grid.width, grid.code_range[0])}
        case Affine():
            fields = dict.fromkeys(("scale", "bias"), _Field((d_out, d_in // grid.group), None))
        case Fp8():
            fields = {"scale": _Field((d_out, 1) if grid.scope == "channel" else (1, 1), None)}
        case MxFp4():
            fields = {"scale": _Field((d_out, d_in // grid.group), torch.uint8)}
        case NvFp4():
            numbers = ["tensor_scale", *[CALIBRATED] * grid.rounds_inputs]  # the latter in files of work only
            size = d_out, d_in // grid.group
            fields = {"scale": _Field(size, torch.float8_e4m3fn), **dict.fromkeys(numbers, _Field((1, 1), torch.float32))}
        case Block():
            fields = {"d": _Field((d_out, d_in // grid.layout.columns), torch.float16)}
        case Superblock() | SuperblockWithMinima():
            low, high = grid.layout.steps
            half = _Field((d_out, d_in // grid.layout.columns), torch.float16)
            steps = _Field((d_out, d_in // grid.layout.group), torch.int8 if low < 0 else torch.uint8, (high - low).bit_length(), low)
            minima = {"dmin": half, "m": steps} if isinstance(grid, SuperblockWithMinima) else {}
            fields = {"d": half, "sc": steps, **minima}
        case TileGrid():
            fields = {"scale": _Field((1, 1), torch.float32)}
    return fields


def _pack(codes: Integer[Tensor, "rows columns"], bits: int) -> Int[Tensor, "rows words"]:
    """As `pack_rows`, also for 16 bits: two bytes each."""
    if bits <= 8:
        return pack_rows(codes.to(torch.int16), bits)
    assert bits == 16
    return pack_rows(torch.stack([codes & 255, codes >> 8], -1).flatten(1).to(torch.int16), 8)


def _unpack(words: Int[Tensor, "rows words"], bits: int, columns: int) -> Int[Tensor, "rows columns"]:
    """Inverse of `_pack` on any device: unsigned codes."""
    start = torch.arange(0, columns * bits, bits, device=words.device)
    return _runs(torch.nn.functional.pad(words, (0, 1)), start, bits)


def _runs(words: Int[Tensor, "rows words"], start: Int[Tensor, " columns"], bits: int) -> Int[Tensor, "rows columns"]:
    """At most 16 bits from each `start` on. There is one word more than has starts."""
    wide = words.long() & 0xFFFFFFFF
    word = start >> 5
    pair = wide[:, word] | wide[:, word + 1] << 32
    runs: Tensor = pair >> (start & 31) & (1 << bits) - 1
    return runs.to(torch.int32)


def _pack_signs(signs: Int8[Tensor, " width"]) -> UInt8[Tensor, " bytes"]:
    return torch.from_numpy(np.packbits((signs < 0).cpu().numpy(), bitorder="little"))


def _unpack_signs(packed: UInt8[Tensor, " bytes"], width: int) -> Int8[Tensor, " width"]:
    bits: Tensor = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return 1 - 2 * bits.flatten()[:width].to(torch.int8)


def _package_table() -> Float16[Tensor, "512 2"]:
    with files("roundel.linalg").joinpath("hybrid_table.npy").open("rb") as file:
        return torch.from_numpy(np.load(file))


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return next((name for name, known in SCALE_DTYPES.items() if known == dtype), None)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _expect(holds: bool, complaint: str) -> None:
    if not holds:
        raise ModelError(f"quantization_config in config.json: {complaint}")


def _expect_keys(given: Mapping[str, Any], expected: set[str], where: str) -> None:
    missing, unknown = expected - given.keys(), given.keys() - expected
    _expect(not missing, f"{where} lacks {', '.join(sorted(missing))}")
    _expect(not unknown, f"{where} has the unknown keys {', '.join(sorted(map(str, unknown)))[:200]}")
