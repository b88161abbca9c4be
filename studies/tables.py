"""Tables of the documentation from the JSON in benchmarks/results: `python studies/tables.py [--check]`.

A table stands between `<!-- NAME -->` and `<!-- end -->`, below the command that made its numbers, and is not written by hand. With
`--check` nothing is written, and the exit code says whether anything would change; a test does the same.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("results.md", "engines/index.md", "guarantees.md", "refine.md")))
RESULTS = ROOT / "benchmarks" / "results"

PEERS = {
    ("llm_compressor", "rtn"): "nearest (llm-compressor)",
    ("llm_compressor", "awq"): "AWQ (llm-compressor)",
    ("gptq_model", "gptq"): "GPTQ (GPTQModel)",
    ("llm_compressor", "gptq"): "GPTQ (llm-compressor)",
    ("gptq_model", "gptaq"): "GPTAQ (GPTQModel)",
    ("llm_compressor", "gptq-mse"): "GPTQ, MSE scales (llm-compressor)",
    ("autoround", "iters-50"): "AutoRound, 50 iterations",
    ("autoround", "iters-200"): "AutoRound, 200 iterations",
    ("autoround", "iters-1000"): "AutoRound, 1000 iterations",
}
ARMS = {
    "untuned": "**Roundel, `--no-prefix-aware`**",
    "error-aware": "Roundel until 79edaf3, error-aware",
    "prefix-aware": "**Roundel, the default**",
    "blocks": "**Roundel, `--tune blocks`**",
    "end-to-end": "**Roundel, `--tune end-to-end`**",
}
TEXTS = ("c4", "wikitext2", "code")
Rows = list[dict[str, Any]]


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def with_error(value: float, error: float) -> str:
    """Two digits of the error."""
    places = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 5
    return f"{value:.{places}f} ± {error:.{places}f}"


def seconds(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.0f} ± {spread(values):.0f}"


def spread(values: Sequence[float]) -> float:
    """Standard error of the mean over seeds."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


# --- comparisons


def estimators(name: str) -> str:
    """KL and perplexity of each method and scheme; errors over sequences for KL, over seeds for both in a column of its own."""
    found = load(name)
    schemes, summary, rows = found["schemes"], found["summary"], found["rows"]
    methods = list(dict.fromkeys(row["method"] for row in summary))
    by = {(row["method"], row["scheme"]): row for row in summary}

    def over_seeds(method: str, scheme: str, key: str) -> list[float]:
        return [row[key] for row in rows if (row["method"], row["scheme"]) == (method, scheme)]

    kl, perplexity = [], []
    for method in methods:
        first = by[method, schemes[0]]
        relative = max(spread(over_seeds(method, scheme, "kl")) / by[method, scheme]["kl"] for scheme in schemes)
        kl.append(
            [
                method,
                *(with_error(by[method, scheme]["kl"], by[method, scheme]["kl_stderr"]) for scheme in schemes),
                f"{100 * relative:.1f} %",
                f"{first['j_ratio']:.3f}",
                f"{first['cosine']:.2f}",
                str(first["passes"]),
                *(seconds(over_seeds(method, schemes[0], key)) for key in ("collect_seconds", "rounding_seconds")),
            ]
        )
        cells = [(by[method, scheme]["perplexity"], spread(over_seeds(method, scheme, "perplexity"))) for scheme in schemes]
        perplexity.append([method, *(with_error(value, error) for value, error in cells)])
    original, tokens = rows[0]["perplexity_reference"], summary[0]["tokens"]
    head = ["method", *schemes]
    return (
        f"KL, nats per token ({summary[0]['seeds']} seeds, {tokens} calibration tokens; ± over sequences; seeds: the largest "
        f"standard error over seeds, relative; seconds: of collecting, as if alone, and of rounding to {schemes[0]}, ± over seeds):\n\n"
        + markdown([*head, "seeds", "J ratio", "cosine", "passes", "collecting, s", "rounding, s"], kl)
        + f"\n\nPerplexity, ± over seeds; the original has {original:.4g}:\n\n"
        + markdown(head, perplexity)
    )


