"""The fast transform against the product with its dense matrix, in one run.

    python benchmarks/hadamard.py [--widths 4096 14336 ...] [--rows 256] [--device cpu]

The ratio is what counts: machines differ in both.
"""

import argparse
import json
import math
import time
from collections.abc import Callable

import torch

from roundel.linalg.hadamard import hadamard


def timed(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    best = math.inf
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096, 4864, 9728, 11008])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    for width in args.widths:
        x = torch.randn(args.rows, width, device=device)
        matrix = hadamard(torch.eye(width, device=device))
        hadamard(x)  # tables are made now
        fast, dense = timed(lambda x=x: hadamard(x), device), timed(lambda x=x, H=matrix: x @ H, device)
        difference = (hadamard(x) - x @ matrix).abs().max().item()
        line = {
            "width": width,
            "rows": args.rows,
            "device": args.device,
            "fast_ms": round(1e3 * fast, 3),
            "dense_ms": round(1e3 * dense, 3),
        }
        print(json.dumps({**line, "dense_over_fast": round(dense / fast, 1), "max_difference": difference}))


if __name__ == "__main__":
    main()
