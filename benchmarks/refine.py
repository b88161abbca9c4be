"""Files that other tools write, and what `roundel refine` makes of them: KL before and after, in the same bytes.

    python benchmarks/refine.py MODEL --calibration TEXT [--tools NAME ...] [--files DIR] [-o FILE.json]

Each tool writes the model by itself with the same text: llama.cpp's quantizer with an importance matrix (`make .venv-llama/installed`), MLX
(`make .venv-mlx/installed`), the others in the environments of `benchmarks/peers` (made where they are missing). `--files` keeps what was
written and refined: a run that was interrupted goes on. The KL is Roundel's own, on text that neither has seen and on Python's standard
library.

Cost: a refinement is `--effort quick`, a minute for the demo model, 40 for one of 135 million weights; AutoRound takes as long again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from roundel.formats import gguf
from roundel.models import locate
from roundel.models.checkpoint import Checkpoint
from roundel.stages.report import versions
from roundel.store import write_json

ROOT = Path(__file__).resolve().parent.parent
LLAMA = {name: name for name in ("q2_k", "q3_k_m", "q4_k_m", "q4_0", "iq4_xs", "iq3_xxs", "iq2_xs")}
OTHERS = {
    "llm-compressor:gptq-4": ("llm_compressor", "llm-compressor:gptq", 4),
    "llm-compressor:gptq-3": ("llm_compressor", "llm-compressor:gptq", 3),
    "llm-compressor:awq-4": ("llm_compressor", "llm-compressor:awq", 4),
    "gptqmodel:gptq-4": ("gptq_model", "gptqmodel:gptq", 4),
    "gptqmodel:awq-4": ("gptq_model", "gptqmodel:awq", 4),
    "auto-round-4": ("autoround", "auto-round", 4),
    "mlx-4": ("mlx", "mlx", 4),
    "mlx-3": ("mlx", "mlx", 3),
}
"""Environment, method and bits; groups of 64 columns."""
SETTINGS = ["--effort", "quick", "--seq-len", "256"]
CHUNKS = 32
"""Windows of 512 tokens that llama.cpp's importance matrix sees."""


def run(*line: object) -> str:
    """What a command says."""
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, line))}: exit {done.returncode}: {(done.stdout + done.stderr)[-400:]}")
    return done.stdout + done.stderr


def environment(name: str) -> Path:
    """The Python of a peer, installed where it is missing."""
    if name == "mlx":
        return ROOT / ".venv-mlx" / "bin" / "python"
    place = ROOT / ".venv-peers" / name
    if not (place / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", place)
        for what in (["torch==2.13.0"], ["-r", ROOT / "benchmarks" / "peers" / f"{name}.txt"]):
            run(place / "bin" / "pip", "install", "--quiet", "--no-compile", *what)
    return place / "bin" / "python"


def by_llama_cpp(kind: str, model: Path, text: Path, files: Path, target: Path) -> None:
    tools, original, matrix = ROOT / ".venv-llama" / "llama.cpp", files / "f16.gguf", files / "imatrix.gguf"
    if not original.exists():
        checkpoint = Checkpoint.open(model)
        gguf.write(original, model=model, tensors=list(checkpoint), read=checkpoint.read, rounded={}, name=model.name)
    if not matrix.exists():
        run(tools / "llama-imatrix", "-m", original, "-f", text, "-o", matrix, "-c", 512, "-b", 512, "--chunks", CHUNKS, "-t", 1)
    target.mkdir(parents=True)
    run(tools / "llama-quantize", "--imatrix", matrix, original, target / "model.gguf", kind, 1)


def made(name: str, model: Path, text: Path, files: Path) -> Path:
    """A directory that a tool has written."""
    target = files / name.replace(":", "-")
    if not target.exists():
        if name in LLAMA:
            by_llama_cpp(LLAMA[name], model, text, files, target)
        else:
            python, method, bits = OTHERS[name]
            run(environment(python), ROOT / "benchmarks" / "peers" / "written.py", method, "--bits", bits, model, text, target)
    return target / "model.gguf" if name in LLAMA else target


def refined(given: Path, model: str, text: Path) -> dict[str, Any]:
    """The report of refining it."""
    home = given.parent if given.is_file() else given
    target = home.with_name(f"{home.name}.refined")
    if not (target / "refined.json").exists():
        run(sys.executable, "-m", "roundel", "refine", given, "--reference", model, "-o", target, "--calibration", text, *SETTINGS, "-q")
    report: dict[str, Any] = json.loads((target / "refined.json").read_text(encoding="utf-8"))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tools", nargs="*", default=[*LLAMA, *OTHERS], choices=[*LLAMA, *OTHERS])
    parser.add_argument("--files", type=Path, default=Path("refined-files"))
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    model = locate(given.model)
    given.files.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in given.tools:
        try:
            report = refined(made(name, model, given.calibration, given.files), given.model, given.calibration)
        except (RuntimeError, OSError) as error:
            rows.append({"file": name, "error": str(error)})
            print(json.dumps(rows[-1]), flush=True)
            continue
        own = report["refined"]
        row: dict[str, Any] = {"file": name, "bytes": own["bytes"], "linears": own["linears"], "linears_changed": own["linears_changed"]}
        row["layers_taken"] = sum(layer.get("taken", True) for layer in report["layers"].values()) / len(report["layers"])
        for text, both in own["texts"].items():
            row[text] = {when: {"kl": both[when]["kl"]["mean"], "kl_stderr": both[when]["kl"]["stderr"]} for when in ("before", "after")}
        rows.append({**row, "seconds": sum(report["seconds"].values()), "peak_memory": report["resources"]["peak_memory"]})
        print(json.dumps(rows[-1]), flush=True)
        if given.output:
            about = {
                "kind": "refined",
                "model": model.name if given.model != "demo" else "demo",
                "settings": SETTINGS,
                "versions": versions(),
            }
            write_json(given.output, {**about, "calibration": given.calibration.name, "rows": rows})


if __name__ == "__main__":
    main()