def sequences(name: str) -> str:
    found = load(name)
    parts = []
    for scheme in found["schemes"]:
        rows = []
        for method in found["methods"]:
            own = {row["sequences"]: row for row in found["summary"] if (row["scheme"], row["method"]) == (scheme, method)}
            rows.append([method, *(with_error(own[count]["kl"], own[count]["kl_stderr"]) for count in found["sequences"])])
        parts.append(markdown([scheme, *map(str, found["sequences"])], rows))
    return "\n\n".join(parts)


def schemes(name: str, rotated: str) -> str:
    rows = []
    for source, note in ((name, ""), (rotated, ", rotated")):
        for row in load(source)["summary"]:
            rows.append((row["bits_per_weight"], row["kl"], row["scheme"] + note, row))
    cells = [
        [
            scheme,
            f"{bits:.3f}",
            f"{row['kl']:.4g} ± {row['kl_stderr']:.2g}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['perplexity']:.4g}",
            f"{row['rounding_seconds']:.0f}",
        ]
        for bits, _, scheme, row in sorted(rows, key=lambda row: (round(row[0], 2), row[1]))
    ]
    return markdown(["scheme", "bits per weight", "KL", "top-1", "perplexity", "rounding, s"], cells)


# --- other studies


def allocation() -> str:
    stories, demo = (load(f"allocation-{name}") for name in ("stories260K", "demo"))
    titles = {
        "3 bits everywhere": lambda found: found["settings"]["scheme"],
        "a quarter of the weights in 4 bits, at random: mean of 5 draws": lambda _found: "random",
        "the best of the 5 draws": lambda _found: "random, best draw",
        "`--bits`": lambda _found: "allocated",
        "4 bits everywhere, a whole bit more": lambda found: found["settings"]["scheme"].replace("int3", "int4"),
    }
    rows = []
    for title, key in titles.items():
        pairs = [([row[key(found)] for row in found["rows"]], found["mean"][key(found)]) for found in (stories, demo)]
        rows.append([title, *(f"{mean:.4f} ± {spread(values):.2g}" for values, mean in pairs)])
    return markdown(["KL, ± over seeds", "stories260K", "demo"], rows)


def fused() -> str:
    rows = []
    for scheme, found in load("fused-demo")["mean"].items():
        ratio = f"{found['fused']['ratio']:.3f} ± {found['fused']['ratio_stderr_over_seeds']:.3f}"
        kls = [f"{found[key]['kl']:.4g} ± {found[key]['stderr']:.2g}" for key in ("none", "fused")]
        rows.append([scheme, *kls, ratio])
    return markdown(["", "`none`", "`fused`", "fused / none, ± over seeds"], rows)


def peers(name: str, group: int) -> str:
    """Other quantizers and our stages; a number in brackets is that of seeds where it is not 3."""
    theirs, ours = load(f"peers-{name}")["rows"], load(f"tuning-{name}")["rows"]
    wanted = [f"int{bits}-g{group}" for bits in (2, 3, 4)]
    table = []

    def add(title: str, own: Callable[[str], Rows]) -> None:
        cells, seconds, memory = [], list[float](), list[float]()
        for scheme in wanted:
            rows = own(scheme)
            values, errors = [row["kl"] for row in rows], [row["kl_stderr"] for row in rows]
            cells.append("–")
            if values:
                mean, error = statistics.mean(values), math.hypot(statistics.mean(errors), spread(values))
                cells[-1] = f"{mean:.4g} ± {error:.2g}" + (f" ({len(values)})" if len(values) != 3 else "")
            here = [row for row in rows if "device" not in row]
            seconds += [row.get("quantize_cpu_seconds", row["cpu_seconds"]) for row in here]
            memory += [row["peak_mib"] for row in here]
        if set(cells) != {"–"}:
            table.append([title, *cells, *(f"{statistics.mean(numbers):.0f}" if numbers else "–" for numbers in (seconds, memory))])

    for (peer, method), title in PEERS.items():
        add(
            title,
            lambda scheme, key=(peer, method): [  # type: ignore[misc]
                row for row in theirs if (row["peer"], row["method"], row["bits"]) == (*key, int(scheme[3])) and row.get("kl") is not None
            ],
        )
    for arm, title in ARMS.items():
        add(title, lambda scheme, arm=arm: [row for row in ours if (row["scheme"], row["arm"]) == (scheme, arm)])  # type: ignore[misc]
    blocks: dict[str, Rows] = {}
    for row in theirs:
        if row["peer"] == "llamacpp" and row.get("kl") is not None:
            blocks.setdefault(row["method"], []).append(row)
    found = sorted(((own[0]["bits_per_weight"], statistics.mean(row["kl"] for row in own), method) for method, own in blocks.items()))
    text = ", ".join(f"`{method}` ({bits:.2f}) {kl:.4g}" for bits, kl, method in found)
    failed: dict[str, dict[str, None]] = {}
    for row in theirs:
        if row["error"] is not None:
            failed.setdefault(row["error"], {})[f"{row['peer']} {row['method']}"] = None
    return (
        markdown(["", *wanted, "CPU s", "peak MiB"], table)
        + f"\n\nllama.cpp with its importance matrix, bits per weight in brackets: {text}."
        + "".join(f"\n\nNot run, {error}: {', '.join(sorted(names))}." for error, names in failed.items())
    )


