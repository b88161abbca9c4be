"""What a step of tuning end to end costs on a CPU: with exact and with fast products, and with freed memory given back or kept.

    python benchmarks/tuning.py [--steps 18] [--rounds 1]

The demo model at `int3-g64`, steps of 2048 tokens on one thread. Each arm runs in a process of its own, all in turn in each round; of
each the least CPU seconds per step are taken, after the first third. A ratio is to the arm that has neither.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import roundel
from roundel.allocator import keep_freed_memory
from roundel.artifacts.checkpoints import read
from roundel.artifacts.source import load_source
from roundel.progress import Silent
from roundel.recipes import NEAREST, Recipe
from roundel.stages.notes import Notes
from roundel.stages.text import split_text
from roundel.tuning import Job, end_to_end, tune_end_to_end

ARMS = {"exact products": (), "fast products": ("fast",), "exact, memory kept": ("keep",), "fast, memory kept": ("fast", "keep")}
TEXT = {"calibration": "stdlib", "eval_data": "stdlib-heldout", "seq_len": 256, "sequences": 128, "eval_sequences": 8}


def measure(directory: Path, steps: int, options: list[str]) -> float:
    """CPU seconds of a step."""
    torch.set_num_threads(1)
    if "keep" in options:
        keep_freed_memory()
    if "fast" not in options:
        end_to_end.fast = lambda function: function
    recipe = Recipe(scheme="int3-g64", **TEXT)
    source = load_source("demo", recipe, "cpu", "auto")
    split = split_text(recipe, source, Notes(Silent()))
    at: list[float] = []
    job = Job(
        source=source,
        rounded=read(directory).rounded,
        tokens=split.calibration[:16],
        unseen=split.calibration[16:18],
        steps=steps,
        step_tokens=2048,
        others={},
        seed=0,
        batch_size=2,
        advance=lambda _count: at.append(time.process_time()),
    )
    tune_end_to_end(job)
    skipped = steps // 3
    return (at[-1] - at[skipped]) / (len(at) - 1 - skipped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(measure(Path(given.one[0]), given.steps, given.one[1:]))
        return
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as scratch:
        rounded = Path(scratch) / "rounded"
        roundel.quantize("demo", output=rounded, scheme="int3-g64", format="native", **{**NEAREST, **TEXT})
        for _ in range(given.rounds):
            for arm, options in ARMS.items():
                command = [sys.executable, __file__, "--steps", str(given.steps), "--one", str(rounded), *options]
                seconds[arm].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
    best = {arm: min(spent) for arm, spent in seconds.items()}
    for arm, spent in best.items():
        ratio = round(spent / best["exact products"], 3)
        print(json.dumps({"benchmark": f"tuning step, {arm}", "seconds": round(spent, 3), "ratio": ratio}))


if __name__ == "__main__":
    main()
