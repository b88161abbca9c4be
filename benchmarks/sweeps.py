"""What the sweeps of `quantize` take, over plain passes of the same sequences through the same model, side by side in one run.

    python benchmarks/sweeps.py [--widths 576 1152] [--depths 2 4 8] [--sequences 32] [--tokens 512] [--rounds 2] [--model DIR] [-o FILE]

The models are Llamas of SmolLM2's proportions with random weights, or the one in DIR. Each round times everything once, in turn, and the
ratios are of the rounds' minima; a round before them warms up, unless there is none after it.

    collection      the curvature stage of `--effort quick`, from hidden states to factors on the disk, over a forward pass and a backward
                    pass to the inputs of the sequences, of the whole model by torch in float32
    rounding sweep  both paths, moments, targets, everything but rounding itself (codes are made before), over a forward pass of them
    evaluation      of what was written, over a forward pass of the held-out sequences

The rows of several widths and depths say how each grows. `rounding` is the whole stage, once. One layer of an 8B's shape on a GPU:

    python benchmarks/sweeps.py --widths 4096 --inner 14336 --depths 1 --device cuda --dtype bfloat16 --tokens 2048
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from roundel.artifacts.source import Source, load_source
from roundel.artifacts.work import open_work
from roundel.artifacts.written import Written
from roundel.calibration import Split, split_tokens
from roundel.curvature import parse_curvature
from roundel.curvature.collect import pilot_first
from roundel.demo.corpus import documents
from roundel.grids import ScalarGrid, parse_scheme
from roundel.models import load_tokenizer, locate
from roundel.progress import Silent
from roundel.recipes import Recipe
from roundel.rounding.nearest import nearest
from roundel.rounding.prefix import Strengths
from roundel.stages.curvature import measure_curvature
from roundel.stages.ends import Ends
from roundel.stages.evaluation import evaluate_values
from roundel.stages.notes import Notes
from roundel.stages.report import versions
from roundel.stages.rounding import choose_schemes, round_model
from roundel.stages.rounding.sweep import Prefix, rounding_sweep
from roundel.stages.text import default_batch
from roundel.stages.writing import write_model
from roundel.store import write_json
from roundel.types import RoundedWeight, TokenBatch

SCHEME = "int3-g64"


def directory_of(width: int, depth: int, scratch: Path, inner: int | None = None) -> Path:
    """A model's; its feed-forward blocks are `inner` wide, or 8/3 of its width."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(locate("demo"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner or width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 192),
        tie_word_embeddings=True,
    )
    path = scratch / f"{width}-{depth}"
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def text(path: Path, count: int, length: int) -> torch.Tensor:
    """Sequences of Python's standard library."""
    tokenizer = load_tokenizer(path)
    ids: list[int] = []
    for document in documents("train"):
        ids += tokenizer(document).input_ids
        if len(ids) >= count * length:
            break
    return torch.tensor(ids[: count * length]).view(count, length)


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def forward(source: Source, tokens: TokenBatch, batch: int) -> None:
    with torch.no_grad():
        for part in tokens.split(batch):
            source.model(input_ids=part.ids.to(source.model.device), use_cache=False)


def backward(source: Source, tokens: TokenBatch, batch: int) -> None:
    """To the inputs."""
    handle = source.model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    for part in tokens.split(batch):
        ids = part.ids.to(source.model.device)
        logits = source.model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()
    handle.remove()


def ratios(path: Path, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    recipe = Recipe.of(
        scheme=SCHEME, effort="quick", sequences=args.sequences, seq_len=args.tokens, prefix_sequences=args.sequences, prefix_aware=True
    )
    count, batch = args.sequences, default_batch(args.tokens)
    split: Split = split_tokens(text(path, 2 * count, args.tokens), calibration=count, heldout=count, seed=0, source="text")
    split = dataclasses.replace(split, calibration=pilot_first(parse_curvature(recipe.curvature), split.calibration))
    best: dict[str, float] = {}
    with open_work(None, beside=scratch / "out", memory=None) as work:
        source = load_source(str(path), recipe, args.device, args.dtype, work=work)
        source.model.requires_grad_(False)
        codes = {name: _nearest(linear.weight) for name, linear in source.linears.items()}

        def sweep() -> None:
            strengths = Strengths(prefix=recipe.prefix_strength, stream=recipe.stream_strength, damping=recipe.prefix_damping)

            def given(_index: int, names: list[str], targets: Any, _moments: object) -> dict[str, RoundedWeight]:
                targets(names)
                return {name: codes[name] for name in names}

            prefix = Prefix(tokens=split.everything[:count], strengths=strengths, quickly=True)
            for _ in rounding_sweep(source.layers, source.linears, given, prefix, batch_size=batch, store=work.passing("sweep")):
                pass

        def collect() -> None:
            for index in range(len(source.layers) + 1):
                for file in work.curvature.glob(f"{index:04d}*"):
                    file.unlink()
            found.append(measure_curvature(recipe, source, split, None, notes, batch_size=batch, work=work))

        found: list[Any] = []
        notes = Notes(Silent())
        collect()
        chosen = choose_schemes(recipe, source, found[-1])
        rounded = round_model(recipe, source, split, found[-1], chosen, Ends(), notes, batch_size=batch, work=work)
        rounding = notes.seconds["rounding"]
        target = scratch / f"out-{path.name}"
        target.mkdir()
        write_model(target, recipe, source, rounded, notes)
        written = Written(target, source, recipe.written_format(), rounded.layers, rounded.others)
        calls = {
            "forward": lambda: forward(source, split.calibration, batch),
            "forward and backward": lambda: backward(source, split.calibration, batch),
            "collection": collect,
            "rounding sweep": sweep,
            "evaluation": lambda: evaluate_values(written, source, split, notes, batch_size=batch, work=work),
        }
        for turn in range(args.rounds + 1):  # the first warms up
            for name, call in calls.items():
                spent = timed(call)
                best[name] = min(best.get(name, float("inf")), spent) if turn or not args.rounds else float("inf")
    return {
        "seconds": {**best, "rounding": rounding},
        "collection_over_forward_and_backward": best["collection"] / best["forward and backward"],
        "rounding_sweep_over_forward": best["rounding sweep"] / best["forward"],
        "evaluation_over_forward": best["evaluation"] / best["forward"],
    }


def _nearest(weight: torch.Tensor) -> RoundedWeight:
    grid, W = parse_scheme(SCHEME), weight.detach().float()
    assert isinstance(grid, ScalarGrid)
    scales = grid.fit_scales(W, torch.ones(W.shape[1]), torch.float16)
    return RoundedWeight(scheme=grid.name, codes=nearest(W, grid, scales), scales=scales, shape=(W.shape[0], W.shape[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[576, 1152])
    parser.add_argument("--depths", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inner", type=int, help="Width of feed-forward blocks.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    shapes = [(args.widths[0], depth) for depth in args.depths] + [(width, args.depths[0]) for width in args.widths[1:]]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if args.model:
            rows.append({"model": args.model.name, **ratios(args.model, Path(scratch), args)})
        for width, depth in [] if args.model else shapes:
            path = directory_of(width, depth, Path(scratch), args.inner)
            rows.append({"width": width, "depth": depth, **ratios(path, Path(scratch), args)})
            print(rows[-1], flush=True)
    if args.output is not None:
        settings = {"sequences": args.sequences, "tokens": args.tokens, "scheme": SCHEME, "threads": torch.get_num_threads()}
        write_json(args.output, {"kind": "sweeps", "versions": versions(), **settings, "rows": rows})


if __name__ == "__main__":
    main()
