"""What curvature costs: time of collection over a plain forward and backward pass of the same batches, side by side in one run.

    python benchmarks/collection.py [--hidden 256 512] [--tokens 512] [--rounds 3]

"Plain" is what a training step does: labels, cross entropy, gradients of all weights. "Inputs only" leaves the weight
gradients out, as collection does. Each round times every variant once, in turn; the ratio is of the rounds' minima.
"""

import argparse
import json
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from roundel.curvature import collect, parse_curvature
from roundel.grids import parse_scheme
from roundel.models import select_linears
from roundel.types import TokenBatch


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    curvatures = ["activation", "kfac", "sketch-b", "mean"]
    for hidden in args.hidden:
        model = model_of(hidden, args.layers)
        linears = select_linears(model, parse_scheme("int4-g64")).linears
        ids = torch.randint(2048, (args.sequences, args.tokens), generator=torch.Generator().manual_seed(1))
        tokens = TokenBatch(ids=ids, sequence_ids=tuple(range(args.sequences)))
        best: dict[str, float] = {}
        for _ in range(args.rounds + 1):  # the first round warms up
            for name in ["plain", "inputs only", *curvatures]:
                began = time.perf_counter()
                if name == "plain":
                    plain(model, tokens, args.batch_size)
                elif name == "inputs only":
                    inputs_only(model, tokens, args.batch_size)
                else:
                    collect(model, linears, tokens, parse_curvature(name), seed=0, batch_size=args.batch_size)
                spent = time.perf_counter() - began
                best[name] = min(best.get(name, float("inf")), spent) if _ else float("inf")
        ratios = {name: round(spent / best["plain"], 2) for name, spent in best.items()}
        print(json.dumps({"benchmark": "collection", "hidden": hidden, "tokens": args.tokens, "over_plain": ratios}))


if __name__ == "__main__":
    main()
