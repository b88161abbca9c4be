"""CPU time and KL of `roundel quantize` beside those of llm-compressor's GPTQ at its defaults, one thread each, in turn in one run.

    python benchmarks/against_gptq.py [MODEL] [--calibration stdlib] [--effort quick] [--bits 4] [--sequences 64] [--seq-len 512] [-o FILE]

MODEL is the embedded one by default; `WIDTHxDEPTH` is a Llama of SmolLM2's proportions with random weights, of which only the times say
something. Both calibrate on the same sequences. Seconds are of the whole process, imports, evaluation and report included (llm-compressor
has none of the last two), and of the quantization alone: its `oneshot`; our stages of curvature and rounding. KL is measured by Roundel on
the same held-out text.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from commands import run
from peers.run import Bench, Work
from sweeps import directory_of

from roundel.artifacts.source import load_source
from roundel.recipes import Recipe
from roundel.stages.report import versions
from roundel.store import write_json


def ours(model: str, recipe: Recipe, scratch: Path) -> dict[str, Any]:
    target = scratch / "out"
    line = [sys.executable, "-m", "roundel", "quantize", model, "-o", str(target), "--quiet"]
    for name in ("scheme", "effort", "calibration", "sequences", "seq_len", "eval_sequences"):
        line += [f"--{name.replace('_', '-')}", str(getattr(recipe, name))]
    spent = run(line)
    report = json.loads((target / "roundel.json").read_text(encoding="utf-8"))
    return {
        "cpu_seconds": spent["cpu_seconds"],
        "quantize_cpu_seconds": report["seconds"]["curvature"] + report["seconds"]["rounding"],
        "kl": report["evaluation"]["kl"]["mean"],
        "kl_stderr": report["evaluation"]["kl"]["stderr"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="stdlib")
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # of our process, as of theirs
    recipe = Recipe.of(
        scheme=f"int{given.bits}-g64",
        effort=given.effort,
        calibration=given.calibration,
        sequences=given.sequences,
        seq_len=given.seq_len,
        eval_sequences=16,
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch, model = Path(folder), given.model
        if shape := re.fullmatch(r"(\d+)x(\d+)", model):
            model = str(directory_of(int(shape[1]), int(shape[2]), scratch))
        bench = Bench(load_source(model, recipe, "cpu", "float32"), recipe, timeout=7200)
        theirs = bench.measure(Work(peer="llm_compressor", method="gptq", bits=given.bits, group=64, seed=recipe.seed), None)
        if theirs["error"]:
            sys.exit(f"llm-compressor: {theirs['error']}")
        row = {"model": given.model, "bits": given.bits, "effort": given.effort, "gptq": theirs, "roundel": ours(model, recipe, scratch)}
    for name in ("cpu_seconds", "quantize_cpu_seconds", "kl"):
        row[f"{name}_over_gptq"] = row["roundel"][name] / row["gptq"][name]
    print(json.dumps(row, indent=1))
    if given.output is not None:
        write_json(given.output, {"kind": "against-gptq", "versions": versions(), **row})


if __name__ == "__main__":
    main()
