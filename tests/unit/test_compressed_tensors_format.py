"""The layouts of compressed-tensors: pure inverses, exact sizes, malformed tensors refused, and the other project's own code."""

import dataclasses

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.errors import InputError, ModelError, SchemeError
from roundel.formats.compressed_tensors import CompressedTensors, share_tensor_scale
from roundel.grids import ScalarGrid, Uniform, parse_scheme
from roundel.grids.inputs import CALIBRATED
from roundel.rotation import Rotation
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

FORMAT = CompressedTensors()
SCHEMES = [f"int{bits}-{kind}" for bits in range(2, 9) for kind in ("g8", "channel")]
every_scheme = pytest.mark.parametrize("grid", [parse_scheme(name) for name in SCHEMES], ids=SCHEMES)
SHAPES = [(1, 8), (3, 40), (6, 24)]


def rounded(grid: Uniform, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> RoundedWeight:
    generator = torch.Generator().manual_seed(0)
    low, high = grid.code_range
    codes = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)
    scales = torch.randn(grid.scale_shape(*shape), generator=generator).to(dtype)
    return RoundedWeight(scheme=grid.name, codes=codes, scales={"scale": scales}, shape=shape)


@every_scheme
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_inverts_pack(grid: Uniform, shape: tuple[int, int]) -> None:
    weight = rounded(grid, shape)
    back = FORMAT.unpack(FORMAT.pack(weight), grid, shape)
    assert back.codes.dtype == torch.int8
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales["scale"], weight.scales["scale"])
    assert back.shape == shape


@every_scheme
def test_the_other_projects_reader_finds_the_codes(grid: Uniform) -> None:
    weight = rounded(grid, (3, 40))
    tensors = FORMAT.pack(weight)
    shape = torch.Size(tensors["weight_shape"].tolist())
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], grid.bits, shape), weight.codes)


@every_scheme
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_bytes_are_exact(grid: Uniform, shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = FORMAT.pack(rounded(grid, shape, dtype))
    assert FORMAT.packed_bytes(shape, grid, dtype, None) == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_shape", torch.tensor([3, 48])),
        ("weight_shape", torch.tensor([4, 40])),
        ("weight_shape", torch.tensor([40, 3])),
        ("weight_shape", torch.tensor([-3, 40])),
        ("weight_shape", torch.tensor([0, 0])),
        ("weight_shape", torch.tensor([3])),
        ("weight_shape", torch.tensor([1, 3, 40])),
        ("weight_packed", torch.zeros(3, 6, dtype=torch.int32)),
        ("weight_packed", torch.zeros(2, 5, dtype=torch.int32)),
        ("weight_packed", torch.zeros(15, dtype=torch.int32)),
        ("weight_scale", torch.ones(3, 4)),
        ("weight_scale", torch.ones(1, 5)),
        ("weight_scale", torch.ones(3)),
    ],
    ids=str,
)
def test_tensors_that_contradict_each_other_are_refused(name: str, value: torch.Tensor) -> None:
    grid = parse_scheme("int4-g8")
    tensors = FORMAT.pack(rounded(grid, (3, 40))) | {name: value}
    with pytest.raises(ModelError):
        FORMAT.unpack(tensors, grid, (3, 40))


def test_a_width_that_the_group_does_not_divide_is_refused() -> None:
    tensors = FORMAT.pack(rounded(parse_scheme("int4-g8"), (3, 40)))
    with pytest.raises(InputError):
        FORMAT.unpack(tensors, parse_scheme("int4-g16"), (3, 40))


@every_scheme
def test_the_configuration_is_valid_for_the_other_project(grid: Uniform) -> None:
    read = QuantizationConfig.model_validate(FORMAT.config({"b": rounded(grid, (3, 40))}, ["lm_head", "a"]))
    weights = read.config_groups["group_0"].weights
    assert weights is not None
    assert (weights.num_bits, weights.symmetric, weights.group_size) == (grid.bits, True, None if grid.group == "channel" else grid.group)
    assert weights.strategy == ("channel" if grid.group == "channel" else "group")
    assert read.ignore == ["a", "lm_head"]
    assert read.format == "pack-quantized"


def test_several_grids_are_several_groups_with_their_own_linears() -> None:
    schemes = ["int3-g8", "int4-g8", "int3-g8"]
    weights = {f"layers.{k}": rounded(parse_scheme(scheme), (3, 40)) for k, scheme in enumerate(schemes)}
    read = QuantizationConfig.model_validate(FORMAT.config(weights, []))
    found = {target: group.weights.num_bits for group in read.config_groups.values() for target in group.targets}
    assert found == {"layers.0": 3, "layers.1": 4, "layers.2": 3}


