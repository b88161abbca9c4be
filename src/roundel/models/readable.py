"""Whether Transformers will load a packed checkpoint of an architecture, found out without its weights.

Transformers replaces a model's linears by packed ones before it reads the weights, and initialises all modules after. Some architectures
initialise their linears in code of their own, which looks for the weight that is no longer there: the directory cannot be loaded, after all
the work. The same steps on a model without storage tell beforehand, in the time that it takes to build the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers.quantizers.auto import AutoHfQuantizer

from roundel.models.load import load_config, quiet, skeleton

__all__ = ["loading_fault"]


def loading_fault(path: Path, quantization: Mapping[str, Any]) -> str | None:
    """Why Transformers will not load the model in a directory once its config.json has this `quantization_config`; None if it will."""
    import_module("compressed_tensors.compressors")  # makes tables when it is imported, which must not be on the meta device
    config = load_config(path)
    try:
        with quiet(), torch.device("meta"):
            model: Any = skeleton(config)
            quantizer = AutoHfQuantizer.from_config(dict(quantization))
            quantizer.validate_environment(device_map=None)
            quantizer.preprocess_model(model=model, dtype=torch.float32, device_map=None, checkpoint_files=None, use_kernels=False)
            for module in model.modules():
                module._is_hf_initialized = False
            for parameter in model.parameters():
                parameter._is_hf_initialized = not parameter.is_floating_point()  # integers are in the files, or there is nothing to load
            model.initialize_weights()
            model.tie_weights()
    except Exception as error:  # whatever it is, it would be the user's
        return f"{type(error).__name__}: {shorten(str(error).strip() or 'no reason given', 160, placeholder=' ...')}"
    return None
