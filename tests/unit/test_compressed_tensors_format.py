"""The `pack-quantized` format: pure inverses, exact sizes, malformed tensors refused."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig

from roundel.errors import InputError, ModelError
from roundel.formats.compressed_tensors import config, pack, packed_bytes, unpack
from roundel.grids import Uniform, parse_scheme
from roundel.types import RoundedWeight

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
    back = unpack(pack(weight, grid), grid)
    assert back.codes.dtype == torch.int8
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales["scale"], weight.scales["scale"])
    assert back.shape == shape


@every_scheme
def test_the_other_projects_reader_finds_the_codes(grid: Uniform) -> None:
    weight = rounded(grid, (3, 40))
    tensors = pack(weight, grid)
    shape = torch.Size(tensors["weight_shape"].tolist())
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], grid.bits, shape), weight.codes)


@every_scheme
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_bytes_are_exact(grid: Uniform, shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = pack(rounded(grid, shape, dtype), grid)
    assert packed_bytes(shape, grid, dtype) == sum(t.numel() * t.element_size() for t in tensors.values())


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
    tensors = pack(rounded(grid, (3, 40)), grid) | {name: value}
    with pytest.raises(ModelError, match="is no int4-g8 weight"):
        unpack(tensors, grid)


def test_a_width_that_the_group_does_not_divide_is_refused() -> None:
    tensors = pack(rounded(parse_scheme("int4-g8"), (3, 40)), parse_scheme("int4-g8"))
    with pytest.raises(InputError):
        unpack(tensors, parse_scheme("int4-g16"))


@every_scheme
def test_the_configuration_is_valid_for_the_other_project(grid: Uniform) -> None:
    read = QuantizationConfig.model_validate(config({"b": grid}, ["lm_head", "a"]))
    weights = read.config_groups["group_0"].weights
    assert weights is not None
    assert (weights.num_bits, weights.symmetric, weights.group_size) == (grid.bits, True, None if grid.group == "channel" else grid.group)
    assert weights.strategy == ("channel" if grid.group == "channel" else "group")
    assert read.ignore == ["a", "lm_head"]
    assert read.format == "pack-quantized"


def test_several_grids_are_several_groups_with_their_own_linears() -> None:
    grids = {f"layers.{k}": parse_scheme(scheme) for k, scheme in enumerate(["int3-g8", "int4-g8", "int3-g8"])}
    read = QuantizationConfig.model_validate(config(grids, []))
    found = {target: group.weights.num_bits for group in read.config_groups.values() for target in group.targets}
    assert found == {"layers.0": 3, "layers.1": 4, "layers.2": 3}
