"""Every method on a real model: KL on three texts, size, CPU time, memory; one row after the other, the most telling first.

    PYTHONPATH=benchmarks python -m real.run [MODEL ...] [--texts DIR] [--rows roundel:quick autoround ...] [--schemes int3-g64,...]

A MODEL is a name of `real.models`, which makes it, or a directory. All methods may use the same calibration sequences, of C4; the KL is
measured on others of C4, on WikiText-2's test text and on code (the modules of Python's standard library that calibration never reads),
in float32: Roundel's directory as plain Transformers loads it, the others' by the weights that their adapters leave (`benchmarks/peers`).
`--texts` is a directory with `c4.txt` and `wikitext2-test.txt`; without it they come from the Hub.

CPU time is user and system of one thread, of the whole command or adapter, reading included; Roundel's also counts its own evaluation and
report. A scheme `bits2.25` is Roundel's `--bits 2.25` over integers. Bytes are those of the weights with what their scheme adds and of all
else in 16 bits, by the same rule for all. Rows go to `benchmarks/results/methods-MODEL.json` one by one; those that it has are not measured
again, those that failed are. Cost on one core of 2026, SmolLM2-135M: a quarter of an hour for a row of quick or GPTQ, an hour for one of
AutoRound with 200 steps; 4 minutes to measure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from commands import read_json, run
from peers.run import METHODS, Bench, PeerError, Work
from real.models import KEPT, MODELS, made
from torch import nn
from transformers import AutoModelForCausalLM

from roundel.artifacts.source import load_source
from roundel.calibration import data_hash, opening_of, read_documents, windows
from roundel.evaluate import compare_models
from roundel.evaluate.perplexity import joined_windows
from roundel.recipes import Recipe
from roundel.stages.report import versions
from roundel.store import write_json
from roundel.types import TokenBatch

RESULTS = Path(__file__).parents[1] / "results"
SEQUENCES, LENGTH = 192, 512
"""Of calibration: as many as Roundel's default effort reads. Tokens of every sequence."""
WINDOWS = 24
"""Of each text that the KL is measured on."""
HUB = {"c4": "allenai/c4:config=en:split=validation:num=2000", "wikitext2": "Salesforce/wikitext:config=wikitext-2-raw-v1:split=test"}
FILES = {"c4": "c4.txt", "wikitext2": "wikitext2-test.txt"}
ROWS = (
    "roundel:quick",
    "llm_compressor:gptq-mse",
    "roundel:normal",
    "llm_compressor:rtn",
    "llm_compressor:gptq",
    "autoround:iters-50",
    "autoround:iters-200",
    "gptq_model:gptaq",
    "llm_compressor:awq",
    "roundel:best",
)
"""In this order; within one, by scheme, then by seed. Those of `VARIANTS` follow, if they are named."""
VARIANTS = {
    "roundel:quick-fused": ("--effort", "quick", "--rotate", "fused"),
    "roundel:quick-online": ("--effort", "quick", "--rotate", "online", "--format", "native"),
}
"""Of Roundel, besides its efforts: what it is given for them."""
SEEDS = {"roundel": 2}
"""Of each tool, if not 1."""


def processor() -> str:
    """What decides how fast it multiplies."""
    return torch.backends.cpu.get_cpu_capability() + (" with AMX" if torch.cpu._is_amx_tile_supported() else "")


