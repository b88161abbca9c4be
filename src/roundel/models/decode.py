"""Originals that are quantized themselves: decoded once to 16 bits, and then sources like all others.

Many models are published in FP8 or MXFP4 alone. Transformers decodes them while it loads them; what it has then is written as a plain
checkpoint in bfloat16 beside the work, and everything else starts from there. Whether a checkpoint is quantized is told by the types in the
headers of its files, not by config.json, where a `quantization_config` may have been left over plain weights.

Cost: the model in bfloat16, in memory once and on the disk until the job is done. Not done: GPTQ, AWQ, bitsandbytes; one layer at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config

from roundel.errors import ModelError
from roundel.models.load import guarded, load_model, quantization_settings, skeleton
from roundel.store import copy_files, staged_directory

__all__ = ["decoded"]

METHODS: dict[str, Callable[..., Any]] = {
    "fp8": FineGrainedFP8Config,
    "mxfp4": Mxfp4Config,
    "compressed-tensors": CompressedTensorsConfig,
}


def decoded(path: Path, method: str, folder: Path) -> Path:
    """A directory with the same model in bfloat16, made in `folder` if it is not there yet.

    Raises:
        ModelError: nothing here decodes it.
        StorageError: the disk refuses.
    """
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ModelError(
            f"{path} is quantized already ({method}), which cannot be decoded here ({known} can); start from the original model"
        )
    known_by = [str(path.absolute()), *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in sorted(path.iterdir()))]
    target = folder / f"decoded-{hashlib.sha256(chr(10).join(known_by).encode()).hexdigest()[:16]}"
    if (target / "config.json").is_file():
        return target
    if method == "compressed-tensors":
        model = load_model(path, device=torch.device("cpu"), dtype=torch.bfloat16)
    else:
        settings = {name: value for name, value in quantization_settings(path).items() if name not in ("quant_method", "dequantize")}
        options = {
            "dtype": torch.bfloat16,
            "trust_remote_code": False,
            "use_safetensors": True,
            "quantization_config": METHODS[method](**settings, dequantize=True),
        }
        model = guarded("model", path, lambda: AutoModelForCausalLM.from_pretrained(path, **options))
    for owner in (model.config, model.config.get_text_config()):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    own: Any = model
    own.hf_quantizer = own._weight_conversions = None  # which would undo the decoding
    plain = skeleton(model.config).state_dict().keys()
    values = {name: tensor for name, tensor in model.state_dict().items() if name in plain}
    folder.mkdir(parents=True, exist_ok=True)
    with staged_directory(target) as staging:
        guarded("decoded model", path, lambda: model.save_pretrained(staging, state_dict=values))
        copy_files(path, staging, leave_out={"config.json", "model.safetensors.index.json"})
    return target
