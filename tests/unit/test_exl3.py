"""EXL3: the bytes against a decoder that shares no code with the package, written from the format's description and its test vectors."""

import dataclasses
import hashlib
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.errors import ModelError, SchemeError
from roundel.formats.bits import pack_tiles, unpack_tiles
from roundel.formats.exl3 import Exl3
from roundel.grids import parse_scheme
from roundel.grids.trellis import Trellis
from roundel.rotation import Rotation, rotated_shape
from roundel.rounding import make_problem, refit_scales
from roundel.rounding.round import dequantized
from roundel.types import KroneckerFactors, RoundedWeight

FORMAT = Exl3()
CODES = ("mul1", "mcg", "3inst")
MARKERS = {"mul1": -2082680531, "mcg": -877912083}


def grid_of(width: int, code: str = "mul1") -> Trellis:
    grid = parse_scheme(f"trellis{width}" + ("" if code == "mul1" else f"-{code}"))
    assert isinstance(grid, Trellis)
    return grid


def rounded(grid: Trellis, shape: tuple[int, int] = (256, 128), scale: float = 0.0205078125, seed: int = 0) -> RoundedWeight:
    """Any symbols are a legal walk."""
    d_out, d_in = rotated_shape("hadamard128", shape)
    codes = torch.randint(2**grid.width, (d_out // 16, d_in // 16, 256), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    rotation = Rotation.draw(*shape, "hadamard128", seed)
    return RoundedWeight(scheme=grid.name, codes=codes, scales={"scale": torch.full((1, 1), scale)}, shape=shape, rotation=rotation)


# --- the independent decoder: numpy, 32-bit arithmetic, one bit at a time


@cache
def codebook(code: str) -> np.ndarray:
    x = np.arange(65536, dtype=np.uint32)
    with np.errstate(over="ignore"):
        if code == "mul1":
            y = x * np.uint32(0x83DCD12D)
            total = sum((y >> np.uint32(8 * byte)) & np.uint32(255) for byte in range(4)).astype(np.float64)
            return ((1024 + total) * 0.00676727294921875 - 10.3828125).astype(np.float16)
        y = x * np.uint32(0xCBAC1FED) if code == "mcg" else x * np.uint32(89226354) + np.uint32(64248484)
    y = (y & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    low, high = ((y >> np.uint32(shift) & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float32) for shift in (0, 16))
    return (low + high).astype(np.float16)


def tiles_of(trellis: np.ndarray, code: str) -> np.ndarray:
    """`T`, `(d_in, d_out)` float16, of `M.trellis`."""
    down, across, halves = trellis.shape
    width = halves // 16
    words = np.ascontiguousarray(trellis.astype("<i2")).view("<u4").astype(np.uint64)
    at = np.arange(256 * width)
    bits = words[..., at // 32] >> (31 - at % 32).astype(np.uint64) & np.uint64(1)
    state = np.zeros((down, across, 256), dtype=np.uint64)
    for k in range(16):
        state = state << np.uint64(1) | bits[..., (width * (np.arange(256) + 1) - 16 + k) % (256 * width)]
    values = codebook(code)[state.astype(np.int64)]
    T = np.zeros((16 * down, 16 * across), dtype=np.float16)
    for i in range(256):
        t, j = divmod(i, 8)
        row, column = 2 * (t % 4) + (j & 1) + 8 * (j >> 1 & 1), t // 4 + 8 * (j >> 2)
        T[row::16, column::16] = values[..., i]
    return T


def sylvester(n: int) -> np.ndarray:
    i = np.arange(n)
    parity = np.array([[bin(a & b).count("1") % 2 for b in i] for a in i])
    return 1.0 - 2.0 * parity


def weight(T: np.ndarray, suh: np.ndarray, svh: np.ndarray) -> np.ndarray:
    """`(d_in, d_out)` float64; nothing is rounded, for scales of 11 bits and float16 tiles: `H` is of +-1, and 1 / 128 comes last."""
    H, W = sylvester(128), T.astype(np.float64)
    for k in range(0, W.shape[0], 128):
        W[k : k + 128] = H @ W[k : k + 128]
    for k in range(0, W.shape[1], 128):
        W[:, k : k + 128] = W[:, k : k + 128] @ H
    return suh.astype(np.float64)[:, None] * W * svh.astype(np.float64) / 128


def read(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """`(d_out, d_in)` from the tensors of a linear, by what is there."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    code = next((code for code in MARKERS if code in arrays), "3inst")
    return weight(tiles_of(arrays["trellis"], code), arrays["suh"], arrays["svh"]).T


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


# --- the description's vectors


@pytest.mark.parametrize(
    ("code", "values", "digest"),
    [
        ("mul1", "c2e8 3921 b72d b89e baf2 b936", "bc48d02cb1c14939"),
        ("mcg", "3f60 304e ba13 3e0f b915 3acd", "95383563929baa9d"),
        ("3inst", "3a25 bb5b 3b74 c066 b7f8 b110", "ad88de2dcff5bb05"),
    ],
)
def test_codebooks(code: str, values: str, digest: str) -> None:
    ours = grid_of(2, code).table[:, 0].numpy().astype("<f2")
    for table in (ours, codebook(code)):
        assert [f"{table.view('<u2')[state]:04x}" for state in (0, 1, 2, 0x1234, 0x8000, 0xFFFF)] == values.split()
        assert sha(table) == digest


@pytest.mark.parametrize(
    ("width", "first", "states", "start", "halves", "values", "digest"),
    [
        (2, "00231310", "fc2c f0b0 c2c2 0b0b", "5aa5740b0bffe01d", "a55a 0b74 ff0b 1de0",
         (-0.2183837890625, 2.623046875, -0.279296875, 0.83740234375), "045b497b41bad0d4"),
        (3, "00235714", "c9b8 4dc0 6e02 7013", "cacc3b019f15729a", "ccca 013b 159f 9a72",
         (0.2080078125, 0.01849365234375, 1.453125, -0.259033203125), "a7d6f52e806cb7c2"),
        (4, "0023579c", "c6f0 6f00 f002 0023", "9c5723006ad159e2", "579c 0023 d16a e259",
         (0.52587890625, -0.07623291015625, 0.07940673828125, -1.78125), "5332ffd3744ae42a"),
    ],
)  # fmt: skip
def test_vector_a_one_tile(width: int, first: str, states: str, start: str, halves: str, values: tuple[float, ...], digest: str) -> None:
    i = np.arange(256)
    symbols = ((i * i + 5 * i) // 7 % 2**width).astype(np.uint8)
    assert "".join(f"{s:x}" for s in symbols[:8]) == first
    packed = pack_tiles(torch.from_numpy(symbols)[None, None], width)
    raw = packed.numpy().astype("<i2")
    assert raw.tobytes()[:8].hex() == start
    assert [f"{half & 0xFFFF:04x}" for half in raw[0, 0, :4].tolist()] == halves.split()
    assert sha(raw) == digest
    assert torch.equal(unpack_tiles(packed, width)[0, 0], torch.from_numpy(symbols))
    T = tiles_of(packed.numpy(), "mul1")
    assert (T[0, 0], T[1, 0], T[8, 0], T[9, 0]) == values
    state, walked = 0, []
    for symbol in [*symbols.tolist(), *symbols[:4].tolist()]:  # once around, and the first four states
        state = (state << width | symbol) & 0xFFFF
        walked.append(f"{state:04x}")
    assert walked[256:] == states.split()
    ours = grid_of(width).decode_tiles(torch.from_numpy(symbols)[None])
    assert np.array_equal(ours.view(16, 16).T.numpy(), T.astype(np.float32))
    if width == 2:
        assert tuple(T[0, :4]) == (-0.2183837890625, 0.424560546875, 2.2578125, -0.252197265625)
        others = {
            "mcg": (0.55224609375, 2.48046875, -0.39794921875, 1.328125),
            "3inst": (0.4619140625, 0.78662109375, 0.25927734375, -0.57861328125),
        }
        for code, expected in others.items():
            decoded = grid_of(2, code).decode_tiles(torch.from_numpy(symbols)[None]).view(16, 16).T
            assert (decoded[0, 0], decoded[1, 0], decoded[8, 0], decoded[9, 0]) == expected
            assert np.array_equal(tiles_of(packed.numpy(), code), decoded.numpy())


VECTOR_B = {
    "mul1": (2, "25b3 1a1e 297c da01", "e3af0d25c4ee3d65", "c7f17c3039e59cb2", (0.329834, 0.769531, -1.653320, 0.539551),
             (1.994141, -0.962891, 1.168945), (0.162982, -0.007902, 0.027151), (0.000656, -0.022793, 14.87212),
             (-1.12489, -0.20351, 0.01899, 0.42591)),
    "mcg": (3, "b415 2a50 cac2 398f", "e331ab0c2224aae9", "9f33edabec277c0e", (1.103516, 1.171875, -1.392578, 2.093750),
            (-0.718262, -1.519531, -0.091309), (-0.092496, -0.026449, -0.093603), (0.033930, -0.012226, 18.46512),
            (0.05868, -0.13671, 0.83339, 0.35117)),
    "3inst": (4, "05c8 358b 9d3f 0a46", "bd9ad9c9352279ab", "221fd01b2feac067", (0.617676, 0.745117, -1.308594, 1.088867),
              (-0.499512, 1.046875, 0.928711), (-0.346730, -0.010386, 0.040935), (-0.040574, -0.043392, 18.55399),
              (-0.25288, -0.20230, -0.77698, -0.93520)),
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_vector_b_a_whole_layer(code: str) -> None:
    width, halves, digest, decoded, row, corners, start, ends, outputs = VECTOR_B[code]
    k, n = 256, 384
    state, stream = 1, np.empty(k * n, dtype=np.uint8)
    for at in range(k * n):
        state = (1664525 * state + 1013904223) % 2**32
        stream[at] = state >> (32 - width)
    symbols = torch.from_numpy(stream).view(k // 16, n // 16, 256)
    packed = pack_tiles(symbols, width)
    assert [f"{half & 0xFFFF:04x}" for half in packed[0, 0, :4].tolist()] == halves.split()
    assert sha(packed.numpy().astype("<i2")) == digest
    grid = grid_of(width, code)
    ours = grid.from_tiles(grid.decode_tiles(symbols.transpose(0, 1).flatten(0, 1)), (n, k)).T
    T = tiles_of(packed.numpy(), code)
    assert np.array_equal(ours.numpy(), T.astype(np.float32))
    assert sha(T.astype("<f2")) == decoded
    assert T[0, :4] == pytest.approx(row, abs=5e-7)
    assert (T[1, 0], T[16, 0], T[0, 16]) == pytest.approx(corners, abs=5e-7)
    r, c = np.arange(k), np.arange(n)
    suh, svh = ((7 * r % 13 - 6.5) / 64).astype(np.float16), ((5 * c % 11 - 5.5) / 4).astype(np.float16)
    W = weight(T, suh, svh)
    assert W[0, :3] == pytest.approx(start, abs=6e-7)
    assert (W[1, 0], W[255, 383], np.linalg.norm(W)) == pytest.approx(ends, rel=1e-6, abs=6e-7)
    y = ((3 * r % 17) - 8) / 8 @ W + (2 * c % 7 - 3) / 8
    assert (*y[:3], y[383]) == pytest.approx(outputs, abs=6e-6)


# --- what the format writes


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_the_other_decoder_finds_the_very_weight(width: int, code: str) -> None:
    original = rounded(grid_of(width, code))
    grid, rotation, scale = grid_of(width, code), original.rotation, original.scales["scale"].item()
    assert isinstance(rotation, Rotation)
    found = read(FORMAT.pack(original))
    decoded = grid.from_tiles(grid.decode_tiles(original.codes.flatten(0, 1)), original.shape).numpy()
    exact = weight(decoded.T, rotation.signs_in.numpy(), rotation.signs_out.numpy() * scale).T  # no product here is rounded
    assert np.array_equal(found, exact)
    np.testing.assert_allclose(dequantized(original, torch.float64).numpy(), found, rtol=0, atol=1e-13 * np.abs(found).max())
    assert np.array_equal(dequantized(original).numpy(), dequantized(FORMAT.unpack(FORMAT.pack(original), grid, original.shape)).numpy())


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("shape", [(128, 64), (192, 128), (100, 300)])
def test_other_widths_are_filled_up_with_outputs_that_are_zero(shape: tuple[int, int], tuned: bool) -> None:
    original = rounded(grid_of(3), shape, scale=0.5)
    assert isinstance(original.rotation, Rotation)
    if tuned:
        vectors = {name: torch.linspace(0.5, 2, len(getattr(original.rotation, name))).half() for name in ("signs_out", "signs_in")}
        original = dataclasses.replace(original, rotation=dataclasses.replace(original.rotation, **vectors))
    tensors = FORMAT.pack(original)
    found, (d_out, d_in) = read(tensors), shape
    assert found.shape == rotated_shape("hadamard128", shape)
    np.testing.assert_allclose(dequantized(original, torch.float64).numpy(), found[:d_out, :d_in], rtol=0, atol=1e-13 * np.abs(found).max())
    assert not found[d_out:].any()
    assert FORMAT.outputs(d_out) == len(found)
    back = FORMAT.unpack(tensors, grid_of(3), shape)
    assert torch.equal(dequantized(back), dequantized(original))
    assert all(torch.equal(value, tensors[name]) for name, value in FORMAT.pack(back).items())


@given(
    width=st.integers(1, 8),
    code=st.sampled_from(CODES),
    down=st.integers(1, 3),
    across=st.integers(1, 3),
    significand=st.integers(1024, 2047),
    exponent=st.integers(-38 - 10, 30 - 10),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_unpack_inverts_pack(width: int, code: str, down: int, across: int, significand: int, exponent: int, seed: int) -> None:
    grid, shape = grid_of(width, code), (128 * down, 128 * across)
    original = rounded(grid, shape, math.ldexp(significand, exponent), seed)
    tensors = FORMAT.pack(original)
    assert FORMAT.packed_bytes(shape, grid, torch.bfloat16, "hadamard128") == sum(t.numel() * t.element_size() for t in tensors.values())
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert torch.equal(tensors["suh"].abs()[0].double() * tensors["svh"].abs()[0].double(), original.scales["scale"].double()[0, 0])
    back = FORMAT.unpack(tensors, grid, shape)
    assert back.scheme == grid.name
    assert torch.equal(back.codes, original.codes)
    assert back.codes.dtype == original.codes.dtype
    assert torch.equal(back.scales["scale"], original.scales["scale"])
    assert isinstance(back.rotation, Rotation)
    assert isinstance(original.rotation, Rotation)
    assert torch.equal(back.rotation.signs_in, original.rotation.signs_in)
    assert torch.equal(back.rotation.signs_out, original.rotation.signs_out)
    assert back.rotation.kind == "hadamard128"


@pytest.mark.parametrize(
    ("scale", "suh", "svh"),
    [
        (0.0205078125, 0.0205078125, 1.0),
        (1.0, 1.0, 1.0),
        (65504.0, 65504.0, 1.0),
        (2.0**-14, 2.0**-14, 1.0),
        (2.0**-15 * 1.5, 2.0**-14 * 1.5, 0.5),
        (2.0**-38, 2.0**-14, 2.0**-24),
        (2.0**-38 * 0.9990234375, 1.0, 0.0),
        (2.0**-126, 1.0, 0.0),
        (2.0**16, 2.0**15, 2.0),
        (65504.0 * 2**15, 65504.0, 2.0**15),
        (-0.5, 0.5, 1.0),
    ],
)
def test_the_scale_is_on_the_input_side_as_long_as_float16_can_hold_it(scale: float, suh: float, svh: float) -> None:
    tensors = FORMAT.pack(rounded(grid_of(2), (128, 128), scale))
    assert tensors["svh"].abs().double().unique().tolist() == [svh]
    assert tensors["suh"].abs().double().unique().tolist() == [suh]
    back = FORMAT.unpack(tensors, grid_of(2), (128, 128))
    if svh == 0:
        assert (read(tensors) == 0).all()
        assert (dequantized(back) == 0).all()
        assert dequantized(rounded(grid_of(2), (128, 128), scale)).abs().max() < 2**-26  # less than half of what float16 can tell from zero
    else:
        assert np.array_equal(dequantized(back).numpy(), dequantized(rounded(grid_of(2), (128, 128), scale)).numpy())
    assert FORMAT.pack(back).keys() == tensors.keys()
    assert all(torch.equal(FORMAT.pack(back)[name].abs(), tensor.abs()) for name, tensor in tensors.items())


@pytest.mark.parametrize(("scale", "reason"), [(0.1, "11 significant bits"), (2.0**31, "beyond float16")])
def test_scales_that_float16_cannot_hold_are_refused(scale: float, reason: str) -> None:
    with pytest.raises(SchemeError, match=reason):
        FORMAT.pack(rounded(grid_of(2), (128, 128), scale))


@given(value=st.floats(1e-36, 1e36), negative=st.booleans())
@settings(max_examples=50, deadline=None)
def test_scales_of_tile_grids_have_the_significand_of_float16(value: float, negative: bool) -> None:
    grid, wanted = grid_of(3), torch.tensor([[-value if negative else value]], dtype=torch.float64)
    kept = grid.stored("scale", wanted, torch.full((1, 1), 0.5))
    assert kept.dtype == torch.float32
    assert kept.double().item() == pytest.approx(wanted.item(), rel=2**-11)
    assert (torch.frexp(kept.double()).mantissa * 2**11).item().is_integer()
    assert torch.equal(grid.stored("scale", kept.double(), kept), kept)
    fitted = grid.fit_scales(torch.full((4, 4), abs(wanted.item())), torch.ones(4), torch.float32)["scale"].double()
    assert (torch.frexp(fitted).mantissa * 2**11).item().is_integer()


def test_a_refitted_scale_can_be_written() -> None:
    original, generator = rounded(grid_of(2), (128, 128)), torch.Generator().manual_seed(1)
    W = dequantized(dataclasses.replace(original, rotation=None)) * 1.234 + 1e-3 * torch.randn(128, 128, generator=generator)
    problem = make_problem(W, KroneckerFactors(H_out=torch.eye(128), H_in=torch.eye(128), scale=1.0), damping=0.01)
    scales = refit_scales(problem, grid_of(2), original.scales, original.codes)
    assert scales["scale"].item() == pytest.approx(1.234 * original.scales["scale"].item(), rel=1e-3)
    refitted = dataclasses.replace(original, scales=scales)
    assert torch.equal(dequantized(FORMAT.unpack(FORMAT.pack(refitted), grid_of(2), (128, 128))), dequantized(refitted))


@pytest.mark.parametrize("wish", [0.0, 1e-300, -1e-39, 1e39, 1e300, math.inf, math.nan])
def test_wishes_that_no_scale_can_meet_change_nothing(wish: float) -> None:
    like = torch.full((1, 1), 0.25)
    assert torch.equal(grid_of(3).stored("scale", torch.tensor([[wish]], dtype=torch.float64), like), like)


def test_the_least_and_the_largest_weights_have_finite_scales() -> None:
    for size in (0.0, 1e-44, 3e38):
        scale = grid_of(2).fit_scales(torch.full((4, 4), size), torch.ones(4), torch.float32)["scale"]
        assert scale.isfinite().all()
        assert (scale > 0).all()


# --- what readers are told


def test_config_lists_every_tensor_that_is_written() -> None:
    weights = {
        "model.layers.0.self_attn.q_proj": rounded(grid_of(2), (256, 128)),
        "model.layers.0.mlp.up_proj": rounded(grid_of(3), (128, 384)),
        "lm_head": rounded(grid_of(6), (128, 128)),
    }
    config = FORMAT.config(weights, ["model.layers.0.mlp.gate"])
    storage = config.pop("tensor_storage")
    assert config == {
        "quant_method": "exl3",
        "version": "1.4.1",
        "bits": 2.6,
        "head_bits": 6,
        "calibration": {"rows": 0, "cols": 0},
        "out_scales": "always",
        "codebook": "mul1",
    }
    packed = {name: FORMAT.pack(weight) for name, weight in weights.items()}
    assert storage.keys() == packed.keys()
    for name, tensors in packed.items():
        entry = storage[name]
        assert entry["quant_format"] == "exl3"
        assert entry["bits_per_weight"] == parse_scheme(weights[name].scheme).bits
        assert entry["mul1_multiplier"] == 2212286765
        assert "mcg_multiplier" not in entry
        assert entry["stored_tensors"].keys() == {f"{name}.{part}" for part in tensors}
        for part, tensor in tensors.items():
            assert entry["stored_tensors"][f"{name}.{part}"] == {
                "shape": list(tensor.shape),
                "n_bytes": tensor.numel() * tensor.element_size(),
                "dtype": str(tensor.dtype),
                "torch_dtype": str(tensor.dtype).removeprefix("torch."),
            }
    meta = {name: {part: tensor.to("meta") for part, tensor in tensors.items()} for name, tensors in packed.items()}
    assert FORMAT.files(weights, meta) == {"quantization_config.json": {**config, "tensor_storage": storage}}


@pytest.mark.parametrize("code", CODES)
def test_the_marker_says_which_code(code: str) -> None:
    original = rounded(grid_of(2, code), (128, 128))
    tensors = FORMAT.pack(original)
    assert {name: tensors[name].item() for name in tensors if name not in {"trellis", "suh", "svh"}} == (
        {code: MARKERS[code]} if code in MARKERS else {}
    )
    assert all(tensors[name].shape == () and tensors[name].dtype == torch.int32 for name in MARKERS if name in tensors)
    entry = FORMAT.config({"a": original}, [])["tensor_storage"]["a"]
    multiplier = {"mul1": {"mul1_multiplier": 2212286765}, "mcg": {"mcg_multiplier": 3417055213}}.get(code, {})
    assert {key: value for key, value in entry.items() if key.endswith("multiplier")} == multiplier
    assert FORMAT.config({"a": original}, [])["head_bits"] is None


# --- refusals


@pytest.mark.parametrize(
    ("scheme", "rotation", "reason"),
    [
        ("int4-g128", "hadamard128", "try trellis4"),
        ("lattice2", "hadamard128", "try trellis2"),
        ("q3_k", None, "try trellis3"),
        ("trellis3-1mad", "hadamard128", "codes mul1, mcg, 3inst with 16 state bits; try trellis3"),
        ("trellis2-hyb", "hadamard128", "try trellis2"),
        ("trellis2-s12", "hadamard128", "16 state bits"),
        ("trellis2", "hadamard", "try rotate hadamard128"),
        ("trellis2", None, "rotated with nothing"),
    ],
)
def test_what_exllamav3_cannot_read_is_refused_with_the_nearest_choice(scheme: str, rotation: str | None, reason: str) -> None:
    with pytest.raises(SchemeError, match=reason):
        FORMAT.check(parse_scheme(scheme), rotation)


def test_what_it_reads_is_not_refused() -> None:
    for scheme in ("trellis1", "trellis8", "trellis2-mcg", "trellis4-3inst", "trellis3-c4"):
        FORMAT.check(parse_scheme(scheme), "hadamard128")


def test_one_code_for_a_model_and_only_names_that_exllamav3_knows() -> None:
    with pytest.raises(SchemeError, match="codes mcg, mul1: exllamav3 needs one"):
        FORMAT.config({"a": rounded(grid_of(2), (128, 128)), "b": rounded(grid_of(2, "mcg"), (128, 128))}, [])
    with pytest.raises(SchemeError, match=r"parts of layers\.0\.qkv_proj"):
        FORMAT.config({"layers.0.qkv_proj": rounded(grid_of(2), (128, 128))}, [])
    with pytest.raises(SchemeError, match="rotated with nothing"):
        FORMAT.pack(RoundedWeight(**{**vars(rounded(grid_of(2), (128, 128))), "rotation": None}))


BAD = {
    "trellis": [
        torch.zeros(8, 16, 32, dtype=torch.int32),
        torch.zeros(16, 8, 32, dtype=torch.int16),
        torch.zeros(8, 16, 48, dtype=torch.int16),
    ],
    "suh": [torch.ones(128), torch.ones(256, dtype=torch.float16), torch.arange(128).half(), torch.full((128,), torch.nan).half()],
    "svh": [torch.ones(256, 1).half(), torch.full((256,), torch.inf).half(), torch.cat([torch.ones(255), torch.zeros(1)]).half()],
    "mul1": [torch.tensor(7, dtype=torch.int32), torch.tensor([MARKERS["mul1"]], dtype=torch.int32), torch.tensor(MARKERS["mul1"])],
    "mcg": [torch.tensor(MARKERS["mcg"], dtype=torch.int32)],
    "scale": [torch.ones(1)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=lambda _: "")
def test_malformed_tensors_are_refused(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ModelError):
        FORMAT.unpack(FORMAT.pack(rounded(grid_of(2))) | {name: value}, grid_of(2), (256, 128))


@pytest.mark.parametrize("name", ["trellis", "suh", "svh", "mul1"])
def test_missing_tensors_are_refused(name: str) -> None:
    tensors = FORMAT.pack(rounded(grid_of(2)))
    del tensors[name]
    with pytest.raises(ModelError, match="has mul1, suh, svh, trellis"):
        FORMAT.unpack(tensors, grid_of(2), (256, 128))


def test_more_tiles_than_are_expanded_at_a_time() -> None:
    symbols = torch.randint(8, (70, 60, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(unpack_tiles(pack_tiles(symbols, 3), 3), symbols)


@pytest.mark.parametrize("exponent", [-20, -5, 3])
def test_tuned_vectors_in_place_of_signs_are_exact(exponent: int) -> None:
    """With a scale that is a power of two, as tuning leaves it; what is read back is the same weight and packs to the same bytes."""
    plain = rounded(grid_of(2), scale=2.0**exponent)
    assert isinstance(plain.rotation, Rotation)
    out, into = ((signs * torch.linspace(0.7, 1.3, len(signs))).half() for signs in (plain.rotation.signs_out, plain.rotation.signs_in))
    tuned = dataclasses.replace(plain, rotation=dataclasses.replace(plain.rotation, signs_out=out, signs_in=into))
    tensors = FORMAT.pack(tuned)
    W = out.double()[:, None] * dequantized(plain).double() * plain.rotation.signs_out[:, None] * plain.rotation.signs_in * into.double()
    torch.testing.assert_close(dequantized(tuned).double(), W, rtol=1e-5, atol=1e-6 * 2.0**exponent)
    again = FORMAT.unpack(tensors, grid_of(2), tuned.shape)
    assert torch.equal(dequantized(again), dequantized(tuned))
    assert all(torch.equal(value, tensors[name]) for name, value in FORMAT.pack(again).items())
