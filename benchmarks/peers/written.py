"""What other tools write: a quantized directory of a model, made by a tool in its own environment (`README.md`).

    .venv-peers/llm_compressor/bin/python benchmarks/peers/written.py llm-compressor:gptq --bits 4 --group 64 MODEL TEXT OUT
    .venv-mlx/bin/python benchmarks/peers/written.py mlx --bits 3 --group 64 MODEL TEXT OUT

Everything that is not named is the tool's default; they calibrate on the first sequences of the text. Used by `benchmarks/refine.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

arguments = argparse.ArgumentParser(description="A directory that another tool has quantized.")
arguments.add_argument("method", help="llm-compressor:gptq, llm-compressor:awq, auto-round, gptqmodel:gptq, gptqmodel:awq or mlx")
arguments.add_argument("model")
arguments.add_argument("text", type=Path)
arguments.add_argument("output", type=Path)
arguments.add_argument("--bits", type=int, default=4)
arguments.add_argument("--group", type=int, default=64)
arguments.add_argument("--sequences", type=int, default=64)
arguments.add_argument("--seq-len", type=int, default=256)
arguments.add_argument("--iterations", type=int, default=50, help="AutoRound's.")
given = arguments.parse_args()


def tokens(tokenizer: Any) -> Any:
    """`(sequences, tokens)`."""
    import torch

    whole = tokenizer(given.text.read_text(encoding="utf-8")[: 8 * given.sequences * given.seq_len], return_tensors="pt").input_ids[0]
    return torch.stack(list(whole[: given.sequences * given.seq_len].split(given.seq_len)))


def loaded() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32), AutoTokenizer.from_pretrained(given.model)


def llm_compressor(method: str) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader

    IntermediatesCache.pin_memory = lambda *_given, **_named: None  # fails where there is no accelerator
    model, tokenizer = loaded()
    weights = {"num_bits": given.bits, "type": "int", "symmetric": method == "gptq", "strategy": "group", "group_size": given.group}
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    recipe = [GPTQModifier(**scheme)] if method == "gptq" else [AWQModifier(), QuantizationModifier(**scheme)]
    rows = tokens(tokenizer)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=DataLoader([{"input_ids": row} for row in rows], batch_size=8),
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=given.seq_len,
    )
    model.save_pretrained(given.output, save_compressed=True)
    tokenizer.save_pretrained(given.output)


def auto_round(_method: str) -> None:
    import torch
    from auto_round import AutoRound

    model, tokenizer = loaded()
    rows = tokens(tokenizer)
    texts = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    rounder = AutoRound(
        model,
        tokenizer,
        bits=given.bits,
        group_size=given.group,
        sym=True,
        iters=given.iterations,
        dataset=texts,
        nsamples=len(texts),
        seqlen=given.seq_len,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    rounder.quantize_and_save(output_dir=str(given.output), format="auto_round")
    if not (given.output / "config.json").exists():  # it makes a directory in there
        (inner,) = (path for path in given.output.iterdir() if path.is_dir())
        for path in inner.iterdir():
            path.rename(given.output / path.name)
        inner.rmdir()


def gptqmodel(method: str) -> None:
    import os

    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    _, tokenizer = loaded()
    own = {"quant_method": "awq", "format": "gemm"} if method == "awq" else {}
    config = QuantizeConfig(bits=given.bits, group_size=given.group, sym=method != "awq", offload_to_disk=False, device="cpu", **own)
    peer = GPTQModel.load(given.model, config, dtype=torch.float32)
    texts = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens(tokenizer)]
    peer.quantize(texts, tokenizer=tokenizer, batch_size=8, **({} if method == "awq" else {"backend": BACKEND.GPTQ_TORCH}))
    peer.save(str(given.output))


def mlx(_method: str) -> None:
    from mlx_lm import convert

    convert(given.model, str(given.output), quantize=True, q_bits=given.bits, q_group_size=given.group)


tool, _, method = given.method.partition(":")
{"llm-compressor": llm_compressor, "auto-round": auto_round, "gptqmodel": gptqmodel, "mlx": mlx}[tool](method)