INTEGERS = [f"int{bits}-{kind}" for bits in range(2, 9) for kind in ("g16", "channel", "g16-asym", "channel-asym")]
ROUNDED_INPUTS = ["int8-channel-a8", "int8-tensor-a8", "fp8-a8", "fp8-tensor-a8", "nvfp4-a4"]
ALL = [*INTEGERS, "int4-tensor", "nvfp4", "mxfp4", "fp8", "fp8-tensor", *ROUNDED_INPUTS]
every_kind = pytest.mark.parametrize("scheme", ALL)
FORMATS = {
    **dict.fromkeys(["nvfp4", "nvfp4-a4"], "nvfp4-pack-quantized"),
    "mxfp4": "mxfp4-pack-quantized",
    **dict.fromkeys(["fp8", "fp8-tensor", "fp8-a8", "fp8-tensor-a8"], "float-quantized"),
    **dict.fromkeys(["int8-channel-a8", "int8-tensor-a8"], "int-quantized"),
}


def drawn(scheme: str, shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> RoundedWeight:
    """Any codes, with scales of the grid's own search."""
    grid, generator = parse_scheme(scheme), torch.Generator().manual_seed(seed)
    assert isinstance(grid, ScalarGrid)
    low, high = grid.code_range
    codes = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)
    scales = grid.fit_scales(torch.randn(shape, generator=generator) + 0.3, torch.ones(shape[1]), dtype)
    if grid.inputs == "nvfp4":
        scales[CALIBRATED] = torch.full((1, 1), 123.0)
    return RoundedWeight(scheme=scheme, codes=codes, scales=scales, shape=shape)


