"""Triton's kernels against their torch specifications, run by Triton's interpreter on the CPU: no GPU is needed.

The interpreter is chosen by the environment when Triton is imported, so all cases run in one process of their own (this file as a program),
which prints for each case how many codes there are, how many differ, and how many differ from those that the case started with.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROUNDING = {
    # scheme, rows, columns, rows are coupled
    "feedback-int4": ("int4-g8", 21, 24, True),
    "feedback-asymmetric": ("int2-g4-asym", 11, 24, True),
    "feedback-levels": ("mxfp4", 11, 32, True),
    "feedback-row": ("int3-channel", 1, 24, True),
    "sweep-int4": ("int4-g8", 9, 72, True),
    "sweep-asymmetric": ("int2-g4-asym", 9, 40, True),
    "sweep-levels": ("mxfp4", 9, 32, True),
    "sweep-uncoupled": ("int3-channel", 6, 40, False),
    "sweep-in-parts": ("int4-g8", 21, 72, True),  # with a direction that all channels share, so that whole waves are refused
}
VITERBI = {
    # state bits, bits of a symbol, values, weights, candidates
    "viterbi-k1": (6, 1, 1, False, 1),
    "viterbi-k2": (8, 2, 1, True, 2),
    "viterbi-k3": (7, 3, 2, True, 1),
    "viterbi-k4": (6, 4, 1, False, 1),
    "viterbi-one-edge": (3, 3, 1, True, 1),
}
ZERO_STEP = "feedback-zero-step"


@pytest.fixture(scope="module")
def counts() -> dict[str, list[int]]:
    pytest.importorskip("triton")
    tests = Path(__file__).parent.parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [*ROUNDING, *VITERBI, ZERO_STEP])
def test_triton_equals_its_specification(counts: dict[str, list[int]], case: str) -> None:
    codes, different, changed = counts[case]
    assert different == 0
    assert changed > codes // 100  # there was something to do


def rounding_case(
    kind: str, scheme: str, d_out: int, d_in: int, coupled: bool, zero_step: bool = False, in_parts: bool = False
) -> list[int]:
    """Float64, where no target lies at a boundary between two codes; tiles and spans so small that there are several of each."""
    from laws.problems import covariance, draw, scales_for, with_factors
    from roundel.grids import ScalarGrid, parse_scheme
    from roundel.kernels import triton_rounding
    from roundel.rounding import nearest
    from roundel.rounding.descent import sweep_waves
    from roundel.rounding.feedback import feedback_waves

    grid = parse_scheme(scheme)
    assert isinstance(grid, ScalarGrid)
    W = draw(d_out, d_in, seed=d_out)
    if zero_step:
        W[:5] = 0
    H_out = covariance(d_out, 1) if coupled else torch.diag(draw(d_out, seed=2).abs() + 0.1)
    H_in, H_out = (H + in_parts * 20 * H.diagonal().mean() for H in (covariance(d_in, 3), H_out))
    problem = with_factors(W, H_out, H_in, damping=0.1)
    scales = dict(scales_for(problem, grid))
    if zero_step:
        scales["scale"] = scales["scale"].clone()
        scales["scale"][:3] = 0
    step, offset = grid.affine(scales, problem.shape, W.dtype)
    given = step, offset, grid.level_table(), *grid.code_range
    start = nearest(W, grid, scales)
    if kind == "feedback":
        expected = feedback_waves(problem, grid, scales)
        found = triton_rounding.feedback(W, problem.L_out, problem.L_in, *given, block=8)
    else:
        expected = sweep_waves(problem, grid, scales, start, tile=(4, 8))
        before = start.clone()
        found = triton_rounding.sweep(W, problem.H_out, problem.H_in, *given, start, tile=(4, 8))
        assert torch.equal(start, before)
    assert found.dtype == torch.int8
    if not zero_step:
        return [found.numel(), int((found != expected).sum()), int((found != start).sum())]
    values = grid.decode(found, step, offset) - grid.decode(expected, step, offset)
    return [found.numel(), int((values != 0).sum()), int((found != start).sum())]


def viterbi_case(state_bits: int, shift: int, values: int, weighted: bool, candidates: int) -> list[int]:
    from roundel.kernels import triton_viterbi
    from roundel.linalg import viterbi

    random = torch.Generator().manual_seed(state_bits + 10 * shift)
    code = torch.randn(2**state_bits, values, generator=random)
    code[1::3] = code[::3][: len(code[1::3])]  # equal costs: the tie rule is seen
    targets = torch.randn(3, 9, values, generator=random)
    weights = torch.rand(3, 9, values, generator=random) if weighted else None
    options = {"candidates": min(candidates, 2 ** (state_bits - shift)), "reach": 5}
    expected, its_cost = viterbi.circular_path(targets, code, shift, weights, **options)
    found, cost = triton_viterbi.circular_path(targets, code, shift, weights, **options)
    nearest = (code - targets.unsqueeze(2)).square().sum(-1).argmin(-1)
    different = int((found != expected).sum()) + int((cost != its_cost).sum())
    return [found.numel(), different, int((found != nearest).sum()) if state_bits > shift else found.numel()]


def main() -> None:
    runs: dict[str, Callable[[], list[int]]] = {}
    for name, case in ROUNDING.items():
        runs[name] = lambda n=name, c=case: rounding_case(n.split("-")[0], *c, in_parts=n.endswith("in-parts"))
    for name, numbers in VITERBI.items():
        runs[name] = lambda n=numbers: viterbi_case(*n)
    runs[ZERO_STEP] = lambda: rounding_case("feedback", "int4-g8", 9, 16, True, zero_step=True)
    print(json.dumps({name: run() for name, run in runs.items()}))


if __name__ == "__main__":
    main()
