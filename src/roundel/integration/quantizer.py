"""Roundel's checkpoints in Transformers: after `import roundel`, `from_pretrained` builds `QuantizedLinear`s and loads tensors as they are.

Transformers finds the method `roundel` in two registries, which `register` adds to. Before weights are loaded, each linear that
`quantization_config` names is replaced by an empty `QuantizedLinear`, and what it promises is compared with the files' headers; afterwards
contents are checked. Whatever does not fit is one `ModelError`. `save_pretrained` writes the same tensors and header again.

Not done: quantizing while loading; linears that Transformers fuses (experts), ties to the embedding, or splits over several devices;
files whose tensors have other names than the model's, but for the leading name that the checkpoint of a base model leaves out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from roundel.errors import ModelError, damaged, in_layer
from roundel.formats.native import METHOD, Layout, parse_config
from roundel.integration.linear import QuantizedLinear, SharedLinear

__all__ = ["RoundelConfig", "RoundelQuantizer", "register"]

_DTYPES = {
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
"""Types that packed tensors may have, by their names in a safetensors file."""


class RoundelConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, checked, and written as it was read."""

    def __init__(self, **header: Any) -> None:
        """Of the keys and values of `quantization_config`.

        Raises:
            ModelError: see `formats.native.parse_config`.
        """
        self.quant_method = METHOD  # type: ignore[assignment]
        self.layouts = parse_config(header)
        self.header = copy.deepcopy(header)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in Transformers, whose other arguments are all unused here."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The header."""
        return copy.deepcopy(self.header)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class RoundelQuantizer(HfQuantizer):
    """Loads and saves; it does not quantize (`roundel quantize` does)."""

    requires_calibration = True
    quantization_config: RoundelConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        from roundel.models.experts import split_experts

        split_experts(model, self.quantization_config.layouts)
        for name, layout in self.quantization_config.layouts.items():
            with in_layer(name):
                linear = _linear(model, name, layout)
                places = _places(model, name, tied)
                replacement = QuantizedLinear(layout, bias=linear.bias)
            model.set_submodule(name, replacement)
            for place in places:
                tied.pop(f"{place}.weight", None)
                if place != name:
                    model.set_submodule(place, SharedLinear(replacement))
        _check_files(kwargs.get("checkpoint_files"), model, self.quantization_config.layouts)
        return model

    def update_attn_implementation(self, config: Any) -> Any:
        """Before the model is built (Transformers 5.23 and later): refuses layers without end; the configuration stays as it is."""
        from roundel.models.load import check_depth

        check_depth(config.to_dict(), lambda: len(self.quantization_config.layouts), "config.json")
        return config

    def update_weight_conversions(self, weight_conversions: Any, model: nn.Module) -> Any:
        """Of experts that are packed one by one, without what would join them."""
        from roundel.models.names import split_conversions  # which imports what this module is registered from

        return split_conversions(model, weight_conversions)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self.quantization_config.layouts:
            module = model.get_submodule(name)
            assert isinstance(module, QuantizedLinear)
            for key, (_, dtype) in module.layout.tensors().items():
                tensor = module.get_buffer(key)
                if tensor.dtype != dtype and tensor.is_floating_point():  # models may keep some modules in float32, which loses nothing
                    module.register_buffer(key, tensor.to(dtype))
            if all(tensor.device.type != "meta" for tensor in module.packed.values()):  # others are on a disk
                with in_layer(name):
                    module.check()
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Dense linears in place of packed ones."""
        for name in self.quantization_config.layouts:
            module = model.get_submodule(name)
            assert isinstance(module, QuantizedLinear)
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            linear.weight = nn.Parameter(module.dequantized().to(dtype or torch.float32), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.to(linear.weight.dtype), requires_grad=False)
            model.set_submodule(name, linear)
            for other in model.modules():
                if isinstance(other, SharedLinear) and other.linear is module:
                    other.linear = linear
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Makes Transformers know the method; again does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(RoundelConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(RoundelQuantizer)


def _check_files(paths: Sequence[str] | None, model: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Compares the headers of safetensors files with what `quantization_config` promises.

    Raises:
        ModelError: a tensor is missing, or of another shape or type; files are of another kind.
    """
    if not paths or not all(str(path).endswith(".safetensors") for path in paths):
        raise ModelError("packed weights are read from safetensors files only; pass the directory of the checkpoint")
    stored: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for path in paths:
        with damaged(ModelError, path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(name)
                stored[name] = tuple(header.get_shape()), _DTYPES.get(header.get_dtype())
    from roundel.models.names import stored_names  # which imports what this module is registered from

    names = stored_names(model, stored).same
    for module, layout in layouts.items():
        for key, expected in layout.tensors().items():
            name = f"{module}.{key}"
            found = stored.get(names.get(name, name))
            if found is None:
                raise ModelError(f"the checkpoint lacks {name}, which quantization_config promises")
            if found != expected:
                raise ModelError(f"{name} is {_words(*found)}; by quantization_config it is {_words(*expected)}")


def _places(model: nn.Module, name: str, tied: Mapping[str, str]) -> list[str]:
    """A linear and all that have the same weight, as in a block that several layers run; `tied` are weights by what they are taken from.

    Raises:
        ModelError: the embedding has it, too.
    """
    own = tied.get(f"{name}.weight", f"{name}.weight")
    found = [own, *(other for other, source in tied.items() if source == own)]
    if any(isinstance(model.get_submodule(weight.rpartition(".")[0]), nn.Embedding) for weight in found):
        raise ModelError("this linear shares its weight with the embedding, so it cannot be quantized by itself")
    return [weight.rpartition(".")[0] for weight in found]


def _linear(model: nn.Module, name: str, layout: Layout) -> nn.Linear | Conv1D:
    """The model's linear of that name and shape.

    Raises:
        ModelError: there is none.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError("the model of config.json has no such linear") from error
    if isinstance(module, Conv1D):
        shape = module.nf, module.nx
    elif isinstance(module, nn.Linear):
        shape = module.out_features, module.in_features
    else:
        raise ModelError(f"a {type(module).__name__} cannot be packed, only a linear")
    if shape != layout.shape:
        raise ModelError(f"by quantization_config the weight has shape {layout.shape}; by the rest of config.json it is {shape}")
    return module


def _words(shape: tuple[int, ...], dtype: torch.dtype | None) -> str:
    return f"{str(dtype).removeprefix('torch.') if dtype else 'of another type'} {shape}"
