"""Writing rounded weights as a checkpoint of any format, and reading them back: one rounding, many formats.

A `Frame` is a checkpoint without the weights of its quantized linears: everything else, tensor by tensor, with the config and the tokenizer
beside it. `quantize` makes one of the original model, `read` one of a directory that Roundel has written, so that `export` is `read`, then
`write`. Codes and scales are carried over as they are: nothing is rounded a second time.

    format                       directory
    compressed-tensors, gptq,    Hugging Face's: config.json with a quantization_config (mlx: quantization), safetensors, tokenizer
    awq, auto-round, mlx,
    exl3, native
    dense                        the same with rounded values in the original's type: any engine, no smaller
    gguf                         model.gguf, all that llama.cpp needs; config.json beside it, for Transformers

Tensors are made one shard at a time. `read` takes formats that keep codes (all but dense and gguf), and `roundel.json` for the schemes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from roundel.errors import ModelError, SchemeError, damaged, in_layer
from roundel.formats import FORMATS, gguf
from roundel.grids import parse_scheme
from roundel.models import Checkpoint, load_model
from roundel.models.decode import decoded
from roundel.models.experts import join_experts, split_experts, split_modules
from roundel.models.linears import matrix_modules
from roundel.models.load import load_config, quantization_of, read_config, skeleton, without_quantization
from roundel.models.packed import METHODS
from roundel.rounding.round import dequantized
from roundel.store import copy_files, is_there, json_of, storage, write_config, write_json, write_shards
from roundel.types import RoundedWeight

__all__ = [
    "CACHE_SCALES",
    "GGUF_FILE",
    "Frame",
    "Stored",
    "check_apart",
    "described",
    "gguf_of",
    "load_written",
    "owners",
    "read",
    "read_report",
    "weight_bytes",
    "write",
]

GGUF_FILE = "model.gguf"

CACHE_SCALES = (".k_scale", ".v_scale")
"""Ends of the names of scales of keys and values, below an attention's."""

_GGUF_TYPES = {"llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma2", "gemma3_text"}
"""Types of models whose GGUF Transformers reads."""

_OWN_FILES = {"config.json", "model.safetensors.index.json", "roundel.json", "quantization_config.json"}
"""Files of a directory that describe its weights, and are not carried over to another."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A checkpoint without the weights of its quantized linears."""

    directory: Path
    """With the tokenizer, generation settings and licence."""
    config: Mapping[str, Any]
    """config.json, without a quantization_config."""
    sizes: Mapping[str, int]
    """Bytes of each tensor, in order; a quantized linear's weight is among them under its stored name."""
    reader: Callable[[str], Tensor]
    """One of these tensors; not asked for quantized weights."""
    weights: Mapping[str, str]
    """The stored name of each quantized linear's weight, by module."""
    dtypes: Mapping[str, torch.dtype]
    """The original type of each quantized linear's weight, by module."""
    turned: frozenset[str]
    """Quantized linears whose weights are stored transposed, as dense ones."""
    linears: frozenset[str]
    """Names of all modules that an engine may run as a linear (`models.linears.matrix_modules`)."""
    cache: frozenset[str] = frozenset()
    """Those of the tensors that are scales of keys and values."""

    def held_by(self, form: str) -> Frame:
        """Without scales of keys and values, where a format has no place for them."""
        if form in FORMATS and FORMATS[form].cache_scheme is not None:
            return self
        return replace(self, sizes={tensor: size for tensor, size in self.sizes.items() if tensor not in self.cache}, cache=frozenset())


