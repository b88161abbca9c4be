"""A model larger than the memory that the process may use, quantized end to end on the CPU, and the same without a limit: equal bytes?

The operating system sets the limit: a memory control group (version 1 or 2) for the child process, which needs the rights to make one.

    python benchmarks/larger_than_memory.py --gigabytes 3 --limit 2G -o benchmarks/results/larger-than-memory.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from roundel.models.load import DEMO
from roundel.stages.report import versions
from roundel.store import write_json

WIDTH, INNER, HEADS = 1024, 2816, 16
SETTINGS = {
    "scheme": "int4-g128",
    "curvature": "kfac",
    "sweeps": 0,
    "sequences": 8,
    "prefix_sequences": 8,
    "seq_len": 64,
    "eval_sequences": 2,
    "calibration": "stdlib",
    "prefix_aware": True,
    "natural_places": 0,
}


def make(directory: Path, gigabytes: float) -> int:
    """A random Llama of about that size in 16 bits, one layer in memory at a time; returns its layers."""
    directory.mkdir(parents=True)
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = max(tokenizer["model"]["vocab"].values()) + 64
    shapes = {
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
        **{f"self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"},
        "mlp.gate_proj.weight": (INNER, WIDTH),
        "mlp.up_proj.weight": (INNER, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER),
    }
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    layers = int(gigabytes * 1e9 // size) + 1
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16)

    where: dict[str, str] = {}
    for layer in range(layers):
        tensors = {f"model.layers.{layer}.{name}": draw(shape) for name, shape in shapes.items()}
        if layer == 0:
            tensors |= {"model.embed_tokens.weight": draw((vocabulary, WIDTH)), "model.norm.weight": draw((WIDTH,))}
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": size * layers}, "weight_map": where})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    write_json(directory / "config.json", config)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, directory)
    return layers


def one(model: str, output: str, memory: str) -> None:
    """In a process of its own."""
    import roundel

    began = time.monotonic()
    result = roundel.quantize(model, output=output, memory=memory, **SETTINGS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {"seconds": time.monotonic() - began, "peak_mib": peak, "kl": result.report.kl_mean, "stages": result.details["seconds"]}
        )
    )


def limited(limit: int) -> Path:
    """A memory control group with this limit."""
    first = Path("/sys/fs/cgroup/memory")
    group = (first if first.is_dir() else Path("/sys/fs/cgroup")) / f"roundel-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")).write_text(str(limit))
    return group


def digest(directory: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--limit", default="2G")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.one:
        one(*given.one)
        return
    limit = int(float(given.limit.rstrip("G")) * (1 << 30))
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        model = Path(scratch) / "model"
        layers = make(model, given.gigabytes)
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        for name, memory in (("limited", "512M"), ("unlimited", "64G")):
            group = limited(limit) if name == "limited" else None
            output = Path(scratch) / name

            def enter(group: Path | None = group) -> None:
                if group is not None:
                    (group / "cgroup.procs").write_text(str(os.getpid()))

            line = [sys.executable, __file__, "--one", str(model), str(output), memory]
            found = subprocess.run(line, check=False, capture_output=True, text=True, preexec_fn=enter)
            if found.returncode:
                sys.exit(f"{name}: exit {found.returncode}\n{found.stderr[-2000:]}")
            rows[name] = {**json.loads(found.stdout.splitlines()[-1]), "sha256": digest(output)}
            if group is not None:
                usage = group / "memory.max_usage_in_bytes"
                rows[name]["group_peak_mib"] = int((usage if usage.is_file() else group / "memory.peak").read_text()) / (1 << 20)
                group.rmdir()
            print(name, rows[name], flush=True)
    same = rows["limited"]["sha256"] == rows["unlimited"]["sha256"]
    print(f"{weights / 1e9:.2f} GB of weights in {layers} layers under {given.limit}: " + ("the same bytes" if same else "OTHER BYTES"))
    if given.output:
        shape = {"weights_bytes": weights, "layers": layers, "limit_bytes": limit, "settings": SETTINGS}
        write_json(given.output, {"kind": "larger-than-memory", "same_bytes": same, "runs": rows, **shape, "versions": versions()})


if __name__ == "__main__":
    main()
