"""From a local directory or a Hub id to a model and a tokenizer, without running or unpickling anything that came with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from roundel.errors import MemoryLimitError, ModelError, damaged, is_out_of_memory, of_reading, reason_of
from roundel.models.checkpoint import Checkpoint
from roundel.store import is_there

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "auto_class",
    "check_depth",
    "described",
    "guarded",
    "load_config",
    "load_model",
    "load_tokenizer",
    "locate",
    "model_type",
    "pick_device",
    "pick_dtype",
    "quantization_of",
    "quantization_settings",
    "quiet",
    "read_config",
    "skeleton",
    "without_quantization",
]

PLAIN = {"F64", "F32", "F16", "BF16", "I64", "BOOL"}
"""Types of weights as they were trained, and of buffers."""

DEEP = 1000
"""Layers that are believed without as many weights."""
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

DEMO = Path(__file__).parent.parent / "demo" / "model"

_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt", "LICENSE*", "README.md"]


def locate(model: str, files: Sequence[str] = _FILES) -> Path:
    """The directory of a model: the embedded one for `demo`, `model` itself if there is one, else the Hub's snapshot
    of that id (`files` of it, downloaded once; by default all that loading needs, safetensors only).

    Raises:
        ModelError: neither exists, or the directory has no config.json.
    """
    path = DEMO if model == "demo" else Path(model)
    if not is_there(path, Path.is_dir):
        if is_there(path) or path.is_absolute() or model.count("/") != 1 or model.startswith("."):
            raise ModelError(
                f"no model at {model!r}: expected a directory with config.json and *.safetensors, or a Hub id like Qwen/Qwen3-0.6B"
            )
        try:
            path = Path(snapshot_download(model, allow_patterns=list(files)))
        except Exception as error:  # of a dozen types in five libraries, depending on where a connection breaks off
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"no directory {model!r}, and the Hub could not deliver a model of that id: {reason}") from error
    if not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        raise ModelError(f"{path} has no config.json: expected a Hugging Face model directory")
    return path


def model_type(model: str) -> str:
    """The type of a model, or of the language model in it, by its config.json; of a Hub model nothing else is fetched.

    Raises:
        ModelError: as `locate`, or config.json does not say.
    """
    path = locate(model, ["config.json"])
    config = read_config(path)
    with damaged(ModelError, path / "config.json", "it names no model_type"):
        return str(config.get("text_config", {}).get("model_type") or config["model_type"])


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, of several processes on one machine each its own (`processes.join`), else the CPU.

    Raises:
        ModelError: torch does not know the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str, device: torch.device, warn: Callable[[str], object] | None = None) -> torch.dtype:
    """`auto` is float32 on the CPU, where it costs nothing in quality, and bfloat16 on a GPU.

    Where a processor has no products in bfloat16 (x86 without AVX512, where they take some 300 times as long) that is float32 too, with a
    warning.

    Raises:
        ModelError: not a type that models run in.
    """
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in kinds:
        raise ModelError(f"dtype {name!r}: expected auto, {' or '.join(kinds)}")
    if kinds[name] == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16():
        if warn is not None:
            warn("this processor has no products in bfloat16, torch's take hundreds of times as long: the model runs in float32")
        return torch.float32
    return kinds[name]


def multiplies_bfloat16() -> bool:
    """Whether this processor has products in bfloat16 at all; `linalg.fast` asks whether they are fast."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context Transformers shows no bars and gives no advice; what matters of it is checked here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with redirect_stderr(StringIO()):  # compressed-tensors has bars of its own and no switch for them
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def guarded(what: str, path: Path, load: Callable[[], Any]) -> Any:
    """Transformers raises a dozen types, bare `Exception` among them, for a directory that it cannot read; users get one."""
    try:
        with quiet():
            return load()
    except BaseException as error:
        if is_out_of_memory(error):
            raise MemoryLimitError(error) from error
        if not of_reading(error):
            raise
        raise ModelError(f"cannot load the {what} in {path}: {reason_of(error)}") from error


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory.

    Raises:
        ModelError: there is none that Transformers can read.
    """

    def loaded() -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer("")  # settings of other types than they should have are believed until they are used
        return tokenizer

    tokenizer: PreTrainedTokenizerBase = guarded("tokenizer", path, loaded)
    return tokenizer


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        ModelError: there is none, or it is no JSON object.
    """
    with damaged(ModelError, path / "config.json", "expected a JSON object, as in a Hugging Face model directory"):
        config = dict(json.loads((path / "config.json").read_text(encoding="utf-8")).items())
        if not isinstance(config.get("model_type", ""), str):
            raise TypeError(f"model_type is {config['model_type']}")
    return config


def quantization_settings(path: Path) -> dict[str, Any]:
    """What config.json says of a quantization, of the model or of its language model; empty where it says nothing.

    Raises:
        ModelError: config.json cannot be read.
    """
    config = read_config(path)
    with damaged(ModelError, path / "config.json", "its quantization_config is damaged"):
        settings = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config") or {}
        return dict(settings.items())


def quantization_of(path: Path) -> str | None:
    """How the weights in a directory are quantized, by the name that config.json gives it; None if they are not.

    Raises:
        ModelError: config.json or a file of weights cannot be read.
    """
    if not (settings := quantization_settings(path)):
        return None
    for file in sorted(path.glob("*.safetensors")):
        with damaged(ModelError, file), safe_open(file, framework="pt") as tensors:
            if any(tensors.get_slice(name).get_dtype() not in PLAIN for name in tensors.keys()):  # noqa: SIM118 (not a dict)
                return str(settings.get("quant_method", "in an unknown way"))
    return None


