"""AWQ: the bytes against a reader that shares no code with the writer, and against the one for originals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.errors import ModelError, SchemeError
from roundel.formats.awq import Awq
from roundel.grids import parse_scheme
from roundel.models.packed import METHODS
from roundel.rotation import Rotation
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

FORMAT = Awq()
every_scheme = pytest.mark.parametrize("scheme", ["int4-g32", "int4-g64-asym", "int4-g128-asym"])


def rounded(scheme: str, shape: tuple[int, int] = (16, 128), seed: int = 0) -> RoundedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = shape[0], shape[1] // int(scheme.split("-")[1][1:])
    codes = torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    scales = {"scale": (0.02 * torch.randn(groups, generator=generator)).half()}
    if scheme.endswith("asym"):
        scales = {"scale": scales["scale"].abs(), "zero_point": torch.randint(-8, 8, groups, generator=generator).to(torch.int8)}
    return RoundedWeight(scheme=scheme, codes=codes, scales=scales, shape=shape)


def read(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """`(d_out, d_in)` float32: AutoAWQ's kernels take nibbles 0, 4, 1, 5, 2, 6, 3, 7 of a word for its outputs in order."""

    def numbers(words: np.ndarray) -> np.ndarray:
        nibbles = [words.view(np.uint32) >> np.uint32(4 * place) & 15 for place in (0, 4, 1, 5, 2, 6, 3, 7)]
        return np.stack(nibbles, axis=-1).reshape(len(words), -1).astype(np.float32)

    u, z, scales = numbers(tensors["qweight"].numpy()), numbers(tensors["qzeros"].numpy()), tensors["scales"].numpy().astype(np.float32)
    group = len(u) // len(z)
    return ((u - z.repeat(group, axis=0)) * scales.repeat(group, axis=0)).T


@every_scheme
@given(down=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_other_readers_find_the_very_weight(scheme: str, down: int, groups: int, seed: int) -> None:
    grid = parse_scheme(scheme)
    original = rounded(scheme, (8 * down, groups * grid.group), seed)
    tensors = FORMAT.pack(original)
    assert np.array_equal(read(tensors), dequantized(original).numpy())
    assert torch.equal(METHODS["awq"].decode(tensors, {"bits": 4}), dequantized(original))
    back = FORMAT.unpack(tensors, grid, original.shape)
    assert torch.equal(back.codes, original.codes)
    assert back.scales.keys() == original.scales.keys()
    assert all(torch.equal(back.scales[name], scale) for name, scale in original.scales.items())
    assert sum(tensor.nbytes for tensor in tensors.values()) == FORMAT.packed_bytes(original.shape, grid, torch.float16, None)


@pytest.mark.parametrize("scheme", ["int3-g32", "int8-g32", "int4-channel", "int4-g16", "int4-g32-affine", "q4_0", "nvfp4"])
def test_what_it_has_no_place_for_is_refused(scheme: str) -> None:
    with pytest.raises(SchemeError, match="awq cannot hold"):
        FORMAT.check(parse_scheme(scheme), None)


def test_shapes_rotations_and_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SchemeError, match="words of 8"):
        FORMAT.check_shape(parse_scheme("int4-g32"), 12, 64)
    with pytest.raises(SchemeError, match="rotate none"):
        FORMAT.check(parse_scheme("int4-g32"), "hadamard")
    given = rounded("int4-g32")
    turned = RoundedWeight(
        scheme=given.scheme,
        codes=given.codes,
        scales=given.scales,
        shape=given.shape,
        rotation=Rotation.draw(16, 128, kind="hadamard", seed=0),
    )
    with pytest.raises(SchemeError, match="rotate none"):
        FORMAT.pack(turned)
    fine = RoundedWeight(scheme="int4-g32", codes=given.codes, scales={"scale": given.scales["scale"].float() * 1.0001}, shape=given.shape)
    with pytest.raises(SchemeError, match="beyond float16"):
        FORMAT.pack(fine)


def test_damaged_tensors_are_refused() -> None:
    tensors = FORMAT.pack(rounded("int4-g32"))
    for changed, reason in (
        ({"scales": torch.full_like(tensors["scales"], float("inf"))}, "NaN or infinite"),
        ({"qzeros": torch.zeros_like(tensors["qzeros"])}, "not all 8"),
        ({"qweight": tensors["qweight"][:, :1]}, "expected"),
    ):
        with pytest.raises(ModelError, match=reason):
            FORMAT.unpack({**tensors, **changed}, parse_scheme("int4-g32"), (16, 128))


def test_the_config_lists_what_is_not_quantized() -> None:
    weights = {f"model.layers.{k}.q_proj": rounded("int4-g32", seed=k) for k in range(2)}
    config = FORMAT.config(weights, ["lm_head", "model.layers.1.gate"])
    assert (config["bits"], config["group_size"], config["version"]) == (4, 32, "gemm")
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.1.gate"]
    with pytest.raises(SchemeError, match=r"readers would take model\.layers\.1\.q_proj"):
        FORMAT.config(weights, ["model.layers.1.q"])
    with pytest.raises(SchemeError, match="one scheme"):
        FORMAT.config({**weights, "other": rounded("int4-g64-asym")}, [])
