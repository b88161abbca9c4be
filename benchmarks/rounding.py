"""How the cost of rounding grows with the width: d^3 or d^4, for the torch specification and the numba path; and beside another version.

    python benchmarks/rounding.py [--widths 256 512 1024 2048]
    python benchmarks/rounding.py --against ddf48da --shapes 576x1536 1536x8960 [-o benchmarks/results/rounding.json]

The second line rounds whole weights (int4-g64, four sweeps, or --sweeps of this tree) with this tree and with a commit's, in turns and in
processes of their own, and compares seconds with those of a float32 product of the same multiply-adds, codes of feedback and of the first
sweep, and final losses.

For square weights the log-log slope between neighbouring widths is printed: 3 where matrix products rule, less where
overheads do; a recomputing loop would show 4. Feedback and one sweep are timed apart, and the ratio of the paths at
each width.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from roundel.grids import parse_scheme
from roundel.rounding import feedback, make_problem, round_weight, sweep
from roundel.rounding.descent import sweep_rows
from roundel.rounding.feedback import feedback_waves
from roundel.stages.report import versions
from roundel.store import write_json
from roundel.types import KroneckerFactors, RoundingProblem

SWEEPS = 4


def problem_of(d_out: int, d_in: int) -> RoundingProblem:
    """Channels differ in size by a factor of 20, and are correlated as those of twice as many tokens as channels are."""
    generator = torch.Generator().manual_seed(d_in)

    def covariance(width: int) -> torch.Tensor:
        A, decay = torch.randn(width, 2 * width, generator=generator), torch.linspace(0, 3, width).exp()
        return A @ A.T * decay.outer(decay)

    factors = KroneckerFactors.normalised(covariance(d_out), covariance(d_in), trace=1.0)
    return make_problem(torch.randn(d_out, d_in, generator=generator), factors, damping=0.1)


def whole(d_out: int, d_in: int, sweeps: int) -> dict[str, Any]:
    """One weight: seconds of all of it, of its parts, and of a product of as many multiply-adds; what came out."""
    problem, grid = problem_of(d_out, d_in), parse_scheme("int4-g64")
    tiny = problem_of(128, 128)
    round_weight(tiny, grid, sweeps=1, scale_dtype=torch.float16)  # compiled by now
    A, B = torch.randn(d_out, d_in), torch.randn(d_in, d_out + d_in)
    scales = grid.fit_scales(problem.W, problem.H_in.diagonal(), torch.float16)
    codes = feedback(problem, grid, scales)
    swept = sweep(problem, grid, scales, codes)
    began = time.perf_counter()
    rounded = round_weight(problem, grid, sweeps=sweeps, scale_dtype=torch.float16)
    return {
        "seconds": time.perf_counter() - began,
        "feedback_seconds": timed(lambda: feedback(problem, grid, scales), 2),
        "product_seconds": timed(lambda: A @ B, 2),
        "codes": _saved(codes, swept),
        "loss": problem.loss(problem.W - grid.dequantize(rounded.codes, rounded.scales, problem.shape, torch.float32)),
        "sweeps": len(rounded.trace) - 1,
    }


def _saved(*codes: torch.Tensor) -> str:
    with tempfile.NamedTemporaryFile(suffix=".pt", delete=False) as file:
        torch.save(codes, file)
    return file.name


def differing(one: str, other: str) -> list[float]:
    """Parts of the codes of feedback and sweep that two runs have not in common; the files are removed."""
    found = [torch.load(name) for name in (one, other)]
    for name in (one, other):
        Path(name).unlink(missing_ok=True)
    return [float((a != b).float().mean()) for a, b in zip(*found, strict=True)]


def against(commit: str, shapes: list[str], sweeps: int, output: Path | None) -> None:
    """This tree, with so many sweeps, and another, with four, in turns."""
    root, rows = Path(__file__).parent.parent, []
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(["git", "-C", str(root), "worktree", "add", "--detach", str(other), commit], check=True, capture_output=True)
        try:
            for shape in shapes:
                found: dict[str, list[dict[str, Any]]] = {"now": [], "before": []}
                for _ in range(2):
                    for name, tree in (("before", other), ("now", root)):
                        line = [sys.executable, __file__, "--whole", shape, str(sweeps if name == "now" else SWEEPS)]
                        environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
                        done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
                        found[name].append(json.loads(done.stdout.splitlines()[-1]))
                best = {name: {k: min(run[k] for run in runs) for k in runs[0] if "seconds" in k} for name, runs in found.items()}
                now, before = found["now"][0], found["before"][0]
                row = {
                    "shape": shape,
                    "before": best["before"],
                    "now": best["now"],
                    "ratio": best["before"]["seconds"] / best["now"]["seconds"],
                    "over_product": best["now"]["seconds"] / best["now"]["product_seconds"],
                    "differing_codes": differing(now["codes"], before["codes"]),
                    "loss_ratio": now["loss"] / before["loss"],
                    "sweeps": [before["sweeps"], now["sweeps"]],
                }
                print(json.dumps(row), flush=True)
                rows.append(row)
        finally:
            subprocess.run(["git", "-C", str(root), "worktree", "remove", "--force", str(other)], check=True)
    if output is not None:
        content = {
            "kind": "rounding",
            "scheme": "int4-g64",
            "against": commit,
            "rows": rows,
            "versions": versions(),
            "cores": os.cpu_count(),
        }
        write_json(output, content)


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
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "1536x8960"])
    parser.add_argument("--sweeps", type=int, default=SWEEPS, help="Over all rows, of this tree; the other commit has four.")
    parser.add_argument("--whole", nargs=2, metavar=("SHAPE", "SWEEPS"), help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.whole:
        d_out, d_in = map(int, args.whole[0].split("x"))
        print(json.dumps(whole(d_out, d_in, int(args.whole[1]))))
        return
    if args.against:
        against(args.against, args.shapes, args.sweeps, args.output)
        return
    grid = parse_scheme("int3-g128")
    seconds: dict[str, list[float]] = {}
    for width in args.widths:
        problem = problem_of(width, width)
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