def load_config(path: Path) -> PretrainedConfig:
    """config.json, read by Transformers, without a `quantization_config` that was left behind over plain weights.

    Raises:
        ModelError: it cannot be read, the architecture is unknown, or it has layers without end, each of which takes memory.
    """
    if (path / "config.json").is_file():
        check_depth(read_config(path), lambda: len(Checkpoint.open(path).files), path / "config.json")
    config: PretrainedConfig = guarded("configuration", path, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
    if getattr(config, "quantization_config", None) is not None and quantization_of(path) is None:
        del config.quantization_config
    return config


def check_depth(config: Mapping[str, Any], weights: Callable[[], int], whose: object) -> None:
    """Before lists and modules are made of every layer that a configuration speaks of; `weights` counts those that there are.

    Raises:
        ModelError: it has layers without end.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_depth(value, weights, whose)
        if name in DEPTHS and isinstance(value, int) and value > DEEP and value > (count := weights()):
            raise ModelError(f"{whose} says {name} = {value}; there are {count} weights")


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration, of whose weights, or whose language model's, nothing is said to be packed."""
    for owner in (config, config.get_text_config()):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    return config


def auto_class(config: PretrainedConfig) -> Any:
    """Transformers' class that makes the model of a configuration: of language models, or of those that see pictures besides, and take text
    alone as well. The first also where there is neither, for its error."""
    mapped: Any = AutoModelForImageTextToText._model_mapping
    causal: Any = AutoModelForCausalLM._model_mapping
    encoded = any(getattr(each, "is_encoder_decoder", False) for each in (config, config.get_text_config()))
    return AutoModelForImageTextToText if type(config) in mapped and type(config) not in causal and not encoded else AutoModelForCausalLM


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The causal language model of a configuration, without storage.

    Raises:
        ModelError: none can be made.
    """
    with damaged(ModelError, "config.json", "no model can be made of it"), torch.device("meta"):
        model: nn.Module = auto_class(config).from_config(config, trust_remote_code=False)
    return model


def described(path: Path, *, gguf_file: str | None = None) -> nn.Module:
    """The same of a directory, if its files, or a GGUF among them, can hold so many weights.

    Raises:
        ModelError: as `skeleton`, or it has more weights than the files have bits.
    """
    model: nn.Module = guarded("model", path, lambda: skeleton(load_config(path)))
    count, there = sum(p.numel() for p in model.parameters()), sum(file.stat().st_size for file in path.glob(gguf_file or "*.safetensors"))
    if there and count > 8 * there:  # each of which would take memory before it is missed
        raise ModelError(f"{path / 'config.json'} describes a model of {count} weights; its files hold {there} bytes")
    return model


def load_model(path: Path, *, device: torch.device, dtype: torch.dtype, gguf_file: str | None = None) -> PreTrainedModel:
    """The causal language model in a directory, in evaluation mode, with the weights that its users' engines find in it.

    (`CompressedTensorsConfig(dequantize=True)` is no help: it multiplies codes and scales in the scales' 16 bits,
    also where the model is float32.)

    Args:
        path: The directory.
        device: Where to.
        dtype: In which the model runs.
        gguf_file: Name of a GGUF in the directory to load instead.

    Raises:
        ModelError: unknown architecture, not a causal language model, weights missing, unreadable or not finite.
    """
    config = load_config(path)
    if gguf_file is None and not any(path.glob("*.safetensors")):
        raise ModelError(f"{path} has no *.safetensors: pickled weights are never read; convert them with Transformers' save_pretrained")
    described(path, gguf_file=gguf_file)
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # found and named below
        "config": config,
        **({} if gguf_file is None else {"gguf_file": gguf_file}),
    }
    model, info = guarded("model", path, lambda: auto_class(config).from_pretrained(path, **options))
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{path} lacks {len(missing)} weights that its architecture needs, such as {missing[0]}")
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    packed = [name for name, *_ in info["mismatched_keys"] if compressor is not None and name.endswith(".weight_zero_point")]
    for name, stored, expected in sorted(info["mismatched_keys"]):
        if name not in packed:
            raise ModelError(f"weight {name} in {path} has shape {tuple(stored)}; by config.json it is {tuple(expected)}")
    if compressor is not None:
        _decompress(model, compressor, path, packed)
        model = model.to(dtype)
    _check_finite(model)
    return model.to(device).eval()  # type: ignore[no-any-return]


def _decompress(model: nn.Module, compressor: Any, path: Path, zero_points: Sequence[str]) -> None:
    """Weights of a compressed-tensors model by its own decompressor, exactly.

    Transformers would do it in the first forward pass, but for these: it makes parameters for zero points as they are unpacked, and refuses
    the packed ones of the checkpoint; and 4-bit floats in a float32 model end in a product of two types.
    """
    checkpoint = Checkpoint.open(path).of(model)
    for name in zero_points:
        stored = checkpoint.stored(name)
        assert stored is not None  # it was found there in another shape
        module, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(module), parameter, nn.Parameter(checkpoint.read(stored), requires_grad=False))
    guarded("packed weights", path, lambda: compressor.decompress_model(model))


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"weight {name} holds NaN or infinite values; the checkpoint is damaged")
