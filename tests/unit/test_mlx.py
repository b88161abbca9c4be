"""MLX: the bytes against a reader that shares no code with the package, written from the format's description; whole directories."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.errors import ModelError, SchemeError
from roundel.formats.mlx import Mlx
from roundel.grids import parse_scheme
from roundel.rotation import Rotation
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

FORMAT = Mlx()
SCHEMES = [
    f"int{bits}-g{group}{kind}" for bits, group in ((2, 32), (3, 64), (4, 128), (5, 32), (6, 64), (8, 32)) for kind in ("", "-affine")
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def rounded(scheme: str, shape: tuple[int, int] = (6, 128), seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> RoundedWeight:
    grid, generator = parse_scheme(scheme), torch.Generator().manual_seed(seed)
    codes = torch.randint(*(end + add for end, add in zip(grid.code_range, (0, 1), strict=True)), shape, generator=generator).to(torch.int8)
    groups = shape[0], shape[1] // grid.group
    scales = {"scale": (0.02 * torch.randn(groups, generator=generator)).to(dtype)}
    if scheme.endswith("affine"):
        scales = {"scale": scales["scale"].abs(), "bias": (0.1 * torch.randn(groups, generator=generator)).to(dtype)}
    return RoundedWeight(scheme=scheme, codes=codes, scales=scales, shape=shape)


def read(tensors: dict[str, torch.Tensor], bits: int, group: int) -> np.ndarray:
    """`(d_out, d_in)` float32, one bit after the other."""
    words = tensors["weight"].numpy()
    columns = words.shape[1] * 32 // bits
    stream = (words[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(len(words), -1)[:, : columns * bits]
    u = (stream.reshape(len(words), columns, bits) << np.arange(bits)).sum(-1).astype(np.float32)
    scales, biases = (tensors[name].float().numpy().repeat(group, axis=1) for name in ("scales", "biases"))
    return u * scales + biases


@every_scheme
@given(rows=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_the_other_reader_finds_the_weight(scheme: str, rows: int, groups: int, seed: int) -> None:
    grid = parse_scheme(scheme)
    original = rounded(scheme, (rows, groups * grid.group), seed)
    tensors = FORMAT.pack(original)
    found, expected = read(tensors, grid.bits, grid.group), dequantized(original).numpy()
    if scheme.endswith("affine"):
        assert np.array_equal(found, expected)
    else:  # (u - 2^(b-1)) s, of which the other sum is rounded once more
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max(initial=1e-9) * 2**grid.bits)
    back = FORMAT.unpack(tensors, grid, original.shape)
    assert torch.equal(back.codes, original.codes)
    assert {name: scale.dtype for name, scale in back.scales.items()} == {name: scale.dtype for name, scale in original.scales.items()}
    assert all(torch.equal(back.scales[name], scale) for name, scale in original.scales.items())
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size == FORMAT.packed_bytes(original.shape, grid, torch.bfloat16, None)


@pytest.mark.parametrize("scheme", ["int7-g32", "int4-g16", "int4-g256", "int4-channel", "int4-g32-asym", "int7-g32-affine", "q4_k", "fp8"])
def test_what_it_has_no_place_for_is_refused(scheme: str) -> None:
    with pytest.raises(SchemeError, match="mlx cannot hold"):
        FORMAT.check(parse_scheme(scheme), None)


def test_rotations_are_refused() -> None:
    with pytest.raises(SchemeError, match="rotate none"):
        FORMAT.check(parse_scheme("int4-g32"), "hadamard")
    turned = rounded("int4-g32")
    rotation = Rotation.draw(*turned.shape, kind="hadamard", seed=0)
    with pytest.raises(SchemeError, match="rotate none"):
        FORMAT.pack(RoundedWeight(scheme=turned.scheme, codes=turned.codes, scales=turned.scales, shape=turned.shape, rotation=rotation))


def test_scales_that_float16_has_no_bias_for_are_refused() -> None:
    large = rounded("int8-g32", dtype=torch.float16)
    large.scales["scale"].fill_(1000.0)
    with pytest.raises(SchemeError, match="beyond torch"):
        FORMAT.pack(large)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("biases", torch.zeros(6, 4, dtype=torch.bfloat16), "symmetric"),
        ("scales", torch.full((6, 4), float("nan"), dtype=torch.bfloat16), "NaN"),
        ("weight", torch.zeros(6, 15, dtype=torch.int32).view(torch.uint32), "expected"),
    ],
)
def test_damaged_tensors_are_refused(name: str, value: torch.Tensor, reason: str) -> None:
    tensors = FORMAT.pack(rounded("int4-g32"))
    with pytest.raises(ModelError, match=reason):
        FORMAT.unpack({**tensors, name: value}, parse_scheme("int4-g32"), (6, 128))


def test_the_section_names_what_is_not_like_the_most() -> None:
    weights = {f"layers.{k}": rounded(scheme) for k, scheme in enumerate(["int4-g32", "int3-g32", "int4-g32-affine", "int6-g64"])}
    assert FORMAT.config(weights, ["lm_head"]) == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "layers.1": {"group_size": 32, "bits": 3},
        "layers.3": {"group_size": 64, "bits": 6},
    }
    assert json.loads(json.dumps(FORMAT.config(weights, [])))["bits"] == 4
