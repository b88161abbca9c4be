"""How the cost of rounding grows with the width: d^3 or d^4, for the torch specification and the numba path.

    python benchmarks/rounding.py [--widths 256 512 1024 2048]

For square weights the log-log slope between neighbouring widths is printed: 3 where matrix products rule, less where
overheads do; a recomputing loop would show 4. Feedback and one sweep are timed apart, and the ratio of the paths at
each width.
"""

import argparse
import json
import math
import time
from collections.abc import Callable

import torch

from roundel.grids import parse_scheme
from roundel.rounding import feedback, make_problem, sweep
from roundel.rounding.descent import sweep_rows
from roundel.rounding.feedback import feedback_waves
from roundel.types import KroneckerFactors, RoundingProblem


def problem_of(width: int) -> RoundingProblem:
    generator = torch.Generator().manual_seed(width)
    A, B = (torch.randn(width, 2 * width, generator=generator) for _ in range(2))
    decay = torch.linspace(0, 3, width).exp()
    factors = KroneckerFactors.normalised(A @ A.T * decay.outer(decay), B @ B.T * decay.outer(decay), trace=1.0)
    return make_problem(torch.randn(width, width, generator=generator), factors, damping=0.1)


def timed(run: Callable[[], object], rounds: int) -> float:
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    args = parser.parse_args()
    grid = parse_scheme("int3-g128")
    seconds: dict[str, list[float]] = {}
    for width in args.widths:
        problem = problem_of(width)
        scales = grid.fit_scales(problem.W, problem.H_in.diagonal(), torch.float16)
        codes = feedback(problem, grid, scales)
        sweep(problem, grid, scales, codes)  # compiled by now
        rounds = 3 if width <= 512 else 1
        runs: dict[str, Callable[[], object]] = {
            "feedback, numba": lambda p=problem, s=scales: feedback(p, grid, s),
            "feedback, torch": lambda p=problem, s=scales: feedback_waves(p, grid, s),
            "sweep, numba": lambda p=problem, s=scales, c=codes: sweep(p, grid, s, c),
            "sweep, torch": lambda p=problem, s=scales, c=codes: sweep_rows(p, grid, s, c),
        }
        for name, run in runs.items():
            seconds.setdefault(name, []).append(timed(run, rounds))
    for name, spent in seconds.items():
        pairs = zip(zip(args.widths, spent, strict=True), zip(args.widths[1:], spent[1:], strict=True), strict=False)
        slopes = [round(math.log(t2 / t1) / math.log(d2 / d1), 2) for (d1, t1), (d2, t2) in pairs]
        print(json.dumps({"benchmark": name, "widths": args.widths, "seconds": [round(t, 4) for t in spent], "slope": slopes}))
    for kind in ("feedback", "sweep"):
        ratio = [round(t / n, 1) for t, n in zip(seconds[f"{kind}, torch"], seconds[f"{kind}, numba"], strict=True)]
        print(json.dumps({"benchmark": f"{kind}: torch over numba", "widths": args.widths, "ratio": ratio}))


if __name__ == "__main__":
    main()