def decompressed(scheme: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """By compressed-tensors' own code, with scales of free type in `dtype`, as Transformers has them in a model of that type."""
    args = QuantizationConfig.model_validate(FORMAT.config({"a": drawn(scheme, (4, 32))}, [])).config_groups["group_0"]
    of_free_type = scheme not in {"nvfp4", "nvfp4-a4", "mxfp4"}
    cast = {name: tensor.to(dtype) if name == "weight_scale" and of_free_type else tensor for name, tensor in tensors.items()}
    return BaseCompressor.get_value_from_registry(args.format).decompress(cast, args)["weight"]


@every_kind
@given(rows=st.integers(1, 40), groups=st.integers(1, 3), seed=st.integers(0, 1000), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
@settings(max_examples=3, deadline=None)
def test_every_kind_is_read_back_and_counted(scheme: str, rows: int, groups: int, seed: int, dtype: torch.dtype) -> None:
    grid, shape = parse_scheme(scheme), (rows, 32 * groups)
    original = drawn(scheme, shape, seed, dtype)
    tensors = FORMAT.pack(original)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert FORMAT.packed_bytes(shape, grid, dtype, None) == sum(t.numel() * t.element_size() for t in tensors.values())
    back = FORMAT.unpack(tensors, grid, shape)
    assert (back.scheme, back.shape, back.rotation) == (scheme, shape, None)
    assert torch.equal(back.codes, original.codes)
    assert back.scales.keys() == original.scales.keys()
    for name, scale in original.scales.items():
        assert back.scales[name].dtype == scale.dtype
        assert torch.equal(back.scales[name].view(torch.uint8), scale.view(torch.uint8)), name


@every_kind
def test_the_other_projects_decompressor_finds_the_very_weight(scheme: str) -> None:
    for shape in ((33, 64), (1, 32), (64, 96)):
        original = drawn(scheme, shape, seed=1)
        found = decompressed(scheme, FORMAT.pack(original))
        assert found.dtype == (torch.bfloat16 if scheme in {"nvfp4", "nvfp4-a4", "mxfp4"} else torch.float32)
        assert torch.equal(found.float(), dequantized(original))


@every_kind
def test_tensors_are_those_that_the_other_project_writes(scheme: str) -> None:
    """Names, shapes, types and, of exactly representable weights, bytes."""
    original = drawn(scheme, (33, 64), seed=2)
    tensors = FORMAT.pack(original)
    args = QuantizationConfig.model_validate(FORMAT.config({"a": original}, [])).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(args.format)
    dense = {"weight": dequantized(original), "weight_scale": tensors["weight_scale"].float()}
    if scheme == "mxfp4":
        dense["weight_scale"] = torch.exp2(tensors["weight_scale"].float() - 127)
    if scheme in {"nvfp4", "nvfp4-a4"}:
        dense["weight_global_scale"] = tensors["weight_global_scale"]
    if scheme.endswith("-asym"):
        dense["weight_zero_point"] = original.scales["zero_point"]
    theirs = compressor.compress(dense, args)
    assert theirs.keys() == tensors.keys() - {CALIBRATED}  # which is not the compressor's
    for name, tensor in theirs.items():
        if name == "weight_scale" and scheme not in {"nvfp4", "nvfp4-a4", "mxfp4"}:
            assert torch.equal(tensor, tensors[name].float())
            continue
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape), name
        pair = [each.view(torch.uint8) if each.dtype == torch.float8_e4m3fn else each for each in (tensor, tensors[name])]
        assert torch.equal(*pair), name
    assert infer_module_format(torch.nn.Linear, args).value == FORMATS.get(scheme, "pack-quantized") or scheme.startswith("fp8")


def test_all_byte_values_of_the_small_floats() -> None:
    """Every level with every scale that the grids have, in both readers."""
    for scheme, scales in (("mxfp4", torch.arange(1, 253, dtype=torch.uint8)), ("nvfp4", torch.arange(1, 127, dtype=torch.uint8))):
        grid = parse_scheme(scheme)
        assert isinstance(grid, ScalarGrid)
        width = 32 if scheme == "mxfp4" else 16
        codes = (torch.arange(len(scales) * width).view(-1, width) % 15 - 7).to(torch.int8)
        stored = {"scale": scales.view(torch.float8_e4m3fn if scheme == "nvfp4" else torch.uint8)[:, None]}
        if scheme in {"nvfp4", "nvfp4-a4"}:
            stored["tensor_scale"] = torch.full((1, 1), 2.0**-13)
        original = RoundedWeight(scheme=scheme, codes=codes, scales=stored, shape=(len(scales), width))
        assert torch.equal(decompressed(scheme, FORMAT.pack(original)).float(), dequantized(original))
    numbers = torch.arange(-126, 127).to(torch.int8)[None]
    original = RoundedWeight(scheme="fp8", codes=numbers, scales={"scale": torch.full((1, 1), 0.375)}, shape=(1, 253))
    assert torch.equal(decompressed("fp8", FORMAT.pack(original)), dequantized(original))
    assert torch.equal(FORMAT.unpack(FORMAT.pack(original), parse_scheme("fp8"), (1, 253)).codes, numbers)


@every_kind
def test_every_configuration_is_valid_for_the_other_project(scheme: str) -> None:
    config = FORMAT.config({"layers.0.b": drawn(scheme, (4, 32))}, ["lm_head", "a"])
    read = QuantizationConfig.model_validate(config)
    group = read.config_groups["group_0"]
    assert group.targets == ["Linear"]
    assert read.format == group.format == FORMATS.get(scheme, "pack-quantized")
    assert read.ignore == ["a", "lm_head"]
    assert group.weights.symmetric == ("asym" not in scheme)
    assert group.weights.num_bits == parse_scheme(scheme).bits


def test_several_kinds_are_mixed_precision() -> None:
    weights = {f"layers.{k}": drawn(scheme, (4, 32)) for k, scheme in enumerate(["int3-g8", "nvfp4", "fp8", "int3-g8", "int4-g8-asym"])}
    config = FORMAT.config(weights, [])
    assert config["format"] == "mixed-precision"
    found = {target: group.format for group in QuantizationConfig.model_validate(config).config_groups.values() for target in group.targets}
    kinds = ["pack-quantized", "nvfp4-pack-quantized", "float-quantized", "pack-quantized", "pack-quantized"]
    assert found == {f"layers.{k}": kind for k, kind in enumerate(kinds)}


@pytest.mark.parametrize(
    ("scheme", "rotation", "reason"),
    [
        ("int4-g128", "hadamard", "cannot hold int4-g128, rotated .*rotate none"),
        ("trellis2", None, "cannot hold trellis2: .*try int2-g128"),
        ("q6_k", None, "cannot hold q6_k: .*try int6-g128"),
        ("trellis1", None, "try int2-g128"),
    ],
)
def test_what_its_engines_cannot_read_is_refused_with_the_nearest_choice(scheme: str, rotation: str | None, reason: str) -> None:
    with pytest.raises(SchemeError, match=reason):
        FORMAT.check(parse_scheme(scheme), rotation)


def test_rotated_weights_are_not_packed() -> None:
    rotated = RoundedWeight(**{**vars(drawn("int4-g16", (8, 32))), "rotation": Rotation.draw(8, 32, "hadamard", 0)})
    with pytest.raises(SchemeError, match="rotated"):
        FORMAT.pack(rotated)


NAN8 = torch.full((8, 2), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("scheme", "name", "value"),
    [
        ("int4-g16", "weight_shape", torch.tensor([8, 48])),
        ("int4-g16", "weight_shape", torch.tensor([8])),
        ("int4-g16", "weight_packed", torch.zeros(8, 5, dtype=torch.int32)),
        ("int4-g16", "weight_packed", torch.zeros(8, 4)),
        ("int4-g16", "weight_scale", torch.ones(8, 1)),
        ("int4-g16", "weight_scale", torch.ones(8, 2, dtype=torch.int32)),
        ("int4-g16", "weight_scale", torch.full((8, 2), torch.nan)),
        ("int4-g16", "weight_zero_point", torch.zeros(1, 2, dtype=torch.int32)),
        ("int4-g16-asym", "weight_zero_point", torch.zeros(8, 2, dtype=torch.int8)),
        ("int4-g16-asym", "weight_zero_point", torch.zeros(2, 2, dtype=torch.int32)),
        ("int4-tensor", "weight_scale", torch.arange(1.0, 9.0)[:, None]),
        ("nvfp4", "weight_packed", torch.zeros(8, 8, dtype=torch.uint8)),
        ("nvfp4", "weight_scale", torch.ones(8, 2)),
        ("nvfp4", "weight_scale", NAN8),
        ("nvfp4", "weight_global_scale", torch.tensor([3.0])),
        ("nvfp4", "weight_global_scale", torch.tensor([0.0])),
        ("nvfp4", "weight_global_scale", torch.tensor([-2.0])),
        ("nvfp4", "weight_global_scale", torch.tensor([torch.nan])),
        ("nvfp4", "weight_global_scale", torch.tensor(2.0)),
        ("mxfp4", "weight_scale", torch.full((8, 1), 255, dtype=torch.uint8)),
        ("mxfp4", "weight_scale", torch.ones(8, 2, dtype=torch.uint8)),
        ("fp8", "weight", torch.zeros(8, 32)),
        ("fp8", "weight", torch.full((8, 32), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        ("fp8", "weight_scale", torch.ones(1)),
        ("fp8", "weight_scale", torch.full((8, 1), torch.inf)),
        ("fp8-tensor", "weight_scale", torch.ones(8, 1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_tensors_of_every_kind_are_refused(scheme: str, name: str, value: torch.Tensor) -> None:
    with pytest.raises(ModelError):
        FORMAT.unpack(FORMAT.pack(drawn(scheme, (8, 32))) | {name: value}, parse_scheme(scheme), (8, 32))


@every_kind
def test_missing_tensors_are_refused(scheme: str) -> None:
    for name in FORMAT.pack(drawn(scheme, (8, 32))):
        tensors = FORMAT.pack(drawn(scheme, (8, 32)))
        del tensors[name]
        with pytest.raises(ModelError, match=rf"has .*{name}"):
            FORMAT.unpack(tensors, parse_scheme(scheme), (8, 32))


# --- one tensor scale for linears that are run as one


def test_shared_tensor_scales_change_no_weight() -> None:
    parts = {name: drawn("nvfp4", (16, 64), seed) for seed, name in enumerate("qkv")}
    for power, name in ((3, "k"), (-4, "v")):
        scales = parts[name].scales
        parts[name] = dataclasses.replace(parts[name], scales={**scales, "tensor_scale": scales["tensor_scale"] * 2.0**power})
    shared = share_tensor_scale(parts)
    assert {part.scales["tensor_scale"].item() for part in shared.values()} == {parts["k"].scales["tensor_scale"].item()}
    for name, part in shared.items():
        assert torch.equal(dequantized(part), dequantized(parts[name]))
        assert torch.equal(part.codes, parts[name].codes)
    assert len({FORMAT.pack(part)["weight_global_scale"].item() for part in shared.values()}) == 1


def test_scales_that_become_too_small_are_rounded_but_never_to_zero() -> None:
    parts = {name: drawn("nvfp4", (16, 64), seed) for seed, name in enumerate("ab")}
    parts["b"] = dataclasses.replace(parts["b"], scales={**parts["b"].scales, "tensor_scale": parts["b"].scales["tensor_scale"] * 2.0**30})
    small = share_tensor_scale(parts)["a"]
    assert (small.scales["scale"].float() == 2.0**-9).all()


@given(size=st.floats(1e-30, 1e30), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_tensor_scales_are_powers_of_two_and_no_group_scale_is_cut_off(size: float, seed: int) -> None:
    W = size * torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    scales = parse_scheme("nvfp4").fit_scales(W, torch.ones(64), torch.bfloat16)
    mantissa, _ = torch.frexp(scales["tensor_scale"])
    assert (mantissa == 0.5).all()
    assert torch.isfinite(1 / scales["tensor_scale"]).all()
    largest = W.abs().max().item() / scales["tensor_scale"].item()
    assert 4 * 224 < largest <= 4 * 448 * (1 + 1e-6)  # a fourth of it is a group scale, in the upper octave