def texts_of(given: Path | None, tokenizer: Any, kept: Path) -> tuple[Path, dict[str, TokenBatch]]:
    """A file with the calibration sequences' text, and the windows of each held-out text."""
    spec = {name: str(given / FILES[name]) if given else HUB[name] for name in FILES}
    c4 = "\n".join(read_documents(spec["c4"], tokenizer))
    kept.mkdir(parents=True, exist_ok=True)
    calibration, heldout = kept / "calibration.txt", kept / "heldout.txt"
    first = c4[: len(c4) * 6 // 10]
    ends = tokenizer(first, return_offsets_mapping=True, verbose=False).offset_mapping
    if len(ends) < (SEQUENCES + 1) * LENGTH:
        sys.exit(f"{spec['c4']}: {len(ends)} tokens to calibrate on, {(SEQUENCES + 1) * LENGTH} are needed")
    calibration.write_text(first[: ends[(SEQUENCES + 1) * LENGTH][0]], encoding="utf-8")
    heldout.write_text(c4[len(c4) * 7 // 10 :], encoding="utf-8")
    specs = {"c4": str(heldout), "wikitext2": spec["wikitext2"], "code": "stdlib-heldout"}
    return calibration, {name: _windows(read_documents(each, tokenizer), tokenizer) for name, each in specs.items()}


def _windows(documents: Iterable[str], tokenizer: Any) -> TokenBatch:
    """Of one text; each begins as the tokenizer begins a text, without which Gemma's perplexity is twice as high."""
    if opening_of(tokenizer):
        return TokenBatch.of(windows(documents, tokenizer, LENGTH, most=WINDOWS))
    return TokenBatch.of(joined_windows(documents, tokenizer, LENGTH).ids[:WINDOWS])


class Table:
    """One model, its texts, and how a row is measured."""

    def __init__(self, model: Path, texts: Path | None, kept: Path, timeout: int) -> None:
        recipe = Recipe(scheme="int4-g64", calibration="stdlib", sequences=SEQUENCES, seq_len=LENGTH, eval_sequences=WINDOWS)
        source = load_source(model, recipe, "cpu", "float32")
        self.model, self.kept = model, kept
        self.calibration, self.heldout = texts_of(texts, source.tokenizer, kept)
        own = dataclasses.replace(recipe, calibration=str(self.calibration), eval_data=str(kept / "heldout.txt"))
        self.bench = Bench(source, own, timeout)

    def about(self) -> dict[str, Any]:
        """What all rows share; rows of another table may not stand beside them."""
        texts = {name: {"windows": len(text.ids), "sha256": data_hash(text)} for name, text in self.heldout.items()}
        calibration = {"sequences": SEQUENCES, "seq_len": LENGTH, "sha256": data_hash(self.bench.split(0).used)}
        return {"kind": "methods", "model": self.model.name, "calibration": calibration, "texts": texts}

    def row(self, tool: str, method: str, scheme: str, seed: int) -> dict[str, Any]:
        """What a row took, and its KL on each text; `error` in place of both where the tool fails."""
        began = time.monotonic()
        measure = self.ours if tool == "roundel" else self.theirs
        try:
            with tempfile.TemporaryDirectory(prefix="real-") as scratch:
                found = measure(tool, method, scheme, seed, Path(scratch))
        except PeerError as error:
            found = {"error": str(error)}
        return {**found, "processor": processor(), "row_seconds": round(time.monotonic() - began, 1)}

    def ours(self, _tool: str, method: str, scheme: str, seed: int, scratch: Path) -> dict[str, Any]:
        average = scheme.removeprefix("bits")
        options = ["--scheme", "int4-g64", "--bits", average] if average != scheme else ["--scheme", scheme]
        options += [*VARIANTS.get(f"roundel:{method}", ("--effort", method)), "--calibration", str(self.calibration), "--seed", str(seed)]
        options += ["--eval-data", str(self.kept / "heldout.txt"), "--quiet"]
        roundel = [sys.executable, "-m", "roundel"]
        subprocess.run([*roundel, "plan", str(self.model), *options, "--json", str(scratch / "plan.json")], check=True)
        planned = read_json(scratch / "plan.json")
        work = self.kept / f"work-{scheme}-{method}-{seed}"
        spent = run([*roundel, "quantize", str(self.model), "-o", str(scratch / "out"), *options, "--work", str(work)])
        report = read_json(scratch / "out" / "roundel.json")
        return {
            **{key: round(value, 1) for key, value in spent.items()},
            "planned": {name: planned[name] for name in ("total_seconds", "memory")},
            "stages": report["seconds"],
            "bytes": self.size(report["bits_per_weight"]["quantized"]),
            "file_bytes": sum(path.stat().st_size for path in (scratch / "out").glob("*.safetensors")),
            "texts": self.measured(AutoModelForCausalLM.from_pretrained(scratch / "out", dtype=torch.float32).eval()),
            "versions": versions(),
        }

    def theirs(self, tool: str, method: str, scheme: str, seed: int, scratch: Path) -> dict[str, Any]:
        bits, group = (int(part) for part in scheme.removeprefix("int").split("-g"))
        work = Work(peer=tool, method=method, bits=bits, group=group, seed=seed)
        self.bench.prepare(work, scratch)
        spent = self.bench.run(work, self.bench.environment(tool), scratch)
        result = read_json(scratch / "result.json")
        placed = self.bench.placed(work, scratch, result)
        return {
            "seconds": spent["wall_seconds"],
            "cpu_seconds": round(spent["cpu_seconds"], 1),
            "peak_mib": spent["peak_mib"],
            "bytes": self.size(placed["bits_per_weight"]),
            "flags": placed["flags"],
            "texts": self.measured(self.bench.twin),
            "versions": result["versions"],
        }

    def size(self, bits: float) -> int:
        """Bytes of all weights: those of the quantized linears in so many bits, all else in 16."""
        parameters = sum(parameter.numel() for parameter in self.bench.reference.parameters())
        quantized = sum(linear.weight.numel() for linear in self.bench.source.linears.values())
        return round(quantized * bits / 8 + 2 * (parameters - quantized))

    def measured(self, model: nn.Module) -> dict[str, Any]:
        found = {}
        for name, text in self.heldout.items():
            kl = compare_models(model, self.bench.reference, text, batch_size=4)
            found[name] = {
                "kl": kl.kl_mean,
                "kl_stderr": kl.kl_stderr,
                "kl_p99": kl.kl_p99,
                "kl_p999": kl.kl_p999,
                "top1": kl.top1_agreement,
                "perplexity": kl.perplexity_model,
                "perplexity_original": kl.perplexity_reference,
            }
        return found


def wanted(rows: Sequence[str], schemes: Sequence[str], seeds: int | None) -> Iterator[dict[str, Any]]:
    for name in (*ROWS, *(variant for variant in VARIANTS if variant in rows)):
        tool, _, method = name.partition(":")
        if rows and not {name, tool} & set(rows):
            continue
        for scheme in schemes:
            for seed in range(seeds or SEEDS.get(tool, 1)):
                yield {"tool": tool, "method": method, "scheme": scheme, "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "gemma3-270m"], metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--texts", type=Path, help="c4.txt and wikitext2-test.txt")
    parser.add_argument("--rows", nargs="*", default=[], metavar="TOOL[:METHOD]", help=", ".join(ROWS))
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=["int3-g64", "int4-g64", "int2-g64"])
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--timeout", type=int, default=6 * 3600, help="Seconds that another tool may take for a row.")
    parser.add_argument("--kept", type=Path, default=KEPT, help="Where models, texts and unfinished work are kept.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    if unknown := set(given.rows) - {*ROWS, *METHODS, *VARIANTS, "roundel"}:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")  # of our process, as of theirs
    for name in given.models:
        if name in MODELS and (unfair := set(given.schemes) & set(MODELS[name].same_blocks)):
            parser.error(f"{name} was decoded from blocks like those of {', '.join(sorted(unfair))}, which would look too good")
        directory = made(name, given.kept / name) if name in MODELS else Path(name)
        given.results.mkdir(parents=True, exist_ok=True)
        target = given.results / f"methods-{directory.name}.json"
        table = Table(directory, given.texts, given.kept / f"{directory.name}-work", given.timeout)
        about = table.about()
        content: dict[str, Any] = {**about, "cores": os.cpu_count(), "rows": []}
        if target.is_file():
            stored = read_json(target)
            if other := [key for key, value in about.items() if stored[key] != value]:
                sys.exit(f"{target} was measured with another {', '.join(other)}: give other --results")
            content["rows"] = stored["rows"]
        for key in wanted(given.rows, given.schemes, given.seeds):
            rows = content["rows"]
            same = [row for row in rows if all(row[part] == value for part, value in key.items())]
            if same and "error" not in same[0]:
                continue
            row = {**key, **table.row(**key)}
            content["rows"] = [each for each in rows if each not in same] + [row]
            print(json.dumps(row), flush=True)
            write_json(target, content)


if __name__ == "__main__":
    main()
