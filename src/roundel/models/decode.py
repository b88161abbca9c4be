"""Originals that are quantized themselves: decoded once to 16 bits, and then sources like all others.

Many models are published in FP8, MXFP4 or four bits alone. What they decode to is written as a plain checkpoint beside the work, and
everything else starts from there. Whether a checkpoint is quantized is told by the types in the headers of its files, not by config.json,
where a `quantization_config` may have been left over plain weights.

Cost: the model in 16 bits on the disk until the job is done. In memory one file of it (`store.SHARD_BYTES`), but for compressed-tensors,
which Transformers decodes, with the whole model in memory. Not done: bitsandbytes, GGUF, MLX, experts in one tensor in FP8.
"""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from roundel.errors import ModelError, damaged
from roundel.models.checkpoint import Checkpoint
from roundel.models.load import PLAIN, guarded, load_model, quantization_settings, read_config, skeleton, without_quantization
from roundel.models.packed import METHODS, Layout, Packed, find, layout_of
from roundel.store import copy_files, staged_directory, write_config, write_shards

__all__ = ["decoded"]

OWN_FILES = {"config.json", "model.safetensors.index.json"}


def decoded(path: Path, method: str, folder: Path) -> Path:
    """A directory with the same model in 16 bits, made in `folder` if it is not there yet.

    Raises:
        ModelError: nothing here decodes it, or a weight is damaged.
        StorageError: the disk refuses.
    """
    settings = quantization_settings(path)
    with damaged(ModelError, path / "config.json", "its quantization_config is damaged"):
        layout = layout_of(method, settings)
    if layout is None and method != "compressed-tensors":
        known = ", ".join([*METHODS, "compressed-tensors"])
        raise ModelError(
            f"{path} is quantized already ({_variety(method, settings)}), which cannot be decoded here ({known} can); "
            "start from the original model"
        )
    known_by = [str(path.absolute()), *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in sorted(path.iterdir()))]
    target = folder / f"decoded-{hashlib.sha256(chr(10).join(known_by).encode()).hexdigest()[:16]}"
    if (target / "config.json").is_file():
        return target
    with damaged(ModelError, path):
        outline = None if layout is None else _outline(path, method, layout, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with staged_directory(target) as staging:
        if outline is None:
            _by_transformers(path, staging)
        else:
            _weight_by_weight(path, staging, *outline, settings)
        copy_files(path, staging, leave_out=OWN_FILES)
    return target


def _variety(method: str, settings: dict[str, Any]) -> str:
    told = [str(settings[key]) for key in ("checkpoint_format", "version", "packing_format") if method in METHODS and key in settings]
    return ", ".join([method, *told])


def _outline(path: Path, method: str, layout: Layout, settings: dict[str, Any]) -> tuple[Checkpoint, dict[str, Packed], dict[str, int]]:
    """The checkpoint, its packed weights, and the bytes of all tensors that it has decoded, from the headers of its files.

    Raises:
        ModelError: a tensor of few bits is no part of a packed weight.
    """
    checkpoint = Checkpoint.open(path)
    kinds, shapes = {}, {}
    for file in sorted(set(checkpoint.files.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_slice(name)
                kinds[name], shapes[name] = part.get_dtype(), part.get_shape()
    packed, others = find(layout, kinds)
    unknown = [name for name in others if kinds[name] not in PLAIN]
    if unknown:
        raise ModelError(
            f"{path} is quantized already ({_variety(method, settings)}), and nothing here decodes {unknown[0]} ({kinds[unknown[0]]}, "
            "without scales beside it): the checkpoint is damaged, or of another layout; start from the original model"
        )
    sizes = {name: 2 * _weights(each.parts[layout.mark], kinds, shapes, settings) for name, each in packed.items()}
    return checkpoint, packed, dict(sorted({**sizes, **{name: checkpoint.sizes[name] for name in others}}.items()))


def _weight_by_weight(
    path: Path, staging: Path, checkpoint: Checkpoint, packed: dict[str, Packed], sizes: dict[str, int], settings: dict[str, Any]
) -> None:
    def produce(name: str) -> dict[str, torch.Tensor]:
        return {name: packed[name].decoded(checkpoint.read, settings) if name in packed else checkpoint.read(name)}

    write_shards(staging, sizes, produce)
    config = read_config(path)
    for owner in (config, config.get("text_config", {})):
        owner.pop("quantization_config", None)
    write_config(staging / "config.json", config)


def _weights(name: str, kinds: dict[str, str], shapes: dict[str, list[int]], settings: dict[str, Any]) -> int:
    """How many weights a packed tensor has."""
    in_one = {"U8": 2, "I32": 32 // int(settings.get("bits", 4))}
    return prod(shapes[name]) * in_one.get(kinds[name], 1)


def _by_transformers(path: Path, staging: Path) -> None:
    model = load_model(path, device=torch.device("cpu"), dtype=torch.bfloat16)
    without_quantization(model.config)
    own: Any = model
    own.hf_quantizer = own._weight_conversions = None  # which would undo the decoding
    plain = skeleton(model.config).state_dict().keys()
    values = {name: tensor for name, tensor in model.state_dict().items() if name in plain}
    guarded("decoded model", path, lambda: model.save_pretrained(staging, state_dict=values))
