"""What each stage after rounding is worth: KL, CPU seconds and peak memory of untuned, prefix-aware and tuned models.

    python studies/tuning.py MODEL --calibration SPEC [--eval-data SPEC] --schemes int2-g32,... [--arms ...] [--seeds 0 1 2] -o FILE.json

Arms: `untuned`, `prefix-aware`, `blocks`, `end-to-end`. All arms of a seed have the same text, labels and factors, which are collected once
and kept in `FILE.work`; a seed draws the calibration text. Each arm runs in a process of its own, so that its peak memory is its own; CPU
seconds are those of the stages after curvature, without writing and evaluation, and stand beside those of collecting. Rows are saved as
they come, and those that are there are not run again. `--figure DIR` draws KL against steps from the file.
"""

import argparse
import importlib.metadata
import json
import resource
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import roundel
from roundel.allocator import keep_freed_memory
from roundel.evaluate.plots import curves
from roundel.recipes import Recipe
from roundel.stages.report import versions
from roundel.store import write_json

ARMS: dict[str, dict[str, Any]] = {
    "untuned": {"prefix_aware": False},
    "prefix-aware": {"prefix_aware": True},
    "blocks": {"tune": "blocks"},
    "end-to-end": {"tune": "end-to-end"},
}


def run(model: str, factors: Path, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does
    began = time.process_time()
    result = roundel.quantize(model, output=output, factors=factors, format="native", **settings)
    spent = time.process_time() - began
    stages = result.details["seconds"]
    after = sum(seconds for name, seconds in stages.items() if name in ("rounding", "tuning"))
    return {
        "kl": result.report.kl_mean,
        "kl_stderr": result.report.kl_stderr,
        "top1": result.report.top1_agreement,
        "bits_per_weight": result.details["bits_per_weight"]["quantized"],
        "cpu_seconds": spent * after / sum(stages.values()),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tuning": result.details["tuning"],
        "warnings": result.details["warnings"],
    }


def collect(model: str, output: Path, settings: dict[str, Any]) -> float:
    torch.set_num_threads(1)
    began = time.process_time()
    roundel.collect_factors(model, output=output, resume=True, **settings)
    return time.process_time() - began


def alone(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| scheme | arm | KL | against untuned | top-1 | CPU s | peak MiB | seeds |", "|---|---|---|---|---|---|---|---|"]
    for scheme, arm in dict.fromkeys((row["scheme"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["scheme"], row["arm"]) == (scheme, arm)]
        plain = {row["seed"]: row["kl"] for row in rows if (row["scheme"], row["arm"]) == (scheme, "untuned")}
        kl, error = statistics.mean(row["kl"] for row in own), statistics.mean(row["kl_stderr"] for row in own)
        ratios = [row["kl"] / plain[row["seed"]] for row in own if row["seed"] in plain]
        spread = f" ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.3f}" if len(ratios) > 1 else ""
        against = f"{statistics.mean(ratios):.3f}{spread}" if ratios else ""
        means = [statistics.mean(row[key] for row in own) for key in ("top1", "cpu_seconds", "peak_mib")]
        shown = f"{100 * means[0]:.1f} % | {means[1]:.0f} | {means[2]:.0f} | {len(own)}"
        lines.append(f"| {scheme} | {arm} | {kl:.4g} ± {error:.2g} | {against} | {shown} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], directory: Path, name: str) -> None:
    """KL against steps, on held-out and on calibration text, of seed 0 end to end."""
    panels: dict[str, Any] = {}
    for row in rows:
        if row["arm"] == "end-to-end" and row["seed"] == min(other["seed"] for other in rows):
            history = row["tuning"]["history"]
            panels[row["scheme"]] = {
                "held-out text": [(point["step"], point["held_out_kl"], 0.0) for point in history],
                "calibration text": [(point["step"], point["calibration_kl"], 0.0) for point in history if "calibration_kl" in point],
            }
    xlabel = f"steps of {Recipe(tune='end-to-end').step_tokens} tokens"
    figure = curves(panels, title=f"Tuning end to end, {name}", xlabel=xlabel, ylabel="KL, nats per token", doubling=False)
    (directory / f"tuning-{name}.png").write_bytes(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--schemes", required=True)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-sequences", type=int, default=64)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    text = {name: getattr(given, name) for name in ("calibration", "sequences", "seq_len", "eval_sequences")}
    found = json.loads(given.output.read_text()) if given.output.exists() else {"rows": [], "collecting": {}}
    rows = found["rows"]
    work = given.output.with_suffix(".work")
    for seed in given.seeds:
        for scheme in given.schemes.split(","):
            for arm in given.arms.split(","):
                if any((row["seed"], row["scheme"], row["arm"]) == (seed, scheme, arm) for row in rows):
                    continue
                factors = work / str(seed)
                if str(seed) not in found["collecting"]:
                    found["collecting"][str(seed)] = alone(collect, given.model, factors, {**text, "seed": seed})
                settings = {**ARMS[arm], "scheme": scheme, "seed": seed, **text, "eval_data": given.eval_data, "tune_steps": given.steps}
                output = work / "out"
                shutil.rmtree(output, ignore_errors=True)
                rows.append({"scheme": scheme, "arm": arm, "seed": seed, **alone(run, given.model, factors, output, settings)})
                found |= {
                    "roundel": importlib.metadata.version("roundel"),
                    "versions": versions(),
                    "steps": given.steps,
                    "text": sorted(text),
                }
                write_json(given.output, found)
                print(scheme, arm, seed, rows[-1]["kl"], round(rows[-1]["cpu_seconds"]), flush=True)
    print(table(rows))
    if given.figure:
        draw(rows, given.figure, Path(given.model).name)


if __name__ == "__main__":
    main()
