"""A linear layer that computes with packed weights.

    y = W_hat x + bias,     or with a rotation     y = S_out H_out^T (W~ (H_in S_in x)) + bias,    W~ what the codes stand for

Weights stay packed in memory, as the checkpoint has them (`formats.native`), and are decoded for each call, in float32: on the CPU by
numba, some rows at a time, elsewhere by torch; on a GPU a few rows of `x` are multiplied while codes are decoded, without any dense
weight (`kernels.triton_decode`). Decoded weights are taken to the type of `x` for the product; rotations and the bias after one are in
float32.

Without rotation and for float32 on the CPU the result is that of `F.linear` with the dense weight, of which each product takes `BLOCK`
weights: where one is enough, it is the same product and equal bit for bit. With a rotation it is equal up to rounding, since `W_hat` is
never formed. Cost of a call on the CPU: 2 to 8 ns a weight and core for decoding, and `4 BLOCK` bytes.

Not done: training of codes or scales (gradients flow to `x` and the bias); products that use integers of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from roundel.formats.native import Layout, check_tensors, codes_of, rotation_of, scales_of, trellis_states, trellis_table
from roundel.grids import ScalarGrid, TileGrid, Uniform, parse_scheme
from roundel.grids.asymmetric import Asymmetric
from roundel.grids.lattice import Lattice
from roundel.grids.trellis import ORDER, Trellis
from roundel.kernels.decode import decode_scalars, decode_tiles, decode_vectors
from roundel.rotation import Rotation

__all__ = ["QuantizedLinear", "SharedLinear", "decode_rows"]

BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Weights that are dense at a time."""

FEW = 16
"""Rows of `x` up to which a GPU decodes and multiplies at once."""


class _Derived(NamedTuple):
    """What a layer makes of its tensors once: small, or shared among layers."""

    rotation: Rotation | None
    table: Tensor | None
    """Of a trellis."""


