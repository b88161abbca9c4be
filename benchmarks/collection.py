"""What curvature costs: time of collection over a plain forward and backward pass of the same batches, side by side in one run; and memory.

    python benchmarks/collection.py [--hidden 256 512] [--tokens 512] [--rounds 3] [--memory 64 512] [-o FILE]

"Plain" is what a training step does: labels, cross entropy, gradients of all weights. "Inputs only" leaves the weight
gradients out, as collection does, but of the whole model at once. Each round times every variant once, in turn; the ratio is of the rounds'
minima. `auto` has its two parts: the sums over seven eighths of the sequences, and the inner products of the last eighth's gradients with
four errors of each linear; its roundings are not in it (`benchmarks/rounding.py`).

Memory is by how much collecting the default, as `roundel collect` batches it and with hidden states in files, raises the peak of a fresh
process with the model and the tokens in memory already, for each number of sequences. It should not depend on it.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from roundel.curvature import inner_products, parse_curvature
from roundel.curvature.collect import IN_MEMORY, collect_visit, passes
from roundel.grids import parse_scheme
from roundel.models import select_linears
from roundel.stages.text import default_batch
from roundel.sweeps import HiddenStore, Layers, gradient_visits
from roundel.types import TokenBatch

CURVATURES = ("activation", "kfac", "sketch-b", "mean", "auto")
CANDIDATES = 4
MEMORY_HIDDEN = 256


def model_of(hidden: int, layers: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def random_tokens(sequences: int, length: int) -> TokenBatch:
    ids = torch.randint(2048, (sequences, length), generator=torch.Generator().manual_seed(1))
    return TokenBatch(ids=ids, sequence_ids=tuple(range(sequences)))


def plain(model: Qwen3ForCausalLM, tokens: TokenBatch, batch_size: int) -> None:
    for batch in tokens.split(batch_size):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids.flatten(), reduction="sum").backward()
        model.zero_grad()


def inputs_only(model: Qwen3ForCausalLM, tokens: TokenBatch, batch_size: int) -> None:
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    for batch in tokens.split(batch_size):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids.flatten(), reduction="sum").backward()
    handle.remove()
    model.requires_grad_(True)


def curvature(name: str, layers: Layers, tokens: TokenBatch, batch_size: int, store: HiddenStore) -> None:
    linears, estimator = select_linears(layers.model, parse_scheme("int4-g64").check).linears, parse_curvature(name)
    fit = len(tokens) - len(tokens) // 8 if name == "auto" else len(tokens)
    parts = {"": passes(estimator, fit)}
    errors = {str(k): lambda name: linears[name].weight.detach() for k in range(CANDIDATES)}
    for visit in gradient_visits(layers, linears, tokens, seed=0, labels="sampled", batch_size=batch_size, store=store):
        found = collect_visit(visit, linears, {"": estimator}, parts, batch_size=batch_size, device=layers.device)[""]
        if fit < len(tokens):
            inner_products(visit, errors, range(fit, len(tokens)), batch_size=batch_size, sketches=found.sketches)


def times(hidden: int, args: argparse.Namespace) -> dict[str, float]:
    """Over a plain pass."""
    model, tokens = model_of(hidden, args.layers), random_tokens(args.sequences, args.tokens)
    layers, store = Layers(model), HiddenStore(memory=IN_MEMORY)
    best: dict[str, float] = {}
    for turn in range(args.rounds + 1):  # the first round warms up
        for name in ["plain", "inputs only", *CURVATURES]:
            began = time.perf_counter()
            if name == "plain":
                plain(model, tokens, args.batch_size)
            elif name == "inputs only":
                inputs_only(model, tokens, args.batch_size)
            else:
                curvature(name, layers, tokens, args.batch_size, store)
            spent = time.perf_counter() - began
            best[name] = min(best.get(name, float("inf")), spent) if turn else float("inf")
    return {name: round(spent / best["plain"], 2) for name, spent in best.items()}


def peak() -> int:
    """Bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth(sequences: int, args: argparse.Namespace) -> int:
    """By how many bytes collecting raises this process's peak."""
    model, tokens = model_of(MEMORY_HIDDEN, args.layers), random_tokens(sequences, args.memory_tokens)
    layers = Layers(model)
    before = peak()
    with tempfile.TemporaryDirectory() as directory:
        curvature("auto", layers, tokens, default_batch(args.memory_tokens), HiddenStore(memory=0, directory=Path(directory)))
    return peak() - before


def memory(args: argparse.Namespace) -> dict[str, float]:
    """MiB by number of sequences, each in a process of its own; and the last over the first."""
    found = {}
    for sequences in args.memory:
        options = ["--growth", sequences, "--layers", args.layers, "--memory-tokens", args.memory_tokens]
        line = [sys.executable, __file__, *map(str, options)]
        found[str(sequences)] = int(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout) / 2**20
    first, last = found[str(args.memory[0])], found[str(args.memory[-1])]
    return {**{sequences: round(size, 1) for sequences, size in found.items()}, "ratio": round(last / first, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[64, 512], help="numbers of sequences; none leaves memory out")
    parser.add_argument("--memory-tokens", type=int, default=256)
    parser.add_argument("--growth", type=int, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.growth is not None:
        print(growth(args.growth, args))
        return
    load = [round(value, 2) for value in os.getloadavg()]
    rows = []
    if args.memory:  # first: Linux starts a process's peak at the memory of the one that started it, which is small yet
        rows.append({"benchmark": "collection memory", "hidden": MEMORY_HIDDEN, "tokens": args.memory_tokens, "MiB": memory(args)})
        print(json.dumps(rows[-1]), flush=True)
    for hidden in args.hidden:
        rows.append({"benchmark": "collection", "hidden": hidden, "tokens": args.tokens, "over_plain": times(hidden, args)})
        print(json.dumps(rows[-1]), flush=True)
    if args.output is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        versions = {"python": sys.version.split()[0]}
        versions |= {name: importlib.metadata.version(name) for name in ("roundel", "torch", "transformers")}
        machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_before": load}
        settings = {key: str(value) for key, value in vars(args).items() if key not in ("output", "growth")}
        report = {"commit": commit, "versions": versions, "machine": machine, "settings": settings, "rows": rows}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
