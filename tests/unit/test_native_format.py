"""The native format: pure inverses, exact sizes, damaged or hostile contents refused, bytes of version 1; the layer that computes with it.

`python tests/unit/test_native_format.py` writes the golden files of a new version; those of version 1 never change.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from roundel.errors import ModelError, SchemeError
from roundel.formats.bits import unpack_rows
from roundel.formats.native import Layout, Native, check_tensors, parse_config, trellis_states, trellis_table
from roundel.grids import ScalarGrid, TileGrid, parse_scheme
from roundel.grids.trellis import Trellis
from roundel.integration import linear as layers
from roundel.integration.linear import QuantizedLinear, decode_rows
from roundel.linalg.viterbi import states_of
from roundel.rotation import Rotation, rotated_shape
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

GOLDEN = Path(__file__).parent.parent / "golden" / "native-v1"
FORMAT = Native()
INTEGERS = ["int2-g32", "int3-channel", "int5-g8", "int8-tensor", "int2-g32-asym", "int3-g8-asym", "int8-channel-asym"]
FLOATS = ["fp8", "fp8-tensor", "mxfp4", "nvfp4"]
BLOCKS = ["q4_0", "q5_0", "q8_0", "iq4_nl", "iq4_xs", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
TILES = [
    "lattice2",
    "trellis1-mcg-s8",
    "trellis2",
    "trellis3-3inst-s12-c2",
    "trellis5-1mad",
    "trellis8-s9",
    "trellis2-hyb",
    "trellis4-hyb-s8",
]
SCHEMES = [*INTEGERS, *FLOATS, *BLOCKS, *TILES]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
every_rotation = pytest.mark.parametrize("rotation", [None, "hadamard", "hadamard128"])


def is_free(scheme: str) -> bool:
    """Whether scales have any type."""
    return scheme.startswith(("int", "fp8"))


@functools.cache
def random_weight(
    scheme: str, shape: tuple[int, int], *, rotation: str | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> RoundedWeight:
    """Random codes and scales; not to be changed."""
    random = torch.Generator().manual_seed(seed)
    grid = parse_scheme(scheme)
    layout = Layout(scheme=scheme, shape=shape, rotation=rotation, scale_dtype=dtype if is_free(scheme) else None)
    scales = {}
    for name, field in layout.fields.items():
        if field.bits:
            values = torch.randint(2**field.bits, field.shape, generator=random) + field.low
        elif field.dtype == torch.uint8:
            values = torch.randint(100, 140, field.shape, generator=random)
        else:
            values = torch.randn(field.shape, generator=random)
        scales[name] = values.to(field.dtype or dtype)
    if isinstance(grid, ScalarGrid):
        low, high = grid.code_range
        codes = torch.randint(low, high + 1, layout.rotated, generator=random).to(torch.int8)
    else:
        assert isinstance(grid, TileGrid)
        rows, columns = grid.tile(*layout.rotated)
        down, across = -(-layout.rotated[0] // rows), -(-layout.rotated[1] // columns)
        if isinstance(grid, Trellis):
            codes = torch.randint(2**grid.shift, (down, across, 256 // grid.values), generator=random).to(torch.uint8)
        else:
            codes = torch.randint(2**16, (down, across, 1), generator=random).to(torch.int32)
    rotated = None if rotation is None else Rotation.draw(*shape, rotation, seed)
    return RoundedWeight(scheme=grid.name, codes=codes, scales=scales, shape=shape, rotation=rotated)


def shape_for(scheme: str, rotation: str | None = None) -> tuple[int, int]:
    """Odd where the grid allows it."""
    grid = parse_scheme(scheme)
    d_out = 9
    for d_in in (37, 40, 96):
        try:
            grid.check(*rotated_shape(rotation, (d_out, d_in)))
        except SchemeError:
            continue
        return d_out, d_in
    return d_out, 256


def layout_of(weight: RoundedWeight) -> Layout:
    """By way of the header, as a reader does."""
    return parse_config(FORMAT.config({"it": weight}, []))["it"]


def layer_of(weight: RoundedWeight, bias: Tensor | None = None) -> QuantizedLinear:
    layer = QuantizedLinear(layout_of(weight), tensors=FORMAT.pack(weight), bias=None if bias is None else nn.Parameter(bias))
    layer.check()
    return layer


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- inverses and sizes


@every_scheme
@every_rotation
def test_unpack_inverts_pack(scheme: str, rotation: str | None) -> None:
    weight = random_weight(scheme, shape_for(scheme, rotation), rotation=rotation)
    packed = FORMAT.pack(weight)
    back = FORMAT.unpack(packed, parse_scheme(scheme), weight.shape)
    assert back.scheme == weight.scheme
    assert back.shape == weight.shape
    assert same_bits(back.codes, weight.codes)
    assert back.scales.keys() == weight.scales.keys()
    assert all(same_bits(back.scales[name], weight.scales[name]) for name in weight.scales)
    assert same_bits(dequantized(back), dequantized(weight))
    again = FORMAT.pack(back)
    assert all(same_bits(again[name], packed[name]) and again[name].is_contiguous() for name in packed)
    assert {name: (tuple(each.shape), each.dtype) for name, each in packed.items()} == layout_of(weight).tensors()
    assert FORMAT.packed_bytes(weight.shape, parse_scheme(scheme), torch.bfloat16, rotation) == sum(each.nbytes for each in packed.values())


@pytest.mark.parametrize("scheme", ["int4-g8", "int3-g8-asym", "fp8", "fp8-tensor"])
def test_scales_of_other_types(scheme: str) -> None:
    for dtype in (torch.float16, torch.float32):
        weight = random_weight(scheme, shape_for(scheme), dtype=dtype)
        packed = FORMAT.pack(weight)
        assert FORMAT.packed_bytes(weight.shape, parse_scheme(scheme), dtype, None) == sum(each.nbytes for each in packed.values())
        assert same_bits(FORMAT.unpack(packed, parse_scheme(scheme), weight.shape).scales["scale"], weight.scales["scale"])


@every_scheme
def test_large_weights_take_what_the_grid_says(scheme: str) -> None:
    """Codes and scales are dense: nothing is lost but the padding of rows, and the table of `hyb`."""
    grid, shape = parse_scheme(scheme), (512, 1024)
    table = 2048 if "hyb" in scheme else 0
    bits = 8 * (FORMAT.packed_bytes(shape, grid, torch.bfloat16, None) - table)
    assert grid.stored_bits(shape, torch.bfloat16) <= bits <= grid.stored_bits(shape, torch.bfloat16) + 31


def test_rows_of_scalar_codes_are_the_dense_stream_of_formats_bits() -> None:
    weight = random_weight("int5-g8", (5, 40))
    words = FORMAT.pack(weight)["weight"].view(5, -1)
    assert torch.equal(unpack_rows(words, 5, 40) - 16, weight.codes.to(torch.int16))


@pytest.mark.parametrize("scheme", [name for name in TILES if "trellis" in name])
def test_states_are_runs_of_bits(scheme: str) -> None:
    weight = random_weight(scheme, (20, 40))
    grid, layout = parse_scheme(scheme), layout_of(weight)
    assert isinstance(grid, Trellis)
    words = FORMAT.pack(weight)["weight"].view(layout.stream[0], layout.words)
    assert torch.equal(trellis_states(words, grid).long(), states_of(weight.codes.flatten(0, 1), grid.shift, grid.state_bits))
    stored = FORMAT.pack(weight).get("table")
    assert torch.equal(trellis_table(grid, stored), grid.table)


def test_the_weight_never_has_the_shape_of_a_dense_one() -> None:
    for shape in ((1, 1), (8, 1), (1, 40)):
        assert FORMAT.pack(random_weight("int8-channel", shape))["weight"].ndim == 1


# --- refusals


@pytest.mark.parametrize(
    ("scheme", "name", "change", "reason"),
    [
        ("int4-g8", "weight", lambda t: t[:-1], r"weight is int32 \(44,\); expected int32 \(45,\)"),
        ("int4-g8", "weight", lambda t: t.view(9, 5), r"weight is int32 \(9, 5\)"),
        ("int4-g8", "weight", lambda t: t.view(torch.float32), "weight is float32"),
        ("int4-g8", "scale", lambda t: t.double(), "scales of type torch.float64"),
        ("int4-g8", "scale", lambda t: t[:, :4], r"scale is bfloat16 \(9, 4\)"),
        ("int4-g8", "scale", lambda t: t * torch.nan, "scale holds NaN"),
        ("int4-g8", "scale", lambda t: t / 0, "scale holds NaN or infinite"),
        ("int3-g8-asym", "zero_point", lambda t: t[:-1], "zero_point is int32"),
        ("nvfp4", "tensor_scale", lambda t: t * torch.inf, "tensor_scale holds NaN"),
        ("nvfp4", "scale", lambda t: (t.view(torch.uint8) | 127).view(t.dtype), "scale holds NaN"),
        ("nvfp4", "weight", lambda t: t | 0xF, "codes outside -7 .. 7"),
        ("mxfp4", "weight", lambda t: t | -(2**28), "codes outside -7 .. 7"),
        ("mxfp4", "scale", lambda t: t | 255, "exponents above 125"),
        ("fp8", "weight", lambda t: t | 0xFF00, "codes outside -126 .. 126"),
        ("q8_0", "weight", lambda t: t | -(2**24), "codes outside -127 .. 127"),
        ("q4_k", "dmin", lambda t: t / 0, "dmin holds NaN"),
        ("q4_k", "sc", lambda t: t[1:], "sc is int32"),
        ("trellis2", "scale", lambda t: t[0], r"scale is float32 \(1,\)"),
        ("trellis2", "scale", lambda t: t * torch.nan, "scale holds NaN"),
        ("trellis2-hyb", "table", lambda t: t[1:], "table is float16"),
        ("trellis2-hyb", "table", lambda t: t * torch.nan, "table holds NaN"),
        ("trellis2-hyb", "table", lambda t: -t, "not this version's"),
    ],
)
def test_damaged_tensors_are_refused(scheme: str, name: str, change: Callable[[Tensor], Tensor], reason: str) -> None:
    weight = random_weight(scheme, shape_for(scheme))
    packed = FORMAT.pack(weight)
    packed[name] = change(packed[name])
    with pytest.raises(ModelError, match=reason):
        FORMAT.unpack(packed, parse_scheme(scheme), weight.shape)


@every_scheme
def test_missing_and_unknown_tensors_are_refused(scheme: str) -> None:
    weight = random_weight(scheme, shape_for(scheme), rotation="hadamard")
    packed, layout = FORMAT.pack(weight), layout_of(weight)
    for name in packed:
        with pytest.raises(ModelError, match="expected"):
            check_tensors({other: tensor for other, tensor in packed.items() if other != name}, layout)
    with pytest.raises(ModelError, match="expected"):
        check_tensors({**packed, "g_idx": torch.zeros(1)}, layout)
    with pytest.raises(ModelError):
        FORMAT.unpack(packed, parse_scheme(scheme), (weight.shape[0] + 64, weight.shape[1]))
    with pytest.raises(ModelError):
        FORMAT.unpack({}, parse_scheme(scheme), weight.shape)


def header(**changes: Any) -> dict[str, Any]:
    group = {"scheme": "int4-g32", "rotation": None, "scale_dtype": "bfloat16", "shape": [64, 96], "modules": ["a", "b"]}
    return {"quant_method": "roundel", "version": 1, "groups": [{**group, **changes}], "ignore": ["head"]}


def test_the_header_is_read() -> None:
    layout = Layout(scheme="int4-g32", shape=(64, 96), scale_dtype=torch.bfloat16)
    assert parse_config(header()) == {"a": layout, "b": layout}
    rotated = parse_config(header(rotation="hadamard", scheme="trellis2", scale_dtype=None))["b"]
    assert (rotated.rotation, rotated.scale_dtype) == ("hadamard", None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scheme": "int4"}, "group 0: unknown scheme 'int4'"),
        ({"scheme": 4}, "is no name"),
        ({"scheme": "int" + "9" * 5000 + "-g32"}, "is no name"),
        ({"scheme": "int4-g40"}, "does not divide the width 96"),
        ({"scheme": "trellis2", "scale_dtype": "bfloat16"}, "expected none"),
        ({"scheme": "trellis2-c999999999999", "scale_dtype": None}, "999999999999 seams"),
        ({"scale_dtype": None}, "expected one of float16, bfloat16, float32"),
        ({"scale_dtype": "float64"}, "is none of ours"),
        ({"scale_dtype": ["float16"]}, "is none of ours"),
        ({"rotation": "householder"}, "rotation 'householder'"),
        ({"rotation": 1}, "is no name"),
        ({"shape": [64]}, "shape"),
        ({"shape": [64, -96]}, "shape"),
        ({"shape": [64, 2**40]}, "shape"),
        ({"shape": [64.0, 96]}, "shape"),
        ({"shape": [True, 96]}, "shape"),
        ({"shape": "64x96"}, "shape"),
        ({"modules": "all"}, "modules are no list"),
        ({"modules": []}, "modules are no list"),
        ({"modules": ["a", 1]}, "modules are no list"),
        ({"modules": ["a", "a"]}, "a is in two groups"),
        ({"code": "os.system('true')"}, "unknown keys code"),
    ],
)
def test_hostile_groups_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        parse_config(header(**change))
    assert "config.json" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "reads version 1, a later one may read more"),
        ({"version": "1"}, "is '1', not a number"),
        ({"version": None}, "not a number"),
        ({"version": True}, "not a number"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"groups": {}}, "groups are no list"),
        ({"groups": [1]}, "group 0 is no object"),
        ({"groups": [{}]}, "group 0 lacks modules"),
        ({"ignore": None}, "ignore is no list"),
        ({"extra": 1}, "unknown keys extra"),
    ],
)
def test_hostile_headers_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        parse_config({**header(), **change})
    with pytest.raises(ModelError, match="quant_method is None"):
        parse_config({})


def test_what_the_format_cannot_be_is_refused_before_any_work() -> None:
    for scheme in [*SCHEMES, "int4-g4096"]:
        FORMAT.check(parse_scheme(scheme), "hadamard")
    with pytest.raises(SchemeError, match="rotation 'random'"):
        FORMAT.check(parse_scheme("trellis2"), "random")

    class Unknown(ScalarGrid):
        name = "int4-other"

    Unknown.__abstractmethods__ = frozenset()
    with pytest.raises(SchemeError, match="version 1 of the native format does not hold it"):
        FORMAT.check(Unknown(), None)


def test_scales_of_a_type_that_nobody_reads_are_refused() -> None:
    weight = random_weight("int4-g8", (4, 40))
    with pytest.raises(SchemeError, match="float64"):
        FORMAT.pack(replace(weight, scales={"scale": weight.scales["scale"].double()}))


def test_equal_linears_are_one_group() -> None:
    weights = {name: random_weight("int4-g8", (4, 40)) for name in ("b", "a")}
    weights |= {"c": random_weight("int4-g8", (5, 40)), "d": random_weight("int4-g8", (4, 40), rotation="hadamard")}
    config = FORMAT.config(weights, ["z", "y"])
    assert json.loads(json.dumps(config)) == config
    assert sorted(group["modules"] for group in config["groups"]) == [["a", "b"], ["c"], ["d"]]
    assert config["ignore"] == ["y", "z"]
    assert parse_config(config).keys() == weights.keys()


# --- the layer


@every_scheme
@pytest.mark.parametrize("compiled", [True, False])
def test_rows_are_those_of_the_grid(scheme: str, compiled: bool) -> None:
    for shape in (shape_for(scheme), (48, 256)):
        weight = random_weight(scheme, shape)
        layer, expected = layer_of(weight), dequantized(weight)
        grid = parse_scheme(scheme)
        height = grid.tile(*shape)[0] if isinstance(grid, TileGrid) else 1
        table = trellis_table(grid, layer.packed.get("table")) if isinstance(grid, Trellis) else None
        for top, end in ((0, shape[0]), (min(height, shape[0] - 1) // height * height, shape[0])):
            rows = decode_rows(layer.packed, layer.layout, top, end, table=table, compiled=compiled)
            assert same_bits(rows, expected[top:end])


@every_scheme
@every_rotation
def test_the_layer_is_the_linear_of_the_dense_weight(scheme: str, rotation: str | None) -> None:
    weight = random_weight(scheme, shape_for(scheme, rotation), rotation=rotation)
    random = torch.Generator().manual_seed(1)
    bias, x = torch.randn(weight.shape[0], generator=random), torch.randn(2, 3, weight.shape[1], generator=random)
    layer, dense = layer_of(weight, bias), dequantized(weight)
    expected = nn.functional.linear(x, dense, bias)
    if rotation is None:
        assert torch.equal(layer(x), expected)
    else:
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert same_bits(layer.dequantized(), dense)


@pytest.mark.parametrize("scheme", ["int3-g8-asym", "q4_k", "lattice2", "trellis2"])
def test_blocks_of_rows_and_threads_change_nothing(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(scheme, (75, 256))
    layer, x = layer_of(weight, torch.ones(75)), torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    whole = layer(x)
    monkeypatch.setitem(layers.BLOCK, "cpu", 20 * 256)
    monkeypatch.setattr("roundel.kernels.decode.ALONE", 256)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-4)
    assert same_bits(layer.dequantized(), dequantized(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_the_type_of_the_input_is_that_of_the_output(dtype: torch.dtype, rotation: str | None) -> None:
    weight = random_weight("int4-g8", (24, 40), rotation=rotation)
    layer, dense = layer_of(weight, torch.ones(24)), dequantized(weight)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = nn.functional.linear(x.double(), dense.double(), torch.ones(24).double())
    found = layer(x)
    assert found.dtype == dtype
    precision = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 2**-21}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3 * precision * expected.abs().max().item())


def test_gradients_reach_the_input_and_the_bias() -> None:
    weight = random_weight("trellis2", (24, 40), rotation="hadamard")
    layer, dense = layer_of(weight, torch.zeros(24)), dequantized(weight)
    with torch.inference_mode():  # what is kept from here is no inference tensor
        layer(torch.ones(1, 40))
    x = torch.ones(3, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, -1), rtol=0, atol=1e-4)
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((24,), 3.0))


def test_other_types_and_contents_are_followed() -> None:
    """A model that is taken to another type keeps its packed tensors; what was derived from old contents is forgotten."""
    first, second = (random_weight("trellis2-hyb", (24, 40), rotation="hadamard", seed=seed) for seed in (0, 1))
    layer = layer_of(first, torch.ones(24))
    before = {name: tensor.clone() for name, tensor in layer.packed.items()}
    assert layer.to(torch.float16).bias.dtype == torch.float16
    assert all(same_bits(layer.packed[name], before[name]) for name in before)
    layer(torch.ones(1, 40).half())
    layer.load_state_dict({**FORMAT.pack(second), "bias": torch.ones(24)})
    assert same_bits(layer.dequantized(), dequantized(second))
    assert "scheme=trellis2-hyb, rotation=hadamard, bias=True" in repr(layer)


def test_a_stored_table_is_the_one_that_is_used() -> None:
    weight = random_weight("trellis2-hyb", (24, 40))
    packed = FORMAT.pack(weight)
    packed["table"] = -packed["table"]
    layer = QuantizedLinear(layout_of(weight), tensors=packed)
    layer.check()
    assert torch.equal(layer.dequantized(), -dequantized(weight))


# --- version 1, byte for byte


@pytest.mark.parametrize("scheme", ["trellis2", "lattice2", "int3-channel"])
def test_vectors_in_place_of_signs(scheme: str) -> None:
    """As tuning leaves them: kept to the last bit, named in the header, and what the layer computes with."""
    plain = random_weight(scheme, shape_for(scheme, "hadamard"), rotation="hadamard")
    assert isinstance(plain.rotation, Rotation)
    out, into = ((signs * torch.linspace(0.7, 1.3, len(signs))).half() for signs in (plain.rotation.signs_out, plain.rotation.signs_in))
    tuned = replace(plain, rotation=replace(plain.rotation, signs_out=out, signs_in=into))
    packed = FORMAT.pack(tuned)
    again = FORMAT.unpack(packed, parse_scheme(scheme), tuned.shape)
    assert isinstance(again.rotation, Rotation)
    assert torch.equal(again.rotation.signs_out, out)
    assert torch.equal(dequantized(again), dequantized(tuned))
    W = dequantized(plain) * (out / plain.rotation.signs_out)[:, None] * (into / plain.rotation.signs_in)
    torch.testing.assert_close(dequantized(tuned), W, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(plain.rotation.restore_weight(plain.rotation.rotate_weight(W)), W, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tuned.rotation.restore_weight(tuned.rotation.rotate_weight(W)), W, rtol=1e-4, atol=1e-5)
    config = FORMAT.config({"a": plain, "b": tuned}, [])
    assert [group.get("vectors") for group in config["groups"]] == [None, True]
    layout = parse_config(config)["b"]
    assert layout == layout_of(tuned)
    x = torch.randn(3, tuned.shape[1])
    layer = QuantizedLinear(layout, tensors=packed)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dequantized(tuned)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="zeros, NaN"):
        check_tensors({**packed, "hadamard_in": torch.zeros_like(packed["hadamard_in"])}, layout)
    with pytest.raises(ModelError, match="neither true nor false"):
        parse_config({**config, "groups": [{**config["groups"][1], "vectors": 1}]})
    with pytest.raises(ModelError, match="vectors without a rotation"):
        parse_config({**config, "groups": [{**config["groups"][1], "rotation": None}]})


def golden_weights() -> dict[str, RoundedWeight]:
    """Every scheme, and every rotation once; float16 scales."""
    weights = {scheme: random_weight(scheme, shape_for(scheme), dtype=torch.float16) for scheme in SCHEMES}
    weights["int4-g32/hadamard"] = random_weight("int4-g32", (20, 96), rotation="hadamard")
    weights["lattice2/hadamard128"] = random_weight("lattice2", (128, 128), rotation="hadamard128")
    return weights


def digests(weight: RoundedWeight) -> list[str]:
    """Of the codes, of what they stand for, and of the signs: what must be equal on all machines (the sums of a rotation need not be)."""
    parts = [weight.codes, dequantized(replace(weight, rotation=None))]
    if weight.rotation is not None:
        assert isinstance(weight.rotation, Rotation)
        parts += [weight.rotation.signs_out, weight.rotation.signs_in]
    return [hashlib.sha256(part.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16] for part in parts]


LATER = {"q5_0", "iq4_xs"}
"""Schemes that came after the file."""


def test_version_1_is_read_as_it_always_was() -> None:
    """No committed byte may change: files of version 1 are with users."""
    stored = load_file(GOLDEN.with_suffix(".safetensors"))
    record = json.loads(GOLDEN.with_suffix(".json").read_text(encoding="utf-8"))
    layouts = parse_config(record["quantization_config"])
    assert layouts.keys() == record["sha256"].keys()
    assert {layout.scheme for layout in layouts.values()} == {*SCHEMES, "int4-g32"} - LATER
    for name, layout in layouts.items():
        tensors = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.rpartition(".")[0] == name}
        weight = FORMAT.unpack(tensors, layout.grid, layout.shape)
        assert digests(weight) == record["sha256"][name]
        assert same_bits(QuantizedLinear(layout, tensors=tensors).dequantized(), dequantized(weight))
        rewritten = FORMAT.pack(weight)
        assert all(same_bits(rewritten[key], tensors[key]) for key in tensors)


def write_golden() -> None:
    weights = golden_weights()
    tensors = {f"{name}.{key}": tensor for name, weight in weights.items() for key, tensor in FORMAT.pack(weight).items()}
    save_file(tensors, GOLDEN.with_suffix(".safetensors"), metadata={"format": "pt"})
    record = {
        "quantization_config": FORMAT.config(weights, []),
        "sha256": {name: digests(weight) for name, weight in weights.items()},
    }
    GOLDEN.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
