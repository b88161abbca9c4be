"""Size and speed of a quantized model beside its original: `roundel bench`.

Bytes on disk are those of the weight files; bytes in memory those of all parameters and buffers, each once, as loaded. Prefill is one
forward pass over `batch` sequences of `length` random tokens that fills the cache; decoding then adds one token to each sequence at a time.
Both are seconds per token of the batch. The two models take turns, after one unmeasured round, and the medians over rounds are reported.

What is measured is Transformers' way of running the directory: packed weights for native ones, dense weights for what Transformers
decompresses when it loads (compressed-tensors, gguf). Engines with kernels of their own are faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from roundel.artifacts.checkpoints import load_written, weight_bytes
from roundel.artifacts.source import positions as positions_of
from roundel.calibration import cache_of
from roundel.errors import ModelError, SchemeError
from roundel.models import load_model, locate
from roundel.models.load import pick_device, pick_dtype
from roundel.progress import Progress, Silent
from roundel.stages.report import versions

__all__ = ["bench"]

ROUNDS = 3


def bench(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    lengths: Sequence[int] = (1024, 2048),
    batches: Sequence[int] = (1, 8),
    tokens: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a directory, and the original beside it.

    Args:
        model: A directory that Roundel wrote, or any other causal language model.
        reference: The original; None: the model alone.
        lengths: Tokens of the prefilled sequences, cut to what the model's positions leave.
        batches: Sequences at once.
        tokens: How many are decoded after each prefill.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: In which the models run: `auto`, `float32` or `bfloat16`.
        progress: Where to report; silent by default.

    Returns:
        `models`, each with `path`, `disk_bytes` and `memory_bytes`; `speed`, a row for each length and batch with the seconds per token
        of prefill and decoding of each model; `device`, `dtype`, `versions`.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    progress = progress or Silent()
    if min((*lengths, *batches, tokens), default=0) < 1:
        raise SchemeError(f"lengths {list(lengths)}, batches {list(batches)}, {tokens} tokens: expected numbers of at least 1")
    place = pick_device(device)
    kind = pick_dtype(dtype, place, progress.warn)
    paths = {"quantized": locate(str(model))}
    models = {"quantized": load_written(paths["quantized"], device=place, dtype=kind)}
    if reference is not None:
        paths["original"] = locate(str(reference))
        models["original"] = load_model(paths["original"], device=place, dtype=kind)
    positions = min(positions_of(each.config) for each in models.values())
    if positions <= tokens:
        raise SchemeError(f"{tokens} decoded tokens do not fit the model's {positions} positions; give fewer --tokens")
    usable = list(dict.fromkeys(min(length, positions - tokens) for length in lengths))
    if max(lengths) + tokens > positions:
        progress.warn(f"lengths are cut to {positions - tokens} tokens: the model has {positions} positions")
    rows = []
    with progress.stage("speed", len(usable) * len(batches) * (ROUNDS + 1) * len(models)) as advance:
        for length in usable:
            for batch in batches:
                spent: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
                for _ in range(ROUNDS + 1):
                    for name, each in models.items():
                        spent[name].append(_run(each, batch, length, tokens))
                        advance(1)
                row: dict[str, Any] = {"length": length, "batch": batch}
                for name, measured in spent.items():
                    prefill, decode = zip(*measured[1:], strict=True)
                    row[name] = {
                        "prefill_seconds_per_token": statistics.median(prefill),
                        "decode_seconds_per_token": statistics.median(decode),
                    }
                rows.append(row)
    return {
        "models": {
            name: {"path": str(paths[name]), "disk_bytes": weight_bytes(paths[name]), "memory_bytes": _memory_bytes(each)}
            for name, each in models.items()
        },
        "speed": rows,
        "decoded_tokens": tokens,
        "rounds": ROUNDS,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "dtype": str(kind).removeprefix("torch."),
        "versions": versions(),
    }


def _memory_bytes(model: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _run(model: nn.Module, batch: int, length: int, tokens: int) -> tuple[float, float]:
    """Seconds per token of a prefill and of decoding."""
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(length)).to(device)
    if (name := cache_of(model)) is None:
        raise ModelError("the model keeps nothing of earlier tokens that it could be given again: decoding cannot be timed")
    with torch.inference_mode():
        began = _now(device)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        filled = _now(device)
        for _ in range(tokens):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), use_cache=True, **{name: out[name]})
        ended = _now(device)
    return (filled - began) / (batch * length), (ended - filled) / (batch * tokens)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
