"""Every Triton kernel, as its callers launch it, compiles for a Hopper GPU: Triton's compiler and assembler need no GPU.

The interpreter of `test_triton.py` runs what Triton would refuse to compile, so this is the other half. One process of its own, this file
as a program, with a driver that only names the target; launches compile and return.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

CASES = (
    "feedback",
    "feedback-levels",
    "feedback-asymmetric-float64",
    "sweep",
    "sweep-levels-uncoupled",
    "viterbi",
    "viterbi-pairs-weights",
)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile(compiled: dict[str, dict[str, int]], case: str) -> None:
    assert compiled[case]
    assert all(size > 1000 for size in compiled[case].values())  # bytes of machine code


def rounding(kind: str, scheme: str, dtype: torch.dtype = torch.float32, coupled: bool = True) -> None:
    from roundel.grids import parse_scheme
    from roundel.kernels import triton_rounding

    grid, W = parse_scheme(scheme), torch.randn(70, 96, dtype=dtype)
    scales = grid.fit_scales(W, torch.ones(96), torch.float16)
    step, offset = grid.affine(scales, (70, 96), dtype)
    given = step, offset, grid.level_table(), *grid.code_range
    H_out, H_in = torch.eye(70, dtype=dtype) + (0.1 if coupled else 0), torch.eye(96, dtype=dtype)
    if kind == "feedback":
        triton_rounding.feedback(W, H_out, H_in, *given)
    else:
        triton_rounding.sweep(W, H_out, H_in, *given, torch.zeros(70, 96, dtype=torch.int8))


def viterbi(scheme: str, weighted: bool) -> None:
    from roundel.grids import parse_scheme
    from roundel.kernels import triton_viterbi

    grid = parse_scheme(scheme)
    targets = torch.randn(2, 256 // grid.values, grid.values)
    triton_viterbi.circular_path(targets, grid.table, grid.shift, torch.ones_like(targets) if weighted else None, reach=8)


def main() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda _device: 0)
    )
    sizes: dict[str, int] = {}

    def launch(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*given: object, **options: object) -> None:
            sizes[kernel.fn.__name__] = len(kernel.run(*given, grid=grid, warmup=True, **options).asm["cubin"])

        return run

    JITFunction.__getitem__ = launch
    cases: dict[str, Callable[[], None]] = {
        "feedback": lambda: rounding("feedback", "int4-g32"),
        "feedback-levels": lambda: rounding("feedback", "mxfp4"),
        "feedback-asymmetric-float64": lambda: rounding("feedback", "int2-g32-asym", torch.float64),
        "sweep": lambda: rounding("sweep", "int4-g32"),
        "sweep-levels-uncoupled": lambda: rounding("sweep", "nvfp4", coupled=False),
        "viterbi": lambda: viterbi("trellis2", False),
        "viterbi-pairs-weights": lambda: viterbi("trellis4-hyb", True),
    }
    assert tuple(cases) == CASES
    found = {}
    for name, case in cases.items():
        sizes.clear()
        case()
        found[name] = dict(sizes)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
