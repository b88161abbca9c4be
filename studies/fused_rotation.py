"""Rotations fused into a model's weights against none: KL on held-out text.

    python studies/fused_rotation.py MODEL --calibration SPEC --eval-data SPEC [--schemes int4-g128,...] [--variants none,fused,...]
        [--seeds 0 1 2] [--spread SIGMA] [--sequences N] [--seq-len T] [-o FILE]

Variants: "none"; "fused": `models.fuse_rotation` of the residual stream and of the values, "residual" and "values": of one of them, each
written as a checkpoint in the types of the original and quantized like any other; "online": both sides of every linear, undone after
decoding, which engines must do at run time. All KLs are against the original model, so that what the fused embedding and head lose in 16
bits counts. A seed draws calibration text, labels and signs. Against "none": the paired `difference`, whose standard error is over
evaluation sequences alone, and the `ratio`, whose error is over seeds; the latter holds what the draw of the signs makes of it.

`--spread SIGMA` first gives the model channels of different sizes without changing its function: a channel of a norm is divided by
`exp(SIGMA z)`, z normal, and the columns of the linears that read it are multiplied. A small model has none by itself (the kurtosis of
the demo's weights is 3.0 to 3.3); large ones have, and a rotation makes them all alike.
"""

import argparse
import importlib.metadata
import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import roundel
from roundel.commands.evaluate import evaluate
from roundel.models import Checkpoint, load_model, locate
from roundel.models.fuse import PARTS, fuse_rotation
from roundel.stages.collecting import collect_factors
from roundel.stages.report import versions
from roundel.store import copy_files, write_json, write_shards

FUSED = {"fused": PARTS, "residual": PARTS[:1], "values": PARTS[1:]}
SETTINGS = ("calibration", "eval_data", "sequences", "seq_len", "eval_sequences", "curvature")


def write_fused(source: Path, target: Path, *, seed: int, parts: tuple[str, ...]) -> dict[str, Any]:
    model = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    fused = fuse_rotation(model, seed=seed, parts=parts)
    checkpoint = fused.checkpoint(Checkpoint.open(source))
    target.mkdir()
    copy_files(source, target, leave_out={"config.json", "model.safetensors.index.json"})
    write_shards(target, checkpoint.sizes, lambda name: {name: checkpoint.read(name)})
    write_json(target / "config.json", fused.config(json.loads((source / "config.json").read_text(encoding="utf-8"))))
    return fused.as_json()


def write_spread(source: Path, target: Path, *, sigma: float) -> None:
    """An equivalent model, of the usual names of modules, with channels of different sizes; in float32."""
    model = load_model(source, device=torch.device("cpu"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, part in ((layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)):
                factor = torch.exp(sigma * torch.randn(norm.weight.shape, generator=generator))
                norm.weight /= factor
                for linear in part.children():
                    if isinstance(linear, torch.nn.Linear) and linear not in (getattr(part, "o_proj", 0), getattr(part, "down_proj", 0)):
                        linear.weight *= factor
    model.save_pretrained(target)
    copy_files(source, target, leave_out={"config.json"})


def one_variant(args: argparse.Namespace, seed: int, variant: str, work: Path) -> list[dict[str, Any]]:
    source = locate(args.model)
    if args.spread:
        original, source = source, work / "spread"
        if not source.exists():
            write_spread(original, source, sigma=args.spread)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"seed": seed, "rotate": "none"}
    model, fusion = source, None
    if variant in FUSED:
        model = work / f"{variant}-{seed}"
        fusion = write_fused(source, model, seed=seed, parts=FUSED[variant])
    if variant == "online":
        settings |= {"rotate": "online", "format": "dense"}
    length = {"data": args.eval_data, "sequences": args.eval_sequences, "seq_len": args.seq_len}
    began = time.monotonic()
    factors = work / f"factors-{variant if variant in FUSED else 'none'}-{seed}"
    if not factors.exists():
        collect_factors(model, output=factors, **settings)
    seconds = time.monotonic() - began
    rows = []
    for scheme in args.schemes:
        began = time.monotonic()
        output = work / f"{variant}-{seed}-{scheme}"
        result = roundel.quantize(model, output=output, factors=factors, scheme=scheme, prefix_aware=False, **settings)
        report = evaluate(output, reference=source, **length).report
        rows.append(
            {
                "variant": variant,
                "seed": seed,
                "scheme": scheme,
                "kl": report.kl_mean,
                "stderr": report.kl_stderr,
                "sequence_kl": report.sequence_kl,
                "kl_to_fused": result.report.kl_mean,
                "predicted": result.details["predicted_kl"]["total"],
                "bits_per_weight": result.details["bits_per_weight"]["quantized"],
                "checkpoint_bytes": sum(path.stat().st_size for path in output.glob("*.safetensors")),
                "skipped": len(result.details["skipped"]),
                "fusion": fusion,
                "collect_seconds": round(seconds, 1),
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        shutil.rmtree(output)
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "sequence_kl"}), flush=True)
    return rows


def summary(rows: list[dict[str, Any]], schemes: list[str], variants: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """By scheme and variant, means over seeds; against "none" the paired difference and the ratio, with standard errors."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scheme in schemes:
        found[scheme] = {}
        own = {variant: [row for row in rows if (row["scheme"], row["variant"]) == (scheme, variant)] for variant in variants}
        for variant in variants:
            entry = found[scheme][variant] = {key: statistics.fmean(row[key] for row in own[variant]) for key in ("kl", "stderr")}
            if variant == "none" or "none" not in own:
                continue
            pairs = list(zip(own[variant], own["none"], strict=True))
            apart = torch.tensor([[a - b for a, b in zip(x["sequence_kl"], y["sequence_kl"], strict=True)] for x, y in pairs]).mean(dim=0)
            logs = [math.log(x["kl"] / y["kl"]) for x, y in pairs]
            entry["difference"], entry["difference_stderr"] = apart.mean().item(), (apart.std() / len(apart) ** 0.5).item()
            entry["ratio"] = math.exp(statistics.fmean(logs))
            if len(logs) > 1:
                entry["ratio_stderr_over_seeds"] = statistics.stdev(logs) / len(logs) ** 0.5
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--eval-sequences", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--curvature", default="auto")
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=["int4-g128", "int3-g128", "int2-g64"])
    parser.add_argument("--variants", type=lambda text: text.split(","), default=["none", "fused"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    settings["model"] = Path(args.model).name
    record = {"roundel": importlib.metadata.version("roundel"), "versions": versions(), "settings": settings}
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as work:
            for variant in args.variants:
                rows += one_variant(args, seed, variant, Path(work))
                if args.output:  # an interrupted study keeps what it has
                    args.output.write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    means = summary(rows, args.schemes, args.variants)
    print(json.dumps(means, indent=2))
    if args.output:
        args.output.write_text(json.dumps({**record, "rows": rows, "mean": means}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
