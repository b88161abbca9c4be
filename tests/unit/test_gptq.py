"""GPTQ: the bytes against a reader that shares no code with the package, written from the format's description."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.errors import ModelError, SchemeError
from roundel.formats.gptq import Gptq
from roundel.grids import Uniform, parse_scheme
from roundel.rotation import Rotation
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

FORMAT = Gptq()
SCHEMES = ["int4-g8", "int4-channel", "int4-tensor", "int8-g8", "int8-channel", "int8-tensor"]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def grid_of(scheme: str) -> Uniform:
    grid = parse_scheme(scheme)
    assert isinstance(grid, Uniform)
    return grid


def rounded(scheme: str, shape: tuple[int, int] = (16, 24), seed: int = 0, dtype: torch.dtype = torch.float16) -> RoundedWeight:
    grid, generator = grid_of(scheme), torch.Generator().manual_seed(seed)
    low, high = grid.code_range
    codes = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)
    scales = (0.02 * torch.randn(grid.scale_shape(*shape), generator=generator)).to(dtype)
    return RoundedWeight(scheme=scheme, codes=codes, scales={"scale": scales}, shape=shape)


def read(tensors: dict[str, torch.Tensor], bits: int) -> np.ndarray:
    """`(d_out, d_in)` float32: `w = (q - z) s`, `z` stored less 1, everything transposed; one code after the other out of its word."""
    words, zeros, scales, group = (tensors[name].numpy() for name in ("qweight", "qzeros", "scales", "g_idx"))
    inside, mask = 32 // bits, 2**bits - 1
    k, n = np.arange(words.shape[0] * inside), np.arange(words.shape[1])
    q = (words.view(np.uint32)[k // inside] >> (k % inside * bits).astype(np.uint32)[:, None]) & mask
    z = ((zeros.view(np.uint32)[:, n // inside] >> (n % inside * bits).astype(np.uint32)) & mask) + 1
    return ((q.astype(np.float32) - z.astype(np.float32)[group]) * scales.astype(np.float32)[group]).T


@every_scheme
@given(down=st.integers(1, 4), across=st.integers(1, 5), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_other_reader_finds_the_very_weight(scheme: str, down: int, across: int, seed: int) -> None:
    original = rounded(scheme, (8 * down, 8 * across), seed)
    tensors = FORMAT.pack(original)
    assert np.array_equal(read(tensors, grid_of(scheme).width), dequantized(original).numpy())
    back = FORMAT.unpack(tensors, grid_of(scheme), original.shape)
    assert (back.scheme, back.shape, back.rotation) == (scheme, original.shape, None)
    assert torch.equal(back.codes, original.codes)
    assert back.codes.dtype == torch.int8
    assert torch.equal(back.scales["scale"], original.scales["scale"])
    assert back.scales["scale"].dtype == torch.float16
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert FORMAT.packed_bytes(original.shape, grid_of(scheme), torch.bfloat16, None) == stored


@pytest.mark.parametrize(("scheme", "zeros"), [("int4-g8", 0x77777777), ("int8-channel", 0x7F7F7F7F)])
def test_tensors_are_those_of_the_description(scheme: str, zeros: int) -> None:
    grid = grid_of(scheme)
    tensors = FORMAT.pack(rounded(scheme))
    groups = 3 if grid.group == 8 else 1
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (24 * grid.width // 32, 16)),
        "qzeros": (torch.int32, (groups, 16 * grid.width // 32)),
        "scales": (torch.float16, (groups, 16)),
        "g_idx": (torch.int32, (24,)),
    }
    assert (tensors["qzeros"] == zeros).all()
    assert tensors["g_idx"].tolist() == [k // (24 // groups) for k in range(24)]


def test_a_negative_scale_is_kept_with_the_code_that_has_no_opposite() -> None:
    codes = torch.full((8, 8), -8, dtype=torch.int8)
    weight = RoundedWeight(
        scheme="int4-channel", codes=codes, scales={"scale": torch.full((8, 1), -0.5, dtype=torch.float16)}, shape=(8, 8)
    )
    tensors = FORMAT.pack(weight)
    assert (tensors["scales"] == -0.5).all()
    assert (read(tensors, 4) == 4.0).all()


def test_bfloat16_scales_are_converted_exactly_or_refused() -> None:
    kept = torch.tensor([[2.0**-24], [2.0**-14 * 1.9921875], [-65280.0], [2.0**-17 * 1.9921875]], dtype=torch.bfloat16)
    weight = rounded("int4-channel", (8, 8), dtype=torch.bfloat16)
    weight.scales["scale"][:4] = kept
    tensors = FORMAT.pack(weight)
    assert np.array_equal(read(tensors, 4), dequantized(weight).numpy())
    for beyond in (2.0**-25, 2.0**-18 * 1.9921875, 65536.0, 1e-30, 1e30):
        weight.scales["scale"][5] = beyond
        with pytest.raises(SchemeError, match=r"1 of 8 scales are beyond float16.*compressed-tensors"):
            FORMAT.pack(weight)


def test_the_configuration() -> None:
    weights = {"model.layers.0.mlp.up_proj": rounded("int4-g8"), "model.layers.0.mlp.down_proj": rounded("int4-g8")}
    config = FORMAT.config(weights, ["lm_head"])
    assert json.loads(json.dumps(config)) == config
    assert config.pop("meta")["quantizer"][0].startswith("roundel:")
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 8,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
    }
    other = FORMAT.config({"lm_head": rounded("int8-channel")}, [])
    assert (other["bits"], other["group_size"], other["lm_head"]) == (8, -1, True)


def test_linears_that_are_left_alone_are_named_also_as_vllm_names_them() -> None:
    ignore = [f"model.layers.3.self_attn.{part}_proj" for part in "qkvo"] + ["lm_head", "model.layers.1.mlp.up_proj"]
    config = FORMAT.config({"a": rounded("int4-g8")}, ignore)
    assert config["dynamic"] == {
        r"-:^model\.layers\.1\.mlp\.up_proj$": {},
        **{rf"-:^model\.layers\.3\.self_attn\.{part}_proj$": {} for part in ("k", "o", "q", "qkv", "v")},
    }


def test_a_model_has_one_scheme() -> None:
    with pytest.raises(SchemeError, match="one scheme in a model, and here are int4-g8, int8-g8; try the format compressed-tensors"):
        FORMAT.config({"a": rounded("int4-g8"), "b": rounded("int8-g8")}, [])


@pytest.mark.parametrize(
    "scheme", ["int2-g32", "int3-channel", "int5-g32", "int6-g32", "int7-g32", "int4-g32-asym", "fp8", "nvfp4", "q4_0", "trellis4"]
)
def test_what_its_engines_cannot_read_is_refused_with_the_nearest_choice(scheme: str) -> None:
    with pytest.raises(SchemeError, match=f"gptq cannot hold {scheme}: .*compressed-tensors"):
        FORMAT.check(parse_scheme(scheme), None)


def test_rotations_are_refused() -> None:
    with pytest.raises(SchemeError, match="try rotate none"):
        FORMAT.check(parse_scheme("int4-g32"), "hadamard")
    with pytest.raises(SchemeError, match="try rotate none"):
        FORMAT.pack(RoundedWeight(**{**vars(rounded("int4-g8")), "rotation": Rotation.draw(16, 24, "hadamard", 0)}))


@pytest.mark.parametrize(("scheme", "shape"), [("int4-channel", (12, 16)), ("int4-channel", (16, 12)), ("int8-channel", (4, 6))])
def test_shapes_that_do_not_fill_words_are_refused(scheme: str, shape: tuple[int, int]) -> None:
    with pytest.raises(SchemeError, match="does not fill words"):
        FORMAT.check_shape(grid_of(scheme), *shape)
    FORMAT.check_shape(grid_of("int8-channel"), 4, 8)


BAD = {
    "qweight": [torch.zeros(3, 16), torch.zeros(4, 16, dtype=torch.int32), torch.zeros(48, dtype=torch.int32)],
    "qzeros": [torch.full((3, 2), 0x77777778, dtype=torch.int32), torch.full((2, 2), 0x77777777, dtype=torch.int32)],
    "scales": [torch.ones(3, 16), torch.ones(16, 3).half(), torch.full((3, 16), torch.nan).half(), torch.full((3, 16), torch.inf).half()],
    "g_idx": [torch.arange(24), torch.arange(24, dtype=torch.int32) % 3, torch.zeros(24, dtype=torch.int32)],
    "bias": [torch.zeros(16)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=lambda _: "")
def test_malformed_tensors_are_refused(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ModelError):
        FORMAT.unpack(FORMAT.pack(rounded("int4-g8")) | {name: value}, grid_of("int4-g8"), (16, 24))


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx"])
def test_missing_tensors_are_refused(name: str) -> None:
    tensors = FORMAT.pack(rounded("int4-g8"))
    del tensors[name]
    with pytest.raises(ModelError, match="has g_idx, qweight, qzeros, scales"):
        FORMAT.unpack(tensors, grid_of("int4-g8"), (16, 24))


def test_one_scale_for_the_weight_is_one() -> None:
    tensors = FORMAT.pack(rounded("int4-tensor"))
    tensors["scales"][0, 3] *= 2
    with pytest.raises(ModelError, match="differ from row to row"):
        FORMAT.unpack(tensors, grid_of("int4-tensor"), (16, 24))
