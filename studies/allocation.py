"""Bits for each linear against the same bits at random: KL on held-out text.

    python studies/allocation.py MODEL --calibration SPEC [--eval-data SPEC] [--scheme int3-g32] [--extra 0.25] [--seeds 3] [-o FILE]

The budget is that of `--scheme` everywhere plus `--extra` bits per weight. "allocated" is `quantize --bits` with that budget over all
widths of the scheme; "random" is the scheme with one bit more for linears drawn at random until they use up the extra bits,
the mean of several draws. "uniform" is the scheme alone and that with one bit more. Same factors and text for all, no prefix-aware
targets, because linears of several roundings are mixed.
"""

import argparse
import importlib.metadata
import json
import random
import statistics
import tempfile
from pathlib import Path

import torch

import roundel
from roundel.artifacts.checkpoints import read
from roundel.artifacts.source import Source, load_source
from roundel.evaluate import compare_models
from roundel.progress import Silent
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized
from roundel.stages.notes import Notes
from roundel.stages.report import Quantized, versions
from roundel.stages.text import default_batch, split_text
from roundel.types import RoundedWeight, TokenBatch

DRAWS = 5


def measured(source: Source, twin: torch.nn.Module, weights: dict[str, RoundedWeight], text: TokenBatch) -> float:
    for name, weight in weights.items():
        twin.get_submodule(name).weight.data.copy_(dequantized(weight))
    return compare_models(twin, source.model, text, batch_size=default_batch(text.ids.shape[1])).kl_mean


def average(result: Quantized) -> float:
    """Bits per weight over all linears."""
    rows = result.details["layers"].values()
    sizes = [row["shape"][0] * row["shape"][1] for row in rows]
    return sum(row["bits_per_weight"] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)


def one_seed(args: argparse.Namespace, seed: int, work: Path) -> dict[str, float]:
    text = {name: getattr(args, name) for name in ("calibration", "eval_data", "eval_sequences", "sequences", "seq_len")} | {"seed": seed}
    source = load_source(args.model, Recipe(scheme=args.scheme, format="native", **text), "cpu", "float32")
    heldout = split_text(Recipe(**text), source, Notes(Silent())).heldout
    twin = load_source(args.model, Recipe(scheme=args.scheme, **text), "cpu", "float32").model
    roundel.collect_factors(args.model, output=work / "factors", dtype="float32", **text)
    common = {"factors": work / "factors", "format": "native", "prefix_aware": False, "dtype": "float32", **text}
    width = int(args.scheme[3])
    more = args.scheme.replace(str(width), str(width + 1), 1)
    found, weights, bits = {}, {}, {}
    for scheme in (args.scheme, more):
        result = roundel.quantize(args.model, output=work / scheme, scheme=scheme, **common)
        weights[scheme], bits[scheme] = dict(read(result.path).rounded), average(result)
        found[scheme] = measured(source, twin, weights[scheme], heldout)
    budget = bits[args.scheme] + args.extra * (bits[more] - bits[args.scheme])
    sizes = {name: source.linears[name].weight.numel() for name in weights[more]}
    draws = []
    for draw in range(DRAWS):
        order = sorted(sizes)
        random.Random(1000 * seed + draw).shuffle(order)
        chosen, left = dict(weights[args.scheme]), args.extra * sum(sizes.values())
        for name in order:
            if sizes[name] <= left:
                chosen[name], left = weights[more][name], left - sizes[name]
        draws.append(measured(source, twin, chosen, heldout))
    result = roundel.quantize(args.model, output=work / "allocated", scheme=args.scheme, bits=budget, **common)
    found |= {
        "random": statistics.fmean(draws),
        "random, best draw": min(draws),
        "allocated": measured(source, twin, dict(read(result.path).rounded), heldout),
        "bits": budget,
        "allocated bits": average(result),
        "allocated, predicted": result.details["allocation"]["predicted_kl"],
    }
    print(json.dumps({"seed": seed, **found}), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--eval-sequences", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--scheme", default="int3-g32")
    parser.add_argument("--extra", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as work:
            rows.append(one_seed(args, seed, Path(work)))
    mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    print(json.dumps({"mean": mean}))
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        settings["model"] = Path(args.model).name
        record = {
            "roundel": importlib.metadata.version("roundel"),
            "versions": versions(),
            "settings": settings,
            "rows": rows,
            "mean": mean,
        }
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
