"""Cost and memory against depth: random Llamas of the same widths and 4 to 32 layers, quantized one after the other in one run.

Time should be a line through the origin plus the head, peak memory the same for all, within 10 % (disk aside). Prints a table, writes JSON.

    python benchmarks/depth.py -o benchmarks/results/depth.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from roundel.stages.report import versions
from roundel.store import write_json

DEPTHS = (4, 8, 16, 32)
WIDTHS = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
SETTINGS = {
    **{"scheme": "int4-g128", "curvature": "pilot", "sequences": 32, "prefix_sequences": 64, "seq_len": 256, "eval_sequences": 8},
    **{"calibration": "stdlib", "natural_places": 0},  # as for models that are not small
}
MEMORY = "32M"
"""So little that all of them stay on the disk."""


def make(directory: Path, layers: int) -> None:
    """A random model with the demo model's tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from roundel.models.load import DEMO

    torch.manual_seed(0)
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    config = LlamaConfig(vocab_size=max(tokenizer["model"]["vocab"].values()) + 64, num_hidden_layers=layers, **WIDTHS)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, directory)


def one(directory: str) -> None:
    """In a process of its own: what one quantization takes."""
    import roundel

    with tempfile.TemporaryDirectory() as scratch:
        result = roundel.quantize(directory, output=Path(scratch) / "out", memory=MEMORY, **SETTINGS)
    seconds = {name: spent for name, spent in result.details["seconds"].items() if name not in ("load", "text")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "total": sum(seconds.values()), "peak_mib": peak, "kl": result.report.kl_mean}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.one:
        one(given.one)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for layers in DEPTHS:
            directory = Path(scratch) / str(layers)
            make(directory, layers)
            found = subprocess.run([sys.executable, __file__, "--one", directory], check=True, capture_output=True, text=True)
            rows.append({"layers": layers, **json.loads(found.stdout.splitlines()[-1])})
            print(layers, rows[-1], flush=True)
    # least squares of seconds = head + slope * layers, relative errors
    import numpy as np

    depth, seconds = (np.array([row[key] for row in rows], dtype=float) for key in ("layers", "total"))
    system = np.stack([np.ones_like(depth), depth], axis=1) / seconds[:, None]
    head, slope = np.linalg.lstsq(system, np.ones_like(depth), rcond=None)[0]
    for row in rows:
        row["of_the_line"] = row["total"] / (head + slope * row["layers"])
    peaks = [row["peak_mib"] for row in rows]
    summary = {"head_seconds": head, "seconds_per_layer": slope, "peak_ratio": max(peaks) / min(peaks)}
    print(f"seconds = {head:.1f} + {slope:.2f} layers; off the line at most {100 * max(abs(row['of_the_line'] - 1) for row in rows):.0f} %")
    print(f"peak memory, largest to smallest: {summary['peak_ratio']:.3f}")
    if given.output:
        widths = {"widths": WIDTHS, "settings": SETTINGS, "memory": MEMORY, "versions": versions()}
        write_json(given.output, {"kind": "depth", "rows": rows, **summary, **widths})


if __name__ == "__main__":
    main()
