"""KL against time on a real model: `roundel quantize` at each effort, in a process of its own, measured by plain Transformers.

    python benchmarks/real.py MODEL --calibration TEXT --heldout TEXT [--scheme int3-g64] [--efforts quick,normal] -o FILE.json

Time is that of the whole command, reading, writing, evaluation and report included; memory the largest resident set of the process. The KL
is that of the written directory and of the original as Transformers loads them in float32, on the last sequences of the held-out text.
Rows that the file has already, of the same settings, are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from roundel.stages.report import versions
from roundel.store import write_json


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def run(line: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of one command."""
    began = time.monotonic()
    process = subprocess.Popen(line)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(line)}: exit {os.waitstatus_to_exitcode(status)}")
    return {"seconds": time.monotonic() - began, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}


@torch.no_grad()
def measured(directory: str, model: str, text: Path, sequences: int, length: int) -> dict[str, float]:
    """KL(original || quantized) in nats per token, its standard error over sequences, and both perplexities."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = ids[-sequences * length :].view(sequences, length)
    both = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (model, directory)]
    kl, losses = [], [0.0, 0.0]
    for window in windows:
        original, quantized = (own(window[None]).logits[0].float().log_softmax(-1) for own in both)
        kl.append((original.exp() * (original - quantized)).sum(-1).mean())
        for which, found in enumerate((original, quantized)):
            losses[which] -= found[:-1].gather(1, window[1:, None]).mean().item() / sequences
    each = torch.stack(kl)
    return {
        "kl": each.mean().item(),
        "kl_stderr": (each.std() / len(each) ** 0.5).item(),
        "perplexity_original": float(torch.tensor(losses[0]).exp()),
        "perplexity": float(torch.tensor(losses[1]).exp()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--scheme", default="int3-g64")
    parser.add_argument("--efforts", default="quick,normal")
    parser.add_argument("--sequences", type=int, default=24, help="Held-out ones.")
    parser.add_argument("--work", type=Path, help="As that of quantize; what a resumed job takes is what is left of it.")
    parser.add_argument("--keep", type=Path, help="Directory for the quantized models; by default they are removed.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given, options = parser.parse_known_args()
    content: dict[str, Any] = read_json(given.output) if given.output.is_file() else {"kind": "real", "rows": []}
    for effort in given.efforts.split(","):
        key = {"model": Path(given.model).name, "scheme": given.scheme, "effort": effort, "options": options}
        if any(all(row.get(name) == value for name, value in key.items()) for row in content["rows"]):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            output = str((given.keep or Path(scratch)) / f"{Path(given.model).name}-{given.scheme}-{effort}")
            line = [str(Path(sys.executable).parent / "roundel"), "quantize", given.model, "-o", output, "--scheme", given.scheme]
            line += ["--effort", effort, "--calibration", str(given.calibration), "--eval-data", str(given.heldout)]
            line += ["--eval-sequences", str(given.sequences), *options]
            began = time.monotonic()
            plan = [line[0], "plan", *line[2:3], *line[5:], "--json", f"{scratch}/plan.json", "--quiet"]
            subprocess.run(plan, check=True)
            planned = {**read_json(Path(scratch) / "plan.json"), "took_seconds": time.monotonic() - began}
            spent = run(line + (["--work", str(given.work)] if given.work else []))
            report = read_json(Path(output) / "roundel.json")
            kept = ("seconds", "total_seconds", "memory", "timed", "took_seconds")
            stages = {
                "planned": {name: planned[name] for name in kept},
                "stages": report["seconds"],
                "bits_per_weight": report["bits_per_weight"]["quantized"],
            }
            found = measured(output, given.model, given.heldout, given.sequences, report["recipe"]["seq_len"])
        content["rows"].append({**key, **spent, **stages, **found, "versions": versions(), "cores": os.cpu_count()})
        print(content["rows"][-1], flush=True)
        write_json(given.output, content)


if __name__ == "__main__":
    main()
