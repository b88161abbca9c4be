"""Triton's products with packed weights against decoding and multiplying, run by Triton's interpreter on the CPU; on a GPU as they are.

The interpreter is chosen by the environment when Triton is imported, so all cases run in one process of their own (this file as a program),
which prints for each case the largest error in units of the largest result. The interpreter runs what the compiler refuses, so another
process compiles some cases for a Hopper GPU, which needs none, and prints bytes of machine code and of shared memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CASES = {
    # scheme, rows, columns, rows of the input, its type
    "int2-group": ("int2-g8", 37, 40, 3, torch.float32),
    "int3-group": ("int3-g20", 20, 60, 16, torch.float32),
    "int4-channel": ("int4-channel", 33, 70, 1, torch.float32),
    "int5-tensor": ("int5-tensor", 16, 33, 2, torch.float32),
    "int8-half": ("int8-g8", 16, 40, 2, torch.float16),
    "int3-asymmetric": ("int3-g4-asym", 35, 36, 5, torch.float32),
    "int4-asymmetric": ("int4-channel-asym", 17, 33, 5, torch.float32),
    "trellis-mul1": ("trellis2", 40, 50, 3, torch.float32),
    "trellis-3inst": ("trellis3-3inst-s12", 16, 32, 2, torch.float32),
    "trellis-mcg": ("trellis1-mcg-s9", 32, 33, 1, torch.float32),
    "trellis-1mad": ("trellis5-1mad", 16, 40, 2, torch.float32),
    "trellis-hyb": ("trellis2-hyb", 33, 34, 4, torch.float32),
    "trellis-hyb-half": ("trellis4-hyb-s10", 16, 32, 2, torch.float16),
    "trellis-wide-tile": ("trellis2-s8", 3, 256, 2, torch.float32),
    "trellis-high-tile": ("trellis8", 300, 5, 2, torch.float32),
}


SMALL = {"block": (16, 16)}
COMPILED: dict[str, dict[str, tuple[int, int]]] = {
    "int2-group": {},
    "int3-asymmetric": SMALL,
    "trellis-mul1": SMALL,
    "trellis-mcg": SMALL,
    "trellis-1mad": SMALL,
    "trellis-hyb-half": SMALL,
}
"""Whole blocks take long to compile."""
SHARED = 48 * 1024
"""Bytes of shared memory that every GPU gives."""


def program(*arguments: str, **environment: str) -> dict[str, list[float]]:
    pytest.importorskip("triton")
    own = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, __file__, *arguments], env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def errors() -> dict[str, list[float]]:
    return program(TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def sizes() -> dict[str, list[float]]:
    return program("compile")


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_that_with_the_decoded_weight(errors: dict[str, list[float]], case: str) -> None:
    assert errors[case][0] < 1e-6


@pytest.mark.parametrize("case", COMPILED)
def test_kernels_compile(sizes: dict[str, list[float]], case: str) -> None:
    code, shared = sizes[case]
    assert code > 1000
    assert shared <= SHARED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_computes_the_same(case: str) -> None:
    assert error(*CASES[case], device="cuda") < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scheme", ["int4-g128", "int3-g64-asym", "trellis2", "trellis4-hyb", "lattice2", "q4_k"])
@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_on_a_gpu_computes_as_on_the_cpu(scheme: str, rows: int, dtype: torch.dtype) -> None:
    from unit.test_native_format import layer_of, random_weight

    weight = random_weight(scheme, (384, 512), rotation="hadamard")
    layer = layer_of(weight, torch.ones(384))
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    found = layer.cuda()(x.to("cuda", dtype)).cpu()
    assert found.dtype == dtype
    largest = expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=largest * (2e-2 if dtype == torch.bfloat16 else 1e-3))


def error(scheme: str, d_out: int, d_in: int, rows: int, dtype: torch.dtype, *, device: str = "cpu") -> float:
    """Blocks so small that there are several; few programs, so that one takes several blocks of columns."""
    from roundel.kernels import triton_decode
    from roundel.rounding.round import dequantized
    from unit.test_native_format import random_weight

    triton_decode.PROGRAMS = 5
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = product(scheme, d_out, d_in, x.to(device), block=(16, 16))
    expected = x.double() @ dequantized(random_weight(scheme, (d_out, d_in))).to(dtype).double().T
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    return ((found.cpu().double() - expected).abs().max() / expected.abs().max()).item()


def product(scheme: str, d_out: int, d_in: int, x: torch.Tensor, **options: tuple[int, int]) -> torch.Tensor:
    from roundel.formats.native import Native
    from roundel.grids import parse_scheme
    from roundel.grids.trellis import Trellis
    from roundel.kernels import triton_decode
    from unit.test_native_format import random_weight

    weight, grid = random_weight(scheme, (d_out, d_in)), parse_scheme(scheme)
    packed = {name: tensor.to(x.device) for name, tensor in Native().pack(weight).items()}
    if isinstance(grid, Trellis):
        code = grid.code, grid.shift, grid.values, grid.state_bits, packed.get("table"), packed["scale"]
        return triton_decode.multiply_trellis(x, packed["weight"], *code, weight.shape, grid.tile(d_out, d_in), **options)
    scales = packed["scale"], packed.get("zero_point")
    return triton_decode.multiply_integers(x, packed["weight"], grid.width, grid.code_range[0], *scales, weight.shape, **options)


def compile_for_hopper() -> dict[str, list[float]]:
    """Launches compile and return."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _device: 0)
    )
    found: dict[str, list[float]] = {}

    def launch(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*given: object, **options: object) -> None:
            binary = kernel.run(*given, grid=grid, warmup=True, **options)
            found[case] = [len(binary.asm["cubin"]), binary.metadata.shared]

        return run

    JITFunction.__getitem__ = launch
    for case, options in COMPILED.items():
        scheme, d_out, d_in, rows, dtype = CASES[case]
        product(scheme, d_out, d_in, torch.zeros(rows, d_in, dtype=dtype), **options)
    return found


if __name__ == "__main__":
    print(json.dumps(compile_for_hopper() if sys.argv[1:] == ["compile"] else {name: [error(*case)] for name, case in CASES.items()}))