def write(
    staging: Path,
    frame: Frame,
    rounded: Mapping[str, RoundedWeight],
    form: str,
    *,
    name: str,
    advance: Callable[[int], None] = lambda _n: None,
) -> int:
    """Fills a directory; returns the bytes of all tensors.

    Args:
        staging: The directory, empty.
        frame: All that is not rounded.
        rounded: By module.
        form: The format's name.
        name: The model's, for metadata.
        advance: Called with 1 after each tensor of the frame.

    Raises:
        SchemeError, ModelError: the format cannot hold it.
        StorageError: the disk refuses.
    """
    if form == "gguf":
        path = staging / GGUF_FILE
        with storage(path):
            gguf.write(
                path,
                model=frame.directory,
                tensors=frame.sizes,
                read=frame.reader,
                rounded=rounded,
                name=name,
                config=frame.config,
                advance=advance,
            )
        write_config(staging / "config.json", frame.config)
        return path.stat().st_size
    modules = {stored: module for module, stored in frame.weights.items()}
    packer = FORMATS.get(form)
    d_outs = {_bias(stored): rounded[module].shape[0] for module, stored in frame.weights.items()} if packer else {}
    added = {bias: more for bias, d_out in d_outs.items() if packer and (more := packer.outputs(d_out) - d_out)}
    packed: dict[str, dict[str, Tensor]] = {}

    def produce(tensor: str) -> dict[str, Tensor]:
        module = modules.get(tensor)
        if module is None:
            value = frame.reader(tensor)
            return {tensor: pad(value, (0, added[tensor])) if tensor in added else value}
        with in_layer(module):
            if packer is None:
                W = dequantized(rounded[module]).to(frame.dtypes[module])
                return {tensor: (W.T if module in frame.turned else W).contiguous()}
            parts = packer.pack(rounded[module])
        packed[module] = {part: value.to("meta") for part, value in parts.items()}
        prefix = tensor.removesuffix("weight")
        return {prefix + part: value for part, value in parts.items()}

    def size(tensor: str) -> int:
        module = modules.get(tensor)
        if module is None or packer is None:
            return frame.sizes[tensor]
        weight = rounded[module]
        scales = [scale.dtype for scale in weight.scales.values() if scale.dtype in (torch.float16, torch.bfloat16)]
        kind = getattr(weight.rotation, "kind", None)
        return packer.packed_bytes(weight.shape, parse_scheme(weight.scheme), (*scales, torch.float32)[0], kind)

    copy_files(frame.directory, staging, leave_out=_OWN_FILES)
    total = write_shards(staging, {tensor: size(tensor) for tensor in frame.sizes}, produce, advance=advance)
    config = dict(frame.config)
    if packer is not None:
        config[packer.section] = packer.config(rounded, sorted(frame.linears - rounded.keys()))
        if packer.cache_scheme is not None and frame.cache:
            config[packer.section]["kv_cache_scheme"] = dict(packer.cache_scheme)
        for file, content in packer.files(rounded, packed).items():
            write_json(staging / file, content)
    write_config(staging / "config.json", config)
    return total


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A directory that Roundel has written, read back."""

    frame: Frame
    rounded: dict[str, RoundedWeight]
    form: str
    report: dict[str, Any] = field(default_factory=dict)
    """Its roundel.json."""


def read(path: Path, report: Mapping[str, Any] | None = None) -> Stored:
    """Codes and scales of all quantized linears of a directory, and its frame.

    Args:
        path: The directory.
        report: Its roundel.json, or as much of it as there is yet: `format` and `layers`.

    Raises:
        ModelError: it is not one that Roundel wrote, its format does not keep codes, or it is damaged.
    """
    report = read_report(path) if report is None else report
    form = str(report.get("format"))
    if form not in FORMATS:
        kept = ", ".join(FORMATS)
        raise ModelError(
            f"{path} is in the format {form}, which does not keep the codes: export from one of {kept} (quantize --format native)"
        )
    with damaged(ModelError, path, "it is damaged, or not what roundel.json says"):
        return _read(path, dict(report), form)


def _read(path: Path, report: dict[str, Any], form: str) -> Stored:
    config = read_config(path)
    section = FORMATS[form].section
    if section not in config:
        raise ModelError(f"{path}/config.json has no {section}, though roundel.json says {form}: the directory is damaged")
    cached = bool(dict(config[section]).get("kv_cache_scheme"))
    config = {key: value for key, value in config.items() if key != section}
    checkpoint = Checkpoint.open(path)
    packer = FORMATS[form]
    rounded: dict[str, RoundedWeight] = {}
    weights: dict[str, str] = {}
    dtypes: dict[str, torch.dtype] = {}
    sizes: dict[str, int] = {}
    d_outs: dict[str, int] = {}
    try:
        layers = {name: (row["scheme"], tuple(map(int, row["shape"])), str(row["dtype"])) for name, row in report["layers"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{path}/roundel.json does not say how each linear was rounded: {error!r}; it is damaged or of an older version"
        ) from error
    owned = owners(checkpoint, report["layers"])
    tensors_of: dict[str, list[str]] = {}
    for tensor, module in owned.items():
        tensors_of.setdefault(module, []).append(tensor)
    for tensor in checkpoint:
        if tensor not in owned:
            sizes[tensor] = checkpoint.sizes[tensor]
        elif (module := owned[tensor]) not in weights:
            own = tensors_of[module]
            prefix = f"{own[0].rpartition('.')[0]}."
            scheme, shape, dtype = layers[module]
            with in_layer(module):
                parts = {other.removeprefix(prefix): checkpoint.read(other) for other in own}
                rounded[module] = packer.unpack(parts, parse_scheme(scheme), (shape[0], shape[1]))
            weights[module], dtypes[module] = f"{prefix}weight", getattr(torch, dtype)
            sizes[f"{prefix}weight"] = math.prod(shape) * dtypes[module].itemsize
            d_outs[_bias(f"{prefix}weight")] = shape[0]
    missing = sorted(set(layers) - set(rounded))
    if missing:
        raise ModelError(f"{path} lacks the tensors of {len(missing)} quantized linears, such as {missing[0]}")
    frame = Frame(
        directory=path,
        config=config,
        sizes=sizes,
        reader=lambda tensor: checkpoint.read(tensor)[: d_outs[tensor]] if tensor in d_outs else checkpoint.read(tensor),
        weights=weights,
        dtypes=dtypes,
        turned=frozenset(name for name, row in report["layers"].items() if row.get("turned")),
        linears=matrix_modules(_skeleton(path)),
        cache=frozenset(tensor for tensor in sizes if cached and tensor.endswith(CACHE_SCALES)),
    )
    return Stored(frame=frame, rounded=rounded, form=form, report=report)


def _bias(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def read_report(path: Path) -> dict[str, Any]:
    """roundel.json of a directory that `quantize` has written.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    if not is_there(path / "roundel.json", Path.is_file):
        raise ModelError(f"{path} has no roundel.json: expected a directory that roundel quantize has written")
    with damaged(ModelError, path / "roundel.json"):
        report = json_of((path / "roundel.json").read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not isinstance(report.get("layers"), dict):
        raise ModelError(f"{path}/roundel.json is damaged: it names no layers")
    return report


def check_apart(form: str) -> None:
    """Refuses a format whose readers want an expert's weight in one tensor with those of all others.

    Raises:
        SchemeError: with what would work.
    """
    if form == "dense":
        raise SchemeError("dense: this model stores all experts of a layer in one tensor, which is not put together again; try native")


def owners(checkpoint: Checkpoint, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The quantized linear that each of its tensors, biases aside, belongs to; `layers` are rows of the report.

    Older reports do not have the tensors' names: then they are the module's own, or lack the leading name of a base model.
    """
    stored: dict[str, str] = {}
    for module, row in layers.items():
        tensors = [str(row["tensor"])] if "tensor" in row else [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
        stored |= {tensor.rpartition(".")[0]: module for tensor in tensors}
    found = {tensor: stored.get(tensor.rpartition(".")[0]) for tensor in checkpoint}
    return {tensor: module for tensor, module in found.items() if module is not None and not tensor.endswith(".bias")}


def _skeleton(path: Path) -> nn.Module:
    """The original's architecture, without its weights."""
    return skeleton(without_quantization(load_config(path)))


def load_written(
    path: Path, *, device: torch.device, dtype: torch.dtype, report: Mapping[str, Any] | None = None, original: Path | None = None
) -> PreTrainedModel:
    """The model in a directory as its users' engine would have it: by Transformers where that reads the format, else decoded by ourselves.

    Transformers reads compressed-tensors, dense and, as `import roundel` has taught it, native directories, and the GGUF of most types of
    models. The bytes of all others, for which it has no reader or needs other projects' packages, are decoded here: ours by `report`, as
    `read` does, FP8, MXFP4, GPTQ, AWQ and AutoRound of others as originals are (`models.decode`, to 16 bits), and GGUF files of others,
    alone or in a directory without a config.json, by the config.json of the `original` that they were made of.

    Raises:
        ModelError: as `load_model` and `read`.
    """
    if (file := gguf_of(path)) is not None:
        if original is None:
            raise ModelError(f"{file} has no config.json beside it: name the original that it was made of")
        return _decoded_gguf(file, original, device, dtype)
    config = read_config(path)
    if (path / GGUF_FILE).is_file():
        if config.get("model_type") in _GGUF_TYPES:
            return load_model(path, device=device, dtype=dtype, gguf_file=GGUF_FILE)  # by config.json: its own metadata miss some settings
        return _decoded_gguf(path / GGUF_FILE, path, device, dtype)
    if report is None and not (path / "roundel.json").is_file() and (method := quantization_of(path)) in METHODS:
        with tempfile.TemporaryDirectory(prefix="roundel-") as scratch:
            return load_model(decoded(path, str(method), Path(scratch)), device=device, dtype=dtype)
    if all(form.loads or not form.wrote(config) for form in FORMATS.values()):
        return load_model(path, device=device, dtype=dtype)
    stored = read(path, report)
    exact = replace(stored.frame, dtypes=dict.fromkeys(stored.rounded, torch.float32))
    with tempfile.TemporaryDirectory(prefix="roundel-") as scratch:
        write(Path(scratch), exact, stored.rounded, "dense", name="")
        return load_model(Path(scratch), device=device, dtype=dtype)


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path is, or a directory has, where there is no config.json beside it.

    Raises:
        ModelError: there are several in the directory.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    found = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ModelError(f"{path} has {len(found)} GGUF files: name one of them, such as {found[0]}")
    return found[0] if found else None


def described(path: Path) -> dict[str, str | None]:
    """The `format` of a checkpoint, and its `scheme` where it is one of ours, by its report or its config.json."""
    if gguf_of(path) is not None:
        return {"format": "gguf", "scheme": None}
    if (path / "roundel.json").is_file():
        report = read_report(path)
        return {"format": str(report.get("format")), "scheme": str(report.get("scheme"))}
    return {"format": quantization_of(path) or "dense", "scheme": None}


def weight_bytes(path: Path) -> int:
    """Of all files of weights of a checkpoint."""
    files = [path] if path.is_file() else [file for pattern in ("*.safetensors", "*.gguf") for file in path.glob(pattern)]
    return sum(file.stat().st_size for file in files)


def _decoded_gguf(file: Path, original: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A GGUF file, decoded here, as the architecture of `original`; what a text never goes through is zero."""
    config, model = read_config(original), _skeleton(original)
    split_experts(model)
    unused = {name: value for name, value in model.state_dict().items() if gguf.LEFT_OUT.search(name)}
    tensors = gguf.read(file, config=config, tensors=model.state_dict())
    if experts := split_modules(model):
        model.load_state_dict(tensors, strict=False, assign=True)
        for module in experts.values():
            join_experts(module)
        tensors = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    tensors |= {name: torch.zeros(value.shape, dtype=torch.float16) for name, value in unused.items()}
    with tempfile.TemporaryDirectory(prefix="roundel-") as scratch:
        write_shards(Path(scratch), {name: tensor.nbytes for name, tensor in tensors.items()}, lambda name: {name: tensors[name]})
        write_config(Path(scratch) / "config.json", config)
        return load_model(Path(scratch), device=device, dtype=dtype)
