"""Weights on demand: a model whose decoder layers stay in its files until they are run.

Transformers finds out which stored tensors become which parameters and where it has to write converted ones (`device_map` with `disk`), and
accelerate's loader reads them. Its hooks, which would load a layer's weights in every call, are taken off again: `loaded` does it once for
a visit of the layer, however many batches pass it. An output head that is no embedding comes with its first call, and goes when a layer
comes; embedding and norms are in memory.

Not done: a GPU's copies overlapping with computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from roundel.errors import ModelError
from roundel.models.ends import head_of_its_own
from roundel.models.experts import SplitExperts
from roundel.models.load import auto_class, described, guarded, load_config
from roundel.models.plain import is_turned
from roundel.store import staged_file, storage
from roundel.sweeps.layers import decoder_layers

__all__ = ["FileWeights", "load_on_demand", "parameter_bytes"]


class FileWeights:
    """Brings the weights of layers into memory, and lets them go."""

    def __init__(
        self,
        model: nn.Module,
        where: Mapping[str, tuple[Mapping[str, Tensor], str]],
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
    ) -> None:
        self._model, self._where, self._device, self._dtype = model, where, device, dtype
        self._folder, self._changed = folder, dict[str, Path]()
        self._head: tuple[str, nn.Parameter | None] = "", None
        """The name of the head's weight, and what it is while it is in memory."""

    def bring_head(self, name: str) -> None:
        """Calls of this module bring its weight, which stays until a layer's are loaded."""
        self._head = f"{name}.weight", None
        self._model.get_submodule(name).register_forward_pre_hook(self._with_head)

    def _with_head(self, head: nn.Module, _args: object) -> None:
        if head.weight.is_meta:
            name, _ = self._head
            self._put(name, self._ready(name))
            self._head = name, head.weight  # type: ignore[assignment]

    def _without_head(self) -> None:
        name, weight = self._head
        if weight is not None and self._model.get_parameter(name) is weight:
            self._put(name, weight.to("meta"))
            self._head = name, None

    def _ready(self, name: str, value: Tensor | None = None) -> Tensor:
        """A parameter on its device: a value, or what its file has.

        Raises:
            ModelError: it is not finite.
        """
        if value is None:
            source, key = self._where[name]
            value = source[key]
        if value.is_floating_point():
            value = value.to(self._dtype)
            if not torch.isfinite(value).all():
                raise ModelError(f"weight {name} holds NaN or infinite values; the checkpoint is damaged")
        return value.to(self._device)

    @contextmanager
    def loaded(self, modules: Sequence[str]) -> Iterator[None]:
        """Within the context the weights below these modules are in memory.

        Raises:
            ModelError: a weight is not finite.
        """
        prefixes = tuple(f"{module}." for module in modules)
        mine = [name for name in self._where if name.startswith(prefixes)]
        changed = load_file(self._changed[modules[0]]) if modules[0] in self._changed else {}
        shapes: dict[str, torch.Size] = {}
        self._without_head()
        for name in mine:
            value = self._ready(name, changed.get(name))
            shapes[name] = value.shape
            self._put(name, value)
        for name in changed.keys() - self._where.keys():  # an expert's
            self._model.get_parameter(name).data.copy_(changed[name])
        try:
            yield
        finally:
            for name in mine:
                self._put(name, torch.empty(shapes[name], dtype=self._dtype, device="meta"))

    def _put(self, name: str, value: Tensor) -> None:
        """Gives a parameter these values, as they are stored, on their device."""
        owner, _, own = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if isinstance(module, SplitExperts):
            module.put(own, value)
        elif own == "weight" and is_turned(module):
            module.weight = nn.Parameter(value.T, requires_grad=False)
        else:
            set_module_tensor_to_device(self._model, name, value.device, value=value)
            module.requires_grad_(False)

    def keep(self, group: str, parameters: Sequence[str]) -> None:
        """The values that parameters of a loaded group have now are loaded from now on; those of its others are the files' again.

        Raises:
            StorageError: the disk refuses.
        """
        if not parameters:
            self._changed.pop(group, None)
            return
        path = self._folder / f"changed-{group}.safetensors"
        with storage(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as temporary:
            save_file({name: self._model.get_parameter(name).detach().cpu().contiguous() for name in parameters}, temporary)
        self._changed[group] = path


def parameter_bytes(path: Path, dtype: torch.dtype) -> int:
    """What the model's parameters take in a type."""
    return sum(p.numel() for p in described(path).parameters()) * dtype.itemsize


def load_on_demand(path: Path, *, device: torch.device, dtype: torch.dtype, folder: Path) -> tuple[PreTrainedModel, FileWeights]:
    """The causal language model in a directory without its decoder layers, and what brings those.

    Args:
        path: The directory.
        device: Where weights go.
        dtype: In which the model runs.
        folder: For tensors that have to be converted.

    Raises:
        ModelError: as `load_model`.
    """
    empty = described(path)
    head = head_of_its_own(empty)
    places = _places(empty, "", frozenset([*decoder_layers(empty), *head]), str(device))
    options: dict[str, Any] = {
        "config": load_config(path),
        "dtype": dtype,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
        "device_map": places,
        "offload_folder": str(folder),
        "offload_buffers": False,
    }
    model, info = guarded("model", path, lambda: auto_class(options["config"]).from_pretrained(path, **options))
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{path} lacks {len(missing)} weights that its architecture needs, such as {missing[0]}")
    where: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    for name, module in model.named_modules():
        for hook in _hooks(module):
            source = getattr(hook, "weights_map", None)
            if source is not None and getattr(hook, "offload", False):
                for key, parameter in module.named_parameters(recurse=False):
                    if parameter.device.type == "meta":
                        where[f"{name}.{key}"] = (source, key)
    remove_hook_from_submodules(model)
    left = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta" and name not in where]
    if left:
        raise ModelError(f"{path}: {left[0]} cannot be loaded on demand; give more --memory")
    model.requires_grad_(False)
    weights = FileWeights(model, where, device, dtype, folder)
    for name in head:
        weights.bring_head(name)
    return model.eval(), weights


def _places(module: nn.Module, name: str, layers: frozenset[str], device: str) -> dict[str, str]:
    """These modules on the disk, and everything beside them on the device."""
    if name in layers:
        return {name: "disk"}
    if not any(layer.startswith(f"{name}." if name else "") for layer in layers):
        return {name: device}
    prefix = f"{name}." if name else ""
    own = {f"{prefix}{key}": device for key, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
    return own | {
        key: place for child, inner in module.named_children() for key, place in _places(inner, f"{prefix}{child}", layers, device).items()
    }


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