def tasks(name: str) -> str:
    """The original's accuracy beside chance, and what each scheme takes from it, over documents and seeds."""
    found = load(f"tasks-{name}")
    every = found["rows"]
    wanted = list(dict.fromkeys(row["scheme"] for row in every))
    rows = []
    for task, own in found["original"].items():
        cells = []
        for scheme in wanted:
            some = [row for row in every if (row["task"], row["scheme"]) == (task, scheme)]
            cells.append("")
            if some:
                values, errors = [row["difference"] for row in some], [row["difference_stderr"] for row in some]
                cells[-1] = f"{100 * statistics.mean(values):+.1f} ± {100 * math.hypot(statistics.mean(errors), spread(values)):.1f}"
        original = f"{100 * own['reference']:.1f} ± {100 * own['reference_stderr']:.1f}"
        rows.append([task, str(own["n"]), f"{100 * found['chance'][task]:.1f}", original, *cells])
    seeds = len({row["seed"] for row in every})
    over = f"mean of {seeds} seeds, ± of paired documents and over seeds" if seeds > 1 else "± of paired documents"
    differences = f"; of quantized models the difference to the original, {over}"
    return (
        f"Accuracy in %, ± over documents{differences if every else ''}:\n\n"
        + markdown(["task", "documents", "chance", "original", *wanted], rows)
        + "".join(f"\n\n{error}." for error in found["errors"].values())
    )


def distortion() -> str:
    found = load("distortion")
    cells: dict[str, dict[float, str]] = {}
    for row in found:
        known = f" ({row['known']:.4f})" if row.get("known") else ""
        cells.setdefault(f"{row['code']}, {row['bits']}", {})[row["headroom"]] = f"{row['mse']:.4f}{known}"
    return markdown(["code, bits", "0.8", "0.9", "1.0"], [[name, *(own[h] for h in (0.8, 0.9, 1.0))] for name, own in cells.items()])


def planned(name: str) -> str:
    """What `roundel plan` has said of jobs on real models, beside what they took."""
    columns = ("`--effort quick`", "KL", "planned, min", "real, min", "ratio", "planned, GB", "real, GB", "ratio", "planning, s")
    cells = []
    for row in load(name)["rows"]:
        plan, used = row["planned"], row["peak_mib"] * 2**20
        minutes, main = plan["total_seconds"] / 60, plan["memory"]["main"]
        ratios = (minutes / (row["seconds"] / 60), main / used)
        cells.append(
            [
                " ".join([f"{row['model']}, {row['scheme']}", *row["options"]]),
                f"{row['kl']:.3f} ± {row['kl_stderr']:.3f}",
                f"{minutes:.1f}",
                f"{row['seconds'] / 60:.1f}",
                f"{ratios[0]:.2f}",
                f"{main / 1e9:.2f}",
                f"{used / 1e9:.2f}",
                f"{ratios[1]:.2f}",
                f"{plan['took_seconds']:.0f}",
            ]
        )
    return markdown(columns, cells)


