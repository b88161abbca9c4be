"""Real models in 4 bits, read back by plain Transformers: are its weights and logits those that were rounded to?

    python benchmarks/read_back.py MODEL [MODEL ...] [-o benchmarks/results/read-back.json] [OPTION OF roundel quantize ...]

Each model is quantized twice, to a compressed-tensors directory (int4-g64) and to a GGUF (q4_0), in processes of their own. Both are loaded
by Transformers alone and compared with the original, loaded in the same precision, in which the linears are our dequantized codes. A GGUF
holds what is not quantized in float16, so that its logits may differ where bfloat16 is finer.

Cost: of `roundel quantize`, and three models in memory. Rows that the file has already, of the same settings, are not run again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from commands import read_json, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from roundel.artifacts.checkpoints import read
from roundel.formats import gguf
from roundel.rounding.round import dequantized
from roundel.stages.report import versions
from roundel.store import write_json

WRITTEN = {"compressed-tensors": "int4-g64", "gguf": "q4_0"}
"""Format, and the scheme of four bits that it holds."""

PROBE = "def mean(values):\n    '''The arithmetic mean.'''\n    return sum(values) / len(values)\n\nThe capital of France is Paris."


def expected(output: Path, form: str) -> dict[str, torch.Tensor]:
    """What was rounded to, by linear: our codes, decoded, or the blocks of a GGUF as llama.cpp's own package decodes them."""
    if form != "gguf":
        return {name: dequantized(weight) for name, weight in read(output).rounded.items()}
    rows = read_json(output / "roundel.json")["layers"]
    found = gguf.read(output / "model.gguf", config=read_json(output / "config.json"), tensors=[row["tensor"] for row in rows.values()])
    return {name: found[row["tensor"]] for name, row in rows.items()}


@torch.no_grad()
def compared(model: str, output: Path, form: str) -> dict[str, Any]:
    """Largest differences of weights and of logits between what Transformers loads and what was rounded to, and the text's top tokens."""
    ids = AutoTokenizer.from_pretrained(model)(PROBE, return_tensors="pt").input_ids
    extra = {"gguf_file": "model.gguf", "config": AutoConfig.from_pretrained(output)} if form == "gguf" else {}
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, **extra).eval()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    logits = loaded(ids).logits  # compressed-tensors decodes its linears at the first call
    worst, rounded = 0.0, expected(output, form)
    for name, W in rounded.items():
        worst = max(worst, float((loaded.get_submodule(name).weight - W).abs().max()))
        reference.get_submodule(name).weight.copy_(W)
    others = {n: p for n, p in loaded.named_parameters() if n.removesuffix(".weight") not in rounded and "." in n}
    left = {n: p for n, p in reference.named_parameters() if n in others}
    wanted = reference(ids).logits
    return {
        "linears": len(rounded),
        "weights": sum(W.shape[0] * W.shape[1] for W in rounded.values()),
        "weight_difference": worst,
        "other_difference": max(float((others[n] - p).abs().max()) for n, p in left.items()),
        "logit_difference": float((logits - wanted).abs().max() / wanted.abs().max()),
        "same_top_token": float((logits.argmax(-1) == wanted.argmax(-1)).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "read-back.json")
    given, options = parser.parse_known_args()
    content: dict[str, Any] = read_json(given.output) if given.output.is_file() else {"kind": "read-back", "rows": []}
    for model in given.models:
        for form, scheme in WRITTEN.items():
            key = {"model": Path(model).name, "format": form, "scheme": scheme, "options": options}
            if any(all(row.get(name) == value for name, value in key.items()) for row in content["rows"]):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                output = Path(scratch) / "out"
                line = [str(Path(sys.executable).parent / "roundel"), "quantize", model, "-o", str(output), "--scheme", scheme]
                spent = run([*line, "--format", form, "--embedding", "none", "--head", "none", *options])
                report = read_json(output / "roundel.json")
                found = {"share": report["coverage"]["share"], "kl": report["evaluation"]["kl"]["mean"]}
                found |= compared(model, output, form)
            content["rows"].append({**key, **found, **spent, "versions": versions(), "cores": os.cpu_count()})
            print(content["rows"][-1], flush=True)
            write_json(given.output, content)


if __name__ == "__main__":
    main()
