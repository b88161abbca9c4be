"""Bits for each linear against the same bits at random: KL on held-out text.

    python studies/allocation.py MODEL --calibration SPEC [--eval-data SPEC] [--scheme int3-g32] [--extra 0.25] [--seeds 3] [-o FILE]

The budget is that of `--scheme` everywhere plus `--extra` bits per weight. "allocated" is `round_allocated` with that budget over all
widths of the scheme, unfused; "random" is the scheme with one bit more for linears drawn at random until they use up the extra bits,
the mean of several draws. "uniform" is the scheme alone and that with one bit more. Same factors and text for all.
"""

import argparse
import copy
import importlib.metadata
import json
import random
import statistics
from pathlib import Path

import torch

from roundel.artifacts.source import Source, load_source
from roundel.curvature import collect, parse_curvature
from roundel.evaluate import compare_models
from roundel.grids import parse_scheme
from roundel.progress import Silent
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized
from roundel.stages.notes import Notes
from roundel.stages.report import versions
from roundel.stages.rounding.allocation import round_allocated
from roundel.stages.rounding.round_all import round_all
from roundel.stages.text import default_batch, sequence_length, split_text
from roundel.types import RoundedWeight, TokenBatch

DRAWS = 5


def measured(source: Source, twin: torch.nn.Module, weights: dict[str, RoundedWeight], text: TokenBatch) -> float:
    for name, weight in weights.items():
        twin.get_submodule(name).weight.data.copy_(dequantized(weight))
    return compare_models(twin, source.model, text, batch_size=default_batch(text.ids.shape[1])).kl_mean


def one_seed(args: argparse.Namespace, seed: int) -> dict[str, float]:
    base = Recipe(
        scheme=args.scheme,
        curvature="auto",
        format="dense",
        calibration=args.calibration,
        eval_data=args.eval_data,
        eval_sequences=args.eval_sequences,
        sequences=args.sequences,
        seq_len=args.seq_len,
        seed=seed,
    )
    source = load_source(args.model, base, "cpu", "float32")
    notes = Notes(Silent())
    split = split_text(base, source, sequence_length(source.model, base), notes.progress)
    batch = default_batch(split.calibration.ids.shape[1])
    estimator = parse_curvature(base.curvature)
    sketches = collect(source.model, source.linears, split.calibration, estimator, seed=seed, batch_size=batch).sketches
    twin = copy.deepcopy(source.model)
    width = int(args.scheme[3])
    more = args.scheme.replace(str(width), str(width + 1), 1)
    found, weights, bits = {}, {}, {}
    sizes = {name: linear.weight.numel() for name, linear in source.linears.items()}
    for scheme in (args.scheme, more):
        weights[scheme], rows = round_all(
            base, parse_scheme(scheme), source, copy.deepcopy(sketches), split.choice, notes, batch_size=batch
        )
        bits[scheme] = sum(rows[name]["bits_per_weight"] * size for name, size in sizes.items()) / sum(sizes.values())
        found[scheme] = measured(source, twin, weights[scheme], split.heldout)
    budget = bits[args.scheme] + args.extra * (bits[more] - bits[args.scheme])
    draws = []
    for draw in range(DRAWS):
        order = sorted(sizes)
        random.Random(1000 * seed + draw).shuffle(order)
        chosen, left = dict(weights[args.scheme]), args.extra * sum(sizes.values())
        for name in order:
            if sizes[name] <= left:
                chosen[name], left = weights[more][name], left - sizes[name]
        draws.append(measured(source, twin, chosen, split.heldout))
    allocated, rows, report = round_allocated(
        Recipe(**{**base.as_json(), "include": (), "exclude": (), "schemes": (), "bits": budget}),
        source,
        sketches,
        split.choice,
        notes,
        batch_size=batch,
    )
    found |= {
        "random": statistics.fmean(draws),
        "random, best draw": min(draws),
        "allocated": measured(source, twin, allocated, split.heldout),
        "bits": budget,
        "allocated bits": sum(rows[name]["bits_per_weight"] * size for name, size in sizes.items()) / sum(sizes.values()),
        "allocated, predicted": report["predicted_kl"],
    }
    print(json.dumps({"seed": seed, "taken": report["taken"], **found}), flush=True)
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
    rows = [one_seed(args, seed) for seed in range(args.seeds)]
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
