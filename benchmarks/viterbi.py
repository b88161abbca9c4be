"""Speed and distortion of trellis coding.

    python benchmarks/viterbi.py [--tiles 64] [--rounds 5]
    python benchmarks/viterbi.py --distortion out.json [--tiles 512]

Speed, one line of JSON for each number of bits: seconds a tile, the time of the torch specification over that of the compiled coder, and
the coder's over that of plain passes with one minimum and one sum over as many states, all on the same threads (OMP_NUM_THREADS) in
one run, minima over rounds. Then the seconds of a 1024 x 1024 matrix, extrapolated from the tiles that were coded.

Distortion: mean squared error on unit Gaussians, whose RMS is made `headroom` times the code's, with its standard error over tiles, and
beside it the figure known for this code.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import torch

from roundel.grids import trellis
from roundel.grids.trellis import Trellis
from roundel.kernels import viterbi as kernels
from roundel.linalg import viterbi as specification
from roundel.linalg.codebooks import CODES

KNOWN = {
    ("1mad", 0.8): (0.0741, 0.0186, 0.0047),
    ("1mad", 0.9): (0.0692, 0.0175, 0.0044),
    ("1mad", 1.0): (0.0677, 0.0173, 0.0046),
    ("3inst", 0.8): (0.0740, 0.0186, 0.0048),
    ("3inst", 0.9): (0.0691, 0.0177, 0.0045),
    ("3inst", 1.0): (0.0679, 0.0176, 0.0046),
    ("hyb", 0.8): (0.0755, 0.0192, 0.0055),
    ("hyb", 0.9): (0.0711, 0.0184, 0.0052),
    ("hyb", 1.0): (0.0695, 0.0188, 0.0063),
}
"""Earlier measurements with other implementations, for 2, 3 and 4 bits, to 3 %."""


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each, taken in turn, so that a busy moment strikes all."""
    best = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


@numba.njit(nogil=True)
def plain_pass(a: np.ndarray, b: np.ndarray, c: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(a)):
        out[i] = min(a[i], b[i]) + c[i]


def plain_passes(states: int, times: int) -> None:
    def work(times: int) -> None:
        arrays = [np.ones(states, np.float32) for _ in range(4)]
        for _ in range(times):
            plain_pass(*arrays)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [times // threads] * threads))


def speed(tiles: int, rounds: int) -> None:
    plain_passes(2**16, 2)
    for scheme in ("trellis1", "trellis2", "trellis3", "trellis4", "trellis2-hyb", "trellis8"):
        grid = trellis.parse(scheme)
        assert grid is not None
        targets = torch.randn(tiles, 256 // grid.values, grid.values)
        options = {"reach": trellis.REACH // grid.values}
        kernels.circular_path(targets[:1], grid.table, grid.shift, **options)  # compiled by now
        steps = (256 + 2 * trellis.REACH) // grid.values
        few = 2
        seconds = interleaved(
            {
                "numba": lambda t=targets, g=grid, o=options: kernels.circular_path(t, g.table, g.shift, **o),
                "plain": lambda s=steps: plain_passes(2**16, s * tiles),
                "torch": lambda t=targets[:few], g=grid, o=options: specification.circular_path(t, g.table, g.shift, **o),
            },
            rounds,
        )
        tile = seconds["numba"] / tiles
        line = {
            "benchmark": scheme,
            "threads": torch.get_num_threads(),
            "tiles": tiles,
            "milliseconds_per_tile": round(1e3 * tile, 3),
            "torch_over_numba": round(seconds["torch"] / few / tile, 1),
            "numba_over_add_and_minimum": round(seconds["numba"] / seconds["plain"], 2),
            "seconds_for_1024x1024_extrapolated": round(4096 * tile, 2),
        }
        print(json.dumps(line), flush=True)


def distortion(tiles: int, codes: list[str], widths: list[int], headrooms: list[float]) -> list[dict[str, object]]:
    gaussian = torch.randn(tiles, 256, generator=torch.Generator().manual_seed(0))
    lines: list[dict[str, object]] = []
    for code in codes:
        for width in widths:
            for headroom in headrooms:
                grid = Trellis(width=width, code=code)
                unit = grid.rms * headroom
                error = grid.decode_tiles(grid.encode_tiles(gaussian * unit)) / unit - gaussian
                by_tile = error.double().square().mean(1)
                line: dict[str, object] = {"code": code, "bits": width, "headroom": headroom, "tiles": tiles}
                line |= {"mse": round(by_tile.mean().item(), 6), "standard_error": round(by_tile.std().item() / math.sqrt(tiles), 6)}
                if (code, headroom) in KNOWN and width in (2, 3, 4):
                    line["known"] = KNOWN[code, headroom][width - 2]
                print(json.dumps(line), flush=True)
                lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--distortion", type=Path, metavar="OUT")
    parser.add_argument("--codes", nargs="+", default=list(CODES))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--headrooms", type=float, nargs="+", default=[0.8, 0.9, 1.0])
    args = parser.parse_args()
    if args.distortion is None:
        speed(args.tiles or 64, args.rounds)
    else:
        lines = distortion(args.tiles or 512, args.codes, args.bits, args.headrooms)
        args.distortion.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