def chat(name: str) -> str:
    """Answers of real models before and after."""

    def fenced(text: str) -> str:  # indented, since answers have fences themselves
        return "\n".join(f"    {line}".rstrip() for line in text.strip().splitlines())

    return "\n\n".join(
        f"**{row['question']}** ({row['model']}; {row['scheme']}, KL {row['kl']:.3f}; {row['equal_tokens']} tokens are equal)\n\n"
        f"Before:\n\n{fenced(row['original'])}\n\nAfter:\n\n{fenced(row['quantized'])}"
        for row in load(name)["rows"]
    )


def read_back(name: str) -> str:
    """Real models in two formats, as plain Transformers has them after loading."""
    columns = ("model", "written", "linears", "difference of weights", "of the rest", "of logits", "top tokens equal")
    cells = [
        [
            row["model"],
            f"{row['scheme']}, {row['format']}",
            str(row["linears"]),
            f"{row['weight_difference']:.1g}",
            f"{row['other_difference']:.1g}",
            f"{row['logit_difference']:.1g}",
            f"{100 * row['same_top_token']:.0f} %",
        ]
        for row in load(name)["rows"]
    ]
    return markdown(columns, cells)


def real(name: str) -> str:
    """KL, time and memory of each effort on a real model, and what others have reached there, measured elsewhere."""
    found = load(name)
    columns = ("", "KL", "perplexity", "bits per weight", "minutes", "CPU minutes", "resident, GB")
    cells = [
        [
            row["method"] if "method" in row else f"`{' '.join(['--effort', row['effort'], *row['options']])}`",
            with_error(row["kl"], row["kl_stderr"]),
            f"{row['perplexity_original']:.1f} → {row['perplexity']:.1f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['seconds'] / 60:.1f}",
            f"{row['cpu_seconds'] / 60:.1f}",
            f"{row['peak_mib'] * 2**20 / 1e9:.2f}",
        ]
        for row in sorted(found["rows"], key=lambda row: -row["kl"]) + found.get("peers", [])
    ]
    cells += [
        [f"{row['method']} *", f"{row['kl']:.3f}", "–", "–", "–", f"{row['cpu_minutes']:.0f}", "–"]
        for row in sorted(found.get("elsewhere", []), key=lambda row: -row["kl"])
    ]
    return markdown(columns, cells)


def _minutes(rows: Rows) -> dict[str, float]:
    """Mean minutes of the processor, by its kind."""
    kinds = {row["processor"] for row in rows}
    return {kind: statistics.mean(row["cpu_seconds"] for row in rows if row["processor"] == kind) / 60 for kind in sorted(kinds)}


def methods(model: str) -> str:
    """Every method on a real model, by scheme: means over seeds, the error over sequences."""
    content = load(f"methods-{model}")
    parts = []
    for scheme in sorted({row["scheme"] for row in content["rows"]}, reverse=True):
        rows = [row for row in content["rows"] if row["scheme"] == scheme and "error" not in row]
        cells = []
        for tool, method in {(row["tool"], row["method"]): None for row in rows}:
            own = [row for row in rows if (row["tool"], row["method"]) == (tool, method)]

            def mean(key: str, own: Rows = own) -> float:
                return statistics.mean(row[key] for row in own)

            texts = {
                name: {key: statistics.mean(row["texts"][name][key] for row in own) for key in own[0]["texts"][name]} for name in TEXTS
            }
            cells.append(
                [
                    named(tool, method),
                    *(with_error(texts[name]["kl"], texts[name]["kl_stderr"]) for name in TEXTS),
                    f"{texts['c4']['kl_p99']:.2g}, {texts['c4']['kl_p999']:.2g}",
                    f"{100 * texts['c4']['top1']:.1f} %",
                    " ".join(f"{texts[name]['perplexity']:.1f}" for name in TEXTS),
                    f"{mean('bytes') / 1e6:.0f}",
                    ", ".join(f"{minutes:.0f}{'' if kind == 'AVX2' else f' ({kind})'}" for kind, minutes in _minutes(own).items()),
                    f"{mean('peak_mib') * 2**20 / 1e9:.1f}",
                    str(len(own)),
                ]
            )
        original = " ".join(f"{rows[0]['texts'][name]['perplexity_original']:.1f}" for name in TEXTS)
        heads = [scheme, "KL: C4", "WikiText-2", "code", "99, 99.9 % of tokens", "same top token", f"perplexities ({original})"]
        parts.append(markdown([*heads, "MB", "CPU min", "GB", "seeds"], sorted(cells, key=lambda row: -float(row[1].split()[0]))))
    failed = [row for row in content["rows"] if "error" in row]
    parts += [f"Not run: {PEERS[row['tool'], row['method']]} at {row['scheme']}: {row['error']}." for row in failed]
    return "\n\n".join(parts)


