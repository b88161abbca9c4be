"""Accuracies of the original on tasks, and of quantized models on those where they say anything: paired differences over seeds.

    python studies/tasks.py MODEL --calibration SPEC [--eval-data SPEC] --task-data DIR --schemes int2-g32,... [--seeds 0 1 2] -o FILE.json

A task on which the original itself is not above chance by two standard errors says nothing of quantization, and no other model is asked.
The default recipe; its factors are collected once for each seed and kept in `FILE.work`. Rows are saved as they come, and those that are
there are not run again. Needs lm-evaluation-harness: `make test-tasks` installs it.
"""

import argparse
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import torch

import roundel
from roundel.errors import DataError
from roundel.models import locate
from roundel.stages.report import versions
from roundel.store import write_json

TASKS = ("lambada_openai", "arc_easy", "piqa", "boolq", "winogrande", "hellaswag")


def chance(name: str, directory: Path) -> float:
    """Accuracy of an answer that does not look at the question: of the most frequent answer where that is better than a draw."""
    if name == "lambada_openai":
        return 0.0
    if name == "hellaswag":
        return 0.25
    rows = [json.loads(line) for line in (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() if line.strip()]
    golds = [row["gold"] for row in rows]
    share = max(golds.count(gold) for gold in set(golds)) / len(golds)
    options = [len(row.get("choices") or row.get("context_options") or (0, 1)) for row in rows]
    return max(share, sum(1 / count for count in options) / len(options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--schemes", required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-sequences", type=int, default=64)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = {name: getattr(given, name) for name in ("calibration", "sequences", "seq_len", "eval_sequences")}
    found: dict[str, Any] = json.loads(given.output.read_text()) if given.output.exists() else {"rows": []}
    tasks = given.tasks.split(",")
    found |= {
        "model": given.model,
        "limit": given.limit,
        "chance": {name: chance(name, given.task_data) for name in tasks},
        "versions": versions(),
        "lm_eval": importlib.metadata.version("lm-eval"),
    }
    work = given.output.with_suffix(".work")

    def measure(model: str | Path, name: str) -> dict[str, Any]:
        measured = roundel.evaluate(model, reference=given.model, tasks=[name], task_data=given.task_data, task_limit=given.limit)
        return dict(measured.details["tasks"][name])

    telling = []
    for name in tasks:
        if name in found.setdefault("errors", {}):
            continue
        if name not in found.setdefault("original", {}):
            try:
                found["original"][name] = measure(locate(given.model), name)
            except DataError as error:
                found["errors"][name] = str(error)
                print(error, flush=True)
                continue
            finally:
                write_json(given.output, found)
        own, least = found["original"][name], found["chance"][name]
        if own["reference"] - least > 2 * own["reference_stderr"]:
            telling.append(name)
        print("original", name, own["reference"], "chance", least, flush=True)
    for seed in given.seeds:
        for scheme in given.schemes.split(","):
            missing = [
                name
                for name in telling
                if not any((row["seed"], row["scheme"], row["task"]) == (seed, scheme, name) for row in found["rows"])
            ]
            if not missing:
                continue
            factors, output = work / str(seed), work / "out"
            roundel.collect_factors(given.model, output=factors, resume=True, seed=seed, **text)
            shutil.rmtree(output, ignore_errors=True)
            made = roundel.quantize(
                given.model, output=output, factors=factors, scheme=scheme, seed=seed, eval_data=given.eval_data, format="native", **text
            )
            for name in missing:
                measured = measure(output, name)
                found["rows"].append({"scheme": scheme, "seed": seed, "task": name, "kl": made.report.kl_mean, **measured})
                write_json(given.output, found)
                print(scheme, seed, name, measured["value"], measured["reference"], flush=True)


if __name__ == "__main__":
    main()
