"""Run every `roundel` command line of README and docs, in order, on models and texts made for it: `make doc-commands`.

    python scripts/run_documented_commands.py [PAGE ...]

Each page gets a directory of its own in which the names that it uses exist: the Hub ids and `MODEL` are a Qwen3 of one decoder layer with
random weights and the demo model's tokenizer, `my-text.txt` and so on hold parts of Python's standard library. Commands run as they are
written, so a page fails that uses what none of its commands has made. Two things are changed: where `torchrun` asks for 8 processes it gets
2; and results.md is left to `make studies`, which runs its commands at full size, tutorial.md to `make newcomer`. What needs an engine, a
server or the Hub is listed, not run. Some minutes on two cores.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from roundel.demo.corpus import documents
from roundel.models import load_tokenizer, locate

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name not in ("results.md", "tutorial.md"))]

ENGINES = ("vllm", "llama-cli", "llama-server", "ollama", "python main.py")
"""Programs of others, which are not installed here."""


def command_lines(page: Path) -> list[str]:
    """Lines of shell blocks, and of blocks without a language that start with a command of ours."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        if language in ("sh", "bash", "console") or block.startswith("roundel "):
            lines = [line.removeprefix("$ ").strip() for line in block.replace("\\\n", " ").splitlines()]
            found += [line for line in lines if line and not line.startswith("#")]
    return found


def reason_to_skip(line: str) -> str | None:
    has_harness = importlib.util.find_spec("lm_eval") is not None
    reasons = {
        "another project's program": line.startswith(ENGINES),
        "an engine, which is not installed here": line.startswith("roundel serve-check"),
        "an installation": line.startswith(("make ", "pip install")),
        "lm-evaluation-harness is not installed": "--tasks" in line and not has_harness,
        "the Hub": (line.startswith("roundel upload ") and "--dry-run" not in line)
        or ("--tasks" in line and "--task-data" not in line)
        or re.search(r"--perplexity (wikitext2|c4)( |$)", line),
        "make demo runs it": line == "roundel demo",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def prepare(directory: Path, model: Path) -> None:
    """The models and texts that pages name."""
    for name in ("Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct", "MODEL"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).symlink_to(model)
    texts = list(documents("calibration"))
    (directory / "my-text.txt").write_text("\n\n".join(texts)[:400_000], encoding="utf-8")
    rows = (json.dumps({"text": text}) for text in texts[:60])
    (directory / "my-text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (directory / "other-text.txt").write_text("\n\n".join(documents("heldout"))[:60_000], encoding="utf-8")
    data = directory / "DIR"
    data.mkdir()
    rows = [json.dumps({"query": f"Question: Is {k} a number?", "choices": ["yes", "no"], "gold": k % 2}) for k in range(9)]
    for task in ("arc_easy", "piqa"):
        (data / f"{task}.jsonl").write_text("\n".join(rows), encoding="utf-8")


def small_model(directory: Path) -> Path:
    """A Qwen3 of one decoder layer, wide enough for all block types, and short."""
    config = AutoConfig.from_pretrained(locate("demo"))
    config.num_hidden_layers, config.max_position_embeddings, config.layer_types = 1, 64, config.layer_types[:1]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    load_tokenizer(locate("demo")).save_pretrained(directory)
    return directory


def run_page(page: Path, model: Path) -> tuple[int, list[str]]:
    """How many commands have run, and those that failed."""
    ran, failed = 0, []
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        prepare(directory, model)
        if page.name == "reading-a-report.md":  # is about what another page has made
            for options in ("-o out --scheme int3-g64", "-o out-gguf --scheme q4_k"):
                made = shlex.split(f"roundel quantize MODEL {options} --calibration my-text.txt --sequences 32 --quiet")
                subprocess.run([sys.executable, "-m", *made], cwd=directory, check=True)
            (directory / "OUT").symlink_to("out")
        for line in command_lines(page):
            if (reason := reason_to_skip(line)) is not None:
                print(f"  not run ({reason}): {line}", flush=True)
                continue
            words = shlex.split(line.replace("--nproc-per-node 8", "--nproc-per-node 2"), comments=True)
            if words[0] == "roundel":
                words = [sys.executable, "-m", *words]
            elif words[0] == "torchrun":
                words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            began = time.monotonic()
            done = subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False)
            ran += 1
            print(f"  {'ok' if done.returncode == 0 else 'FAILED'} {time.monotonic() - began:.0f} s: {line}", flush=True)
            if done.returncode != 0:
                failed.append(line)
                print(done.stdout[-1000:] + done.stderr[-3000:], flush=True)
    return ran, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    pages = parser.parse_args().pages
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    total, failed = 0, []
    with tempfile.TemporaryDirectory() as place:
        model = small_model(Path(place) / "model")
        for page in pages:
            print(page, flush=True)
            ran, wrong = run_page(page.resolve(), model)
            total += ran
            failed += wrong
    print(f"{total} commands run, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