def named(tool: str, method: str) -> str:
    """Ours are an effort, or EFFORT-ROTATION."""
    return f"**Roundel, `--effort {method.replace('-', ' --rotate ')}`**" if tool == "roundel" else PEERS[tool, method]


def first_seeds(model: str, scheme: str) -> Rows:
    """Of `methods`: each method once, of ours the efforts."""
    rows = [row for row in load(f"methods-{model}")["rows"] if row["scheme"] == scheme and row["seed"] == 0 and "error" not in row]
    return [row for row in rows if row["tool"] != "roundel" or "-" not in row["method"]]


def front(model: str, title: str, scheme: str) -> str:
    """The rows of `methods` that a newcomer asks for: what is lost on each text, in which time."""
    rows = first_seeds(model, scheme)
    cells = [
        [
            named(row["tool"], row["method"]),
            *(with_error(row["texts"][name]["kl"], row["texts"][name]["kl_stderr"]) for name in TEXTS),
            f"{row['texts']['wikitext2']['perplexity']:.1f}",
            f"{row['cpu_seconds'] / 60:.0f}",
        ]
        for row in sorted(rows, key=lambda row: -row["texts"]["c4"]["kl"])
    ]
    perplexity = f"perplexity, WikiText-2 (original {rows[0]['texts']['wikitext2']['perplexity_original']:.1f})"
    return markdown([f"{title}, {scheme}", "KL: C4", "WikiText-2", "code", perplexity, "CPU minutes"], cells)


def sweeps() -> str:
    """Of the stages, over plain passes of the same sequences in the same run."""
    columns = (
        "model",
        "forward, s",
        "forward and backward, s",
        "collection over that",
        "rounding sweep over forward",
        "evaluation over it",
    )
    cells = []
    for name in ("sweeps", "sweeps-smollm2-135m"):
        for row in load(name)["rows"]:
            cells.append(
                [
                    row.get("model") or f"{row['width']} wide, {row['depth']} layers",
                    f"{row['seconds']['forward']:.1f}",
                    f"{row['seconds']['forward and backward']:.1f}",
                    f"{row['collection_over_forward_and_backward']:.2f}",
                    f"{row['rounding_sweep_over_forward']:.2f}",
                    f"{row['evaluation_over_forward']:.2f}",
                ]
            )
    return markdown(columns, cells)


def several(name: str) -> str:
    """Of a job in several processes, over the same in one."""
    found = load(name)
    columns = ("processes, one thread each", "command, s", "of one", "stages, s", "of one", "curvature, s", "rounding, s", "same bytes")
    cells = [
        [
            str(row["processes"]),
            f"{row['seconds']:.0f}",
            f"{row['of_the_first']['whole']:.2f}",
            f"{sum(row['stages'].values()):.0f}",
            f"{row['of_the_first']['stages']:.2f}",
            f"{row['stages']['curvature']:.0f}",
            f"{row['stages']['rounding']:.0f}",
            "yes" if row["same_codes"] else "no",
        ]
        for row in found["rows"]
    ]
    return markdown(columns, cells)


