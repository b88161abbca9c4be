"""Train the embedded demo model: a Qwen3 of about 3.5 million weights on the sources and docs of Python's standard library.

    python scripts/train_demo_model.py -o src/roundel/demo/model --tokens 16000000
    python scripts/train_demo_model.py -o MODEL --tokens 4000000 --experts 8

With `--experts` it is a Qwen3-MoE of that many experts in each layer, of which every token takes two.
Matrices are trained by Muon, embeddings and norms by AdamW, in bfloat16 autocast on float32 master weights, with a linear
warm-up and a linear decay to zero. The model card states the held-out loss beside a unigram and an interpolated trigram model of the same
tokens. About one hour on two cores with AVX512-BF16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from roundel.demo.corpus import documents
from roundel.models.experts import join_experts, split_experts, split_modules

END = "<|endoftext|>"
BALANCE = 0.01  # of the loss that spreads tokens over experts, for each nat
# The pre-tokenization of the Qwen2 and Qwen3 families, so that every engine that serves them tokenizes this model too.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=1024)


def dense(tokenizer: PreTrainedTokenizerFast, vocab: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(intermediate_size=512, num_hidden_layers=5, **shared(tokenizer, vocab)))


def mixture(tokenizer: PreTrainedTokenizerFast, vocab: int, experts: int) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            moe_intermediate_size=192,
            num_experts=experts,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            output_router_logits=True,
            num_hidden_layers=4,
            **shared(tokenizer, vocab),
        )
    )


def shared(tokenizer: PreTrainedTokenizerFast, vocab: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    end = tokenizer.eos_token_id
    return np.array([t for ids in tokenizer(texts)["input_ids"] for t in (*ids, end)], dtype=np.int64)


def ngram_losses(train: np.ndarray, held: np.ndarray, vocab: int) -> dict[str, float]:
    """Nats per token of a unigram and of an interpolated trigram (weights by EM on one half of `held`, loss on the other)."""
    uni = np.bincount(train, minlength=vocab) + 1.0
    uni /= uni.sum()
    bi, tri, ctx1, ctx2 = Counter(), Counter(), Counter(), Counter()
    a, b, c = train[:-2], train[1:-1], train[2:]
    bi.update((b * vocab + c).tolist())
    ctx1.update(b.tolist())
    tri.update(((a * vocab + b) * vocab + c).tolist())
    ctx2.update((a * vocab + b).tolist())

    def components(ids: np.ndarray) -> np.ndarray:
        rows = []
        for x, y, z in zip(ids[:-2].tolist(), ids[1:-1].tolist(), ids[2:].tolist(), strict=True):
            p2 = bi[y * vocab + z] / ctx1[y] if ctx1[y] else 0.0
            p3 = tri[(x * vocab + y) * vocab + z] / ctx2[x * vocab + y] if ctx2[x * vocab + y] else 0.0
            rows.append((1 / vocab, uni[z], p2, p3))
        return np.array(rows)

    half = len(held) // 2
    fit, test = components(held[:half]), components(held[half:])
    weights = np.full(4, 0.25)
    for _ in range(50):
        posterior = fit * weights
        weights = (posterior / posterior.sum(1, keepdims=True)).mean(0)
    return {"unigram": float(-np.log(uni[held]).mean()), "trigram": float(-np.log(test @ weights).mean())}


@torch.no_grad()
def loss_on(model: PreTrainedModel, ids: np.ndarray, length: int) -> float:
    rows = torch.from_numpy(ids[: len(ids) // length * length].reshape(-1, length))
    total = 0.0
    for batch in rows.split(16):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch).logits
        total += torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (rows.shape[0] * (length - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_000_000)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--experts", type=int, default=0, help="in each layer; 0 for a dense model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    texts = documents("train")
    tokenizer = train_tokenizer(texts, args.vocab)
    train, held = encode(tokenizer, texts), encode(tokenizer, documents("heldout"))
    print(f"{len(train)} training tokens, {len(held)} held-out tokens", flush=True)
    baselines = ngram_losses(train, held, args.vocab)
    print(json.dumps(baselines), flush=True)

    model = mixture(tokenizer, args.vocab, args.experts) if args.experts else dense(tokenizer, args.vocab)
    split_experts(model)  # so that each matrix is a parameter
    model.requires_grad_(True)
    model.config.use_cache = False
    weights = sum(p.numel() for p in model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    # Attention is a third of a step at full length, so the first part runs on windows of half the length.
    long_steps = round(0.3 * args.tokens / (args.batch * args.length))
    short_steps = round(0.7 * args.tokens / (args.batch * (args.length // 2)))
    steps = short_steps + long_steps
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / 100, 1.0) * max(0.0, min(1.0, (steps - s) / (0.6 * steps))))
        for o in optimizers
    ]
    generator = np.random.default_rng(args.seed)
    began = time.time()
    for step in range(steps):
        length = args.length // 2 if step < short_steps else args.length
        starts = generator.integers(0, len(train) - length, args.batch)
        batch = torch.from_numpy(np.stack([train[s : s + length] for s in starts]))
        with torch.autocast("cpu", torch.bfloat16):
            result = model(batch)
        loss = torch.nn.functional.cross_entropy(result.logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        if args.experts:
            loss = loss + BALANCE * result.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 50 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f} {time.time() - began:.0f} s", flush=True)
        if (step + 1) % 500 == 0:
            print(f"held-out loss {loss_on(model, held, args.length):.4f}", flush=True)

    for module in split_modules(model).values():
        join_experts(module)
    model.config.output_router_logits = False
    model.to(torch.bfloat16)
    model.config.use_cache = True
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    held_out = loss_on(model.float(), held, args.length)
    print(f"held-out loss {held_out:.4f} perplexity {math.exp(held_out):.2f}", flush=True)
    (args.output / "README.md").write_text(
        f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
---
# Roundel's demo model

A {type(model).__name__} of {weights:,} weights (bfloat16) of the Python standard library: sources and reference topics, for
demonstrations and tests of quantization. Made by `scripts/train_demo_model.py` with {args.tokens:,} tokens of Python's own files
(Python Software Foundation License), {time.time() - began:.0f} s on two CPU cores; it has seen nothing else.

| held-out nats per token (files never trained on) | |
|---|---|
| unigram model | {baselines["unigram"]:.3f} |
| interpolated trigram model | {baselines["trigram"]:.3f} |
| **this model** | **{held_out:.3f}** |
"""
    )


if __name__ == "__main__":
    main()