class QuantizedLinear(nn.Module):
    """Drop-in for `nn.Linear` whose weight is packed: the buffers are the checkpoint's tensors, byte for byte.

    `weight` is the packed codes; the dense weight is `dequantized()`.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, layout: Layout, *, tensors: Mapping[str, Tensor] | None = None, bias: nn.Parameter | None = None) -> None:
        """With `tensors`, of the names and shapes in `layout.tensors()`; without, empty on the meta device, to be loaded."""
        super().__init__()
        self.layout = layout
        self.out_features, self.in_features = layout.shape
        for name, (shape, dtype) in layout.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta") if tensors is None else tensors[name])
        self.register_parameter("bias", bias)
        self._derived: _Derived | None = None

    def extra_repr(self) -> str:
        rotated = f", rotation={self.layout.rotation}" if self.layout.rotation else ""
        named = f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.layout.scheme}"
        return f"{named}{rotated}, bias={self.bias is not None}"

    def check(self) -> None:
        """Refuses contents that stand for no finite weight.

        Raises:
            ModelError: see `formats.native.check_tensors`.
        """
        check_tensors(self.packed, self.layout)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The checkpoint's tensors."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """`W_hat x + bias`, in the type of `x`."""
        rotation = self._ready().rotation
        if rotation is None:
            return self._product(x, self.bias).to(x.dtype)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = self._product(rotation.rotate_input(x.to(wide)).to(x.dtype), None)
        restored = rotation.restore_output(y.to(wide))
        return (restored if self.bias is None else restored + self.bias.to(wide)).to(x.dtype)

    def dequantized(self) -> Float[Tensor, "d_out d_in"]:
        """`W_hat`, dense, in float32."""
        W = torch.cat([self._rows(top, end) for top, end in self._blocks()])
        rotation = self._ready().rotation
        return W if rotation is None else rotation.restore_weight(W)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`W~ x + bias`, in the type of `x` or in float32."""
        if self._multiplies_packed(x):
            with torch.cuda.device_of(x):
                y = self._packed_product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
            return y if bias is None else y + bias.float()
        bias = None if bias is None else bias.to(x.dtype)
        blocks = self._blocks()
        parts = [nn.functional.linear(x, self._rows(*block).to(x.dtype), None if bias is None else bias[slice(*block)]) for block in blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _blocks(self) -> list[tuple[int, int]]:
        """First and last row, exclusive, of each block."""
        height = _tile(self.layout)[0]
        (d_out, d_in), size = self.layout.rotated, BLOCK.get(self.weight.device.type, BLOCK["cuda"])
        rows = max(1, size // (d_in * height)) * height
        return [(top, min(top + rows, d_out)) for top in range(0, d_out, rows)]

    def _rows(self, top: int, end: int) -> Float[Tensor, "rows d_in"]:
        compiled = self.weight.device.type == "cpu"
        return decode_rows(self.packed, self.layout, top, end, table=self._ready().table, compiled=compiled)

    def _multiplies_packed(self, x: Tensor) -> bool:
        """Whether the GPU's kernel takes these rows."""
        return (
            x.is_cuda
            and x.numel() <= FEW * x.shape[-1]
            and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
            and not (torch.is_grad_enabled() and x.requires_grad)
            and isinstance(self.layout.grid, Uniform | Asymmetric | Trellis)
            and find_spec("triton") is not None
        )

    def _packed_product(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_out"]:
        """`W~ x` in float32, by the kernel."""
        from roundel.kernels.triton_decode import multiply_integers, multiply_trellis

        grid, tensors = self.layout.grid, self.packed
        if isinstance(grid, Trellis):
            code = grid.code, grid.shift, grid.values, grid.state_bits
            return multiply_trellis(x, self.weight, *code, tensors.get("table"), tensors["scale"], self.layout.rotated, _tile(self.layout))
        assert isinstance(grid, Uniform | Asymmetric)
        return multiply_integers(
            x, self.weight, grid.width, grid.code_range[0], tensors["scale"], tensors.get("zero_point"), self.layout.rotated
        )

    def _ready(self) -> _Derived:
        if self._derived is None:
            grid, tensors = self.layout.grid, self.packed
            with torch.inference_mode(False):  # kept for all calls, some of which may differentiate
                table = None
                if isinstance(grid, Trellis):
                    stored = tensors.get("table")
                    known = None if stored is None else stored.cpu().numpy().tobytes()
                    table = _states(grid.code, grid.state_bits, known, self.weight.device)
                self._derived = _Derived(rotation_of(tensors, self.layout), table)
        return self._derived

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves the tensors; their types stay, whatever type the model is taken to."""
        before = self.packed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self._derived = None
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._derived = None


def decode_rows(
    tensors: Mapping[str, Tensor], layout: Layout, top: int, end: int, *, table: Tensor | None, compiled: bool
) -> Float[Tensor, "rows d_in"]:
    """Rows of what the codes stand for, in float32: `grid.dequantize`, bit for bit.

    Args:
        tensors: Of the linear, as stored.
        layout: Of the linear.
        top: First row; of trellises the first of a tile.
        end: Last row, exclusive.
        table: What a trellis's states stand for.
        compiled: By numba, on the CPU; else by torch on any device.
    """
    grid, (d_out, d_in) = layout.grid, layout.rotated
    stream_rows, _, bits = layout.stream
    words, shape = tensors["weight"].view(stream_rows, -1), (end - top, d_in)
    if isinstance(grid, Trellis):
        assert table is not None
        (rows, columns), scale = _tile(layout), tensors["scale"]
        across = -(-d_in // columns)
        part = words[top // rows * across : -(-end // rows) * across]
        if compiled:
            return decode_tiles(part, grid.shift, grid.state_bits, table, ORDER, scale.item(), shape, (rows, columns))
        values = table[trellis_states(part, grid)].flatten(1)
        tiles = torch.empty_like(values).index_copy_(1, ORDER.to(values.device), values)
        dense: Tensor = tiles.unflatten(0, (-1, across)).unflatten(2, (rows, columns)).transpose(1, 2).flatten(0, 1).flatten(1)
        return dense[: end - top, :d_in] * scale
    part = words[top:end]
    scales = {name: scale[top:end] if len(scale) == d_out else scale for name, scale in scales_of(tensors, layout).items()}
    if compiled and isinstance(grid, ScalarGrid):
        step, offset = grid.affine(scales, (end - top, max(scale.shape[1] for scale in scales.values())), torch.float32)
        zero = scales["zero_point"].float() if isinstance(grid, Asymmetric) else None
        return decode_scalars(part, bits, d_in, _levels(grid.name, bits), step, offset=None if zero is not None else offset, zero=zero)
    if compiled and isinstance(grid, Lattice):
        return decode_vectors(part, d_in, _codewords(grid), scales["scale"].item())
    return grid.dequantize(
        codes_of(part.flatten(), replace(layout, shape=shape, rotation=None, vectors=False)), scales, shape, torch.float32
    )


def _tile(layout: Layout) -> tuple[int, int]:
    grid = layout.grid
    return grid.tile(*layout.rotated) if isinstance(grid, TileGrid) else (1, 1)


@cache
def _states(code: str, state_bits: int, table: bytes | None, device: torch.device) -> Float[Tensor, "states values"]:
    """What states stand for, shared among layers."""
    grid = Trellis(width=1, code=code, state_bits=state_bits)
    stored = None if table is None else torch.from_numpy(np.frombuffer(table, np.float16).copy()).view(-1, 2)
    return trellis_table(grid, stored).to(device)


@cache
def _levels(scheme: str, bits: int) -> Float[Tensor, " levels"]:
    """What each pattern of bits stands for: the levels in float32, and zeros for patterns that are no codes."""
    grid = parse_scheme(scheme)
    assert isinstance(grid, ScalarGrid)
    low, high = grid.code_range
    levels = torch.zeros(2**bits)
    levels[: high - low + 1] = grid.units(torch.arange(low, high + 1), torch.float32)
    return levels


@cache
def _codewords(grid: Lattice) -> Float[Tensor, "codes values"]:
    with torch.inference_mode(False):
        return grid.decode_tiles(torch.arange(1 << grid.tile_bits())[:, None])


class SharedLinear(nn.Module):
    """A further place where a linear runs, as in a block of several layers: its tensors are that one's."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "linear":  # not registered: it is stored, moved and initialised where it belongs
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias` of that linear."""
        y: Tensor = self.linear(x)
        return y