def estimates(name: str) -> str:
    """Of models that nobody has run here."""
    found = load(name)
    columns = (
        f"{found['scheme']}, `--effort {found['effort']}`",
        "weights",
        "one H200",
        "eight H200",
        f"CPU server of {found['cores']} cores",
    )
    cells = [
        [
            row["model"],
            f"{row['parameters'] / 1e9:.0f} B",
            f"{row['one_gpu_minutes']:.0f} min",
            f"{row['eight_gpus_minutes']:.0f} min",
            f"{row['cpu_server_hours']:.1f} h",
        ]
        for row in found["rows"]
    ]
    return markdown(columns, cells)


def engines() -> str:
    """What each engine makes of written directories, and what it refuses; `tests/engine_rows.py` writes the rows."""
    columns = (
        "model",
        "scheme",
        "format",
        "log-probability, largest difference",
        "KL, ours to engine",
        "KL of the report",
        "in the engine",
    )
    parts = []
    for file in sorted(RESULTS.glob("engines-*.json")):
        found = load(file.stem)
        loaded = [row for row in found["rows"] if row["error"] is None]
        cells = [
            [
                row["model"],
                row["scheme"] + (" *" if row["format"] != "dense" and any("in place of" in line for line in row["kernels"]) else ""),
                f"`{row['format']}`",
                f"{row['difference']['logprob_max']:.2g}",
                f"{row['difference']['kl']:.1e}" + ("" if row["passed"] else ", too much"),
                f"{row['report_kl']:.4f}",
                f"{row['kl']['engine']:.4f}",
            ]
            for row in loaded
        ]
        versions = ", ".join(f"{name} {version}" for name, version in loaded[0]["versions"].items())
        noise = ", ".join(f"{row['model']} {row['noise']['kl']:.1e}" for row in loaded if row["noise"] is not None)
        refused = [f"- {row['model']}, {row['scheme']}, `{row['format']}`: `{row['error']}`" for row in found["rows"] if row["error"]]
        parts += [
            f"{found['engine']} ({versions})." + (f" Its noise, the KL of the original: {noise}." if noise else ""),
            markdown(columns, cells),
            *(["Refused, with its own line:", "\n".join(refused)] if refused else []),
        ]
    return "\n\n".join(parts) or "Not measured yet."


DISTURBED = {
    "signals": "SIGKILL, SIGTERM, SIGSTOP at a random moment",
    "full": "no byte free from a random moment of each stage on",
    "errors": "EIO from the n-th change of a file on",
    "read-only": "a file system that cannot be written to",
    "together": "two processes in one place",
    "memory": "less memory than it takes",
}


def chaos() -> str:
    """What became of jobs that were disturbed (`benchmarks/chaos.py`)."""
    found = load("chaos")
    cells = []
    for kind, own in found["summary"].items():
        broken = ", ".join(f"{count} {fault}" for fault, count in own["faults"].items()) or "none"
        cells.append([DISTURBED[kind], *(str(own[key]) for key in ("disturbed", "same_bytes", "units_kept", "units_lost")), broken])
    aborted = sum(own.get("aborted", 0) for own in found["summary"].values())
    native = f" With too little memory {aborted} jobs were ended by native code, by a signal." if aborted else ""
    left_out = "".join(f" Left out: {kind}, {reason}." for kind, reason in found["left_out"].items())
    columns = ("what happened", "jobs", "same bytes in the end", "units of work on the disk", "lost", "promises broken")
    return f"{markdown(columns, cells)}\n\nSeed {found['seed']}, {found['seconds'] / 60:.0f} minutes.{native}{left_out}"


FUZZED = ("compressed-tensors", "native", "native-integers", "gptq", "awq", "auto-round", "mlx", "exl3", "gguf")
FUZZ_THEIRS = ("Transformers' own error", "none of these")


