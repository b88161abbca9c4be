"""AutoRound: the bytes against a reader that shares no code with the writer, and against the one for originals."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.errors import ModelError, SchemeError
from roundel.formats.auto_round import AutoRound
from roundel.grids import Uniform, parse_scheme
from roundel.grids.asymmetric import Asymmetric
from roundel.models.packed import METHODS
from roundel.recipes import Recipe
from roundel.rotation import Rotation
from roundel.rounding.round import dequantized
from roundel.types import RoundedWeight

FORMAT = AutoRound()
SCHEMES = [f"int{bits}-{rest}" for bits in (2, 3, 4, 8) for rest in ("g32", "g64-asym", "channel", "channel-asym")]


def grid_of(scheme: str) -> Uniform | Asymmetric:
    grid = parse_scheme(scheme)
    assert isinstance(grid, Uniform | Asymmetric)
    return grid


def rounded(scheme: str, shape: tuple[int, int] = (32, 128), seed: int = 0) -> RoundedWeight:
    grid, generator = grid_of(scheme), torch.Generator().manual_seed(seed)
    (low, high), groups = grid.code_range, (shape[0], shape[1] // grid.group if isinstance(grid.group, int) else 1)
    codes = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)
    scales = {"scale": (0.02 * torch.randn(groups, generator=generator)).half()}
    if isinstance(grid, Asymmetric):
        zeros = torch.randint(low, high + 1, groups, generator=generator).to(torch.int8)
        scales = {"scale": scales["scale"].abs(), "zero_point": zeros}
    return RoundedWeight(scheme=scheme, codes=codes, scales=scales, shape=shape)


def read(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> np.ndarray:
    """`(d_out, d_in)` float32: whole columns and rows as integers of Python, whose digits are the numbers."""
    bits, mask = config["bits"], (1 << config["bits"]) - 1

    def numbers(words: np.ndarray, count: int) -> list[int]:
        stream = sum(int(word) << 32 * k for k, word in enumerate(words.view(np.uint32)))
        return [stream >> bits * k & mask for k in range(count)]

    scales = tensors["scales"].numpy().astype(np.float32)
    d_in = tensors["qweight"].shape[0] * 32 // bits
    q = np.array([numbers(column, d_in) for column in np.ascontiguousarray(tensors["qweight"].numpy().T)]).T
    z = np.array([numbers(row, scales.shape[1]) for row in tensors["qzeros"].numpy()])
    z += config["packing_format"] == "auto_round:auto_gptq"
    group = np.arange(d_in) // (config["group_size"] if config["group_size"] > 0 else d_in)
    return ((q - z[group]).astype(np.float32) * scales[group]).T


@pytest.mark.parametrize("scheme", SCHEMES)
@given(down=st.integers(1, 2), across=st.integers(1, 3), seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_other_readers_find_the_very_weight(scheme: str, down: int, across: int, seed: int) -> None:
    grid = grid_of(scheme)
    original = rounded(scheme, (32 * down, 64 * across), seed)
    tensors, config = FORMAT.pack(original), FORMAT.config({"layers.0.up": original}, [])
    assert np.array_equal(read(tensors, config), dequantized(original).numpy())
    assert torch.equal(METHODS["auto-round"].decode(tensors, config), dequantized(original))
    back = FORMAT.unpack(tensors, grid, original.shape)
    assert torch.equal(back.codes, original.codes)
    assert back.scales.keys() == original.scales.keys()
    assert all(torch.equal(back.scales[name], scale) for name, scale in original.scales.items())
    assert sum(tensor.nbytes for tensor in tensors.values()) == FORMAT.packed_bytes(original.shape, grid, torch.bfloat16, None)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize(
    "scheme", ["int5-g32", "int6-channel", "int4-tensor", "int4-g16", "int2-g48-asym", "int4-g32-affine", "q4_0", "nvfp4", "trellis2"]
)
def test_what_its_readers_have_no_place_for_is_refused(scheme: str) -> None:
    with pytest.raises(SchemeError, match=f"auto-round cannot hold {scheme}: .*compressed-tensors"):
        FORMAT.check(parse_scheme(scheme), None)


def test_shapes_and_rotations_that_do_not_fit_are_refused() -> None:
    for shape in ((16, 64), (64, 48)):
        with pytest.raises(SchemeError, match="not both multiples of 32"):
            FORMAT.check_shape(parse_scheme("int4-channel"), *shape)
    with pytest.raises(SchemeError, match="rotate none"):
        FORMAT.check(parse_scheme("int4-g32"), "hadamard")
    with pytest.raises(SchemeError, match="rotate none"):
        FORMAT.pack(RoundedWeight(**{**vars(rounded("int4-g32")), "rotation": Rotation.draw(32, 128, "hadamard", 0)}))


def test_one_model_has_zero_points_or_none() -> None:
    with pytest.raises(SchemeError, match=r"here are int4-g32 and int2-g32-asym; try the format compressed-tensors"):
        FORMAT.config({"a": rounded("int4-g32"), "b": rounded("int2-g32-asym")}, [])
    with pytest.raises(SchemeError, match="zero points or without"):
        Recipe(bits=4.0, schemes=("int4-g32", "int2-g32-asym"), format="auto-round")
    assert Recipe(scheme="int4-g32", bits=4.0, format="auto-round").used_schemes == tuple(f"int{bits}-g32" for bits in (2, 3, 4, 8))


def test_damaged_tensors_are_refused() -> None:
    tensors = FORMAT.pack(rounded("int3-g32"))
    for changed, reason in (
        ({"scales": torch.full_like(tensors["scales"], float("inf"))}, "NaN or infinite"),
        ({"qzeros": torch.zeros_like(tensors["qzeros"])}, "not all 3"),
        ({"qweight": tensors["qweight"][:, :1]}, "expected"),
        ({"g_idx": torch.zeros(128, dtype=torch.int32)}, "not those expected"),
    ):
        with pytest.raises(ModelError, match=reason):
            FORMAT.unpack({**tensors, **changed}, parse_scheme("int3-g32"), (32, 128))


def test_the_config_names_what_differs_from_most() -> None:
    weights = {f"model.layers.{k}.mlp.{part}_proj": rounded("int4-g32") for k in (1, 11) for part in ("up", "down", "gate")}
    weights |= {"model.layers.1.mlp.down_proj": rounded("int8-channel"), "lm_head": rounded("int4-g32")}
    config = FORMAT.config(weights, ["model.layers.1.mlp.gate", "model.layers.0.mlp.up_proj"])
    assert config == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "extra_config": {
            "lm_head": {"bits": 4, "group_size": 32},
            "model.layers.1.mlp.down_proj": {"bits": 8, "group_size": -1},
            "model.layers.1.mlp.gate_proj": {"bits": 4, "group_size": 32},
            "model.layers.1.mlp.gate": {"bits": 16},
            "model.layers.0.mlp.up_proj": {"bits": 16},
        },
    }
    other = FORMAT.config({"layers.0.q": rounded("int3-channel-asym")}, [])
    assert (other["packing_format"], other["sym"], other["group_size"]) == ("auto_round", False, -1)
    assert "extra_config" not in other
