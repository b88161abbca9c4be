"""How long models of 8, 70 and 235 billion weights would take that nobody has run here, from what has been measured of single layers.

    python studies/estimates.py CONFIG_DIR ... [--scheme int4-g128] [-o FILE.json]

A directory holds a config.json. On a GPU, from `benchmarks/results/gpu-h200.json`: rounding at the multiply-adds a second of its row of
4096 x 14336, feedback and sweeps apart; factorisations in float64 at those of the same row; all products over text at the rate of its row
of tuning, which has everything in it that is no product, so that it is a low one. On several GPUs sequences are divided, and the linears
that read the same tensor (experts: all) go to different ones, by size (`processes.shared_out`). On a CPU server: what `roundel plan` says
on this machine, taken to `CORES` cores at `EFFICIENCY`. Reading weights three times at `READING` bytes a second is in all of them.

What they are not: measured. No network between GPUs is counted.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from roundel.artifacts.source import outlined_source
from roundel.models.experts import experts_of
from roundel.recipes import Recipe
from roundel.stages.evaluation import PREDICTED
from roundel.stages.plan import plan
from roundel.stages.timing import INVERSES, units_of
from roundel.store import write_json

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
CORES, EFFICIENCY, READING = 64, 0.5, 2e9


def rates() -> dict[str, float]:
    """Of an H200: multiply-adds a second of feedback, of a sweep, of a factorisation, of products over text."""
    found = json.loads((RESULTS / "gpu-h200.json").read_text(encoding="utf-8"))
    [row] = [row for row in found["matrix"] if row["shape"] == [4096, 14336] and row["scheme"].startswith("int4")]
    [tuned] = found["tuning"]
    d_out, d_in = row["shape"]
    once = d_out * d_in * (d_out + d_in)
    sweeps = [sweep + refit for sweep, refit in zip(row["sweeps"], row["refits"], strict=True)]
    return {
        "fixed": once / (row["total"] - sum(sweeps)),
        "sweep": once * len(sweeps) / sum(sweeps),
        "factorisation": (d_out**3 + d_in**3) / row["factorisation"],
        "products": 4 * tuned["weights"] * tuned["tokens"] / tuned["step_seconds_with_a_check_each"],
    }


def on_gpus(source: Any, recipe: Recipe, count: int, rate: dict[str, float]) -> float:
    """Seconds."""
    length = recipe.seq_len
    units = units_of(source)
    over_text = recipe.sequences * (units.gradients + 3 * units.head) + recipe.prefix_count * units.moments
    over_text += recipe.eval_sequences * 2 * (units.forward + units.head) + PREDICTED * (units.gradients + 3 * units.head)
    seconds = over_text * length / rate["products"] / count
    sets: dict[tuple[str, str], list[float]] = {}
    for name, linear in source.linears.items():
        d_out, d_in = linear.out_features, linear.in_features
        once = d_out * d_in * (d_out + d_in)
        cubes = d_out**3 + d_in**3
        seconds += INVERSES * cubes / rate["factorisation"]
        spent = once / rate["fixed"] + recipe.sweeps * once / rate["sweep"] + 2 * cubes / rate["factorisation"]
        layer, _, own = name.rpartition(".")
        if experts_of(source.model, name) is not None:
            key = (name.split(".mlp")[0].split(".block_sparse_moe")[0], "experts")
        else:
            key = (layer, {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(own, own))
        sets.setdefault(key, []).append(spent)
    for own in sets.values():
        loads = [0.0] * count
        for spent in sorted(own, reverse=True):
            loads[loads.index(min(loads))] += spent
        seconds += max(loads)
    return seconds + 3 * 2 * units.weights / READING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    rate, rows = rates(), []
    for path in given.configs:
        recipe = Recipe.of(scheme=given.scheme, effort="quick")
        source = outlined_source(str(path), recipe)
        here = plan(str(path), scheme=given.scheme, effort="quick")
        rows.append(
            {
                "model": path.name,
                "parameters": source.parameters,
                "one_gpu_minutes": on_gpus(source, recipe, 1, rate) / 60,
                "eight_gpus_minutes": on_gpus(source, recipe, 8, rate) / 60,
                "cpu_server_hours": here["total_seconds"] * (os.cpu_count() or 1) / CORES / EFFICIENCY / 3600,
                "here_hours": here["total_seconds"] / 3600,
                "memory": here["memory"],
            }
        )
        print(rows[-1], flush=True)
    if given.output is not None:
        content = {"kind": "estimates", "scheme": given.scheme, "effort": "quick", "rates": rate}
        write_json(given.output, {**content, "cores": CORES, "efficiency": EFFICIENCY, "reading": READING, "rows": rows})


if __name__ == "__main__":
    main()