def fuzz() -> str:
    """How calls have ended that were given damaged files."""
    found = load("fuzz")
    allowed = ("right", "refused", "theirs")
    rows: dict[str, Counter[str]] = {}
    for row in found["rows"]:
        name = " ".join(word for word in row["call"].split() if word not in FUZZED)
        rows.setdefault(name, Counter()).update({kind: count for kind, count in row.items() if kind != "call"})
    cells = [
        [name, str(own.total()), *(str(own[kind]) for kind in allowed), str(own.total() - sum(own[kind] for kind in allowed))]
        for name, own in rows.items()
    ]
    commits = ", ".join(f"{count} at {commit}" for commit, count in _by_commit(found["stretches"]).items())
    left = sum("mended" not in failure for failure in found["failures"])
    minutes = found["seconds"] / 60
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(stretch.get("seed", found["seed"]) for stretch in found["stretches"]))
    said = f"{found['mutations']} changes ({commits}) in {minutes:.0f} minutes of single processes, seeds {seeds}."
    said += f" Kinds of failure: {len(found['failures'])}, of which {left} are not mended."
    return f"{markdown(('call', 'changes', 'right', 'refused', *FUZZ_THEIRS), cells)}\n\n{said}"


def _by_commit(stretches: Rows) -> Counter[str]:
    found: Counter[str] = Counter()
    for stretch in stretches:
        found[stretch["commit"]] += stretch["mutations"]
    return found


def refined(name: str) -> str:
    """KL before and after, of files of other tools."""
    cells = []
    for row in load(f"refined-{name}")["rows"]:
        if "error" in row:
            continue
        both = [[row[text][when] for when in ("before", "after")] for text in ("held out", "stdlib")]
        own = [f"{with_error(before['kl'], before['kl_stderr'])}, {with_error(after['kl'], after['kl_stderr'])}" for before, after in both]
        parts = [f"{100 * (1 - after['kl'] / before['kl']):.0f} %" for before, after in both]
        cells.append([row["file"], own[0], parts[0], own[1], parts[1]])
    return markdown(["file", "KL on held-out C4: before, after", "less by", "KL on the standard library", "less by"], cells)


TABLES: dict[str, Callable[[], str]] = {
    "refined": lambda: refined("demo"),
    "refined-smollm2": lambda: refined("smollm2-135m"),
    "curvatures-stories260K": lambda: estimators("curvatures-stories260K"),
    "curvatures-demo-mixture": lambda: estimators("curvatures-demo-mixture"),
    "curvatures-demo": lambda: estimators("curvatures-demo"),
    "trellises-stories260K": lambda: estimators("trellises-stories260K"),
    "trellises-demo": lambda: estimators("trellises-demo"),
    "sequences-stories260K": lambda: sequences("sequences-stories260K"),
    "sequences-demo": lambda: sequences("sequences-demo"),
    "schemes-stories260K": lambda: schemes("schemes-stories260K", "schemes-rotated-stories260K"),
    "schemes-demo": lambda: schemes("schemes-demo", "schemes-rotated-demo"),
    "allocation": allocation,
    "fused": fused,
    "peers-stories260K": lambda: peers("stories260K", 32),
    "peers-demo": lambda: peers("demo", 64),
    "real-smollm2-135m": lambda: real("real-smollm2-135m"),
    "front-smollm2-135m": lambda: front("smollm2-135m", "SmolLM2-135M-Instruct", "int3-g64"),
    "methods-smollm2-135m": lambda: methods("smollm2-135m"),
    "planned": lambda: planned("planned"),
    "chat": lambda: chat("chat"),
    "sweeps": sweeps,
    "processes": lambda: several("processes"),
    "estimates": lambda: estimates("estimates"),
    "read-back": lambda: read_back("read-back"),
    "tasks-stories260K": lambda: tasks("stories260K"),
    "tasks-demo": lambda: tasks("demo"),
    "distortion": distortion,
    "engines": engines,
    "chaos": chaos,
    "fuzz": fuzz,
}


def rendered(page: str) -> str:
    """The page with all its tables made anew."""

    def section(found: re.Match[str]) -> str:
        try:
            text = TABLES[found[1]]()
        except FileNotFoundError:
            text = "Not measured yet."
        return f"<!-- {found[1]} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", section, page, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    old = {page: page.read_text(encoding="utf-8") for page in PAGES}
    new = {page: rendered(text) for page, text in old.items()}
    if check:
        sys.exit(old != new)
    for page, text in new.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
