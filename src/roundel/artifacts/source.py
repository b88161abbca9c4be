"""The original model as the stages see it, and copies of it with other weights."""

from __future__ import annotations

import atexit
import copy
import math
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping

from roundel import processes
from roundel.allocator import keep_no_large_blocks
from roundel.artifacts.memory import stays_on_disk
from roundel.artifacts.work import Work
from roundel.errors import ModelError
from roundel.evaluate import compare_models
from roundel.formats import FORMATS, gguf
from roundel.models import Checkpoint, Selection, load_model, load_tokenizer, locate, select_linears
from roundel.models.coverage import Coverage, coverage_of
from roundel.models.decode import decoded
from roundel.models.experts import join_experts, split_experts, split_modules
from roundel.models.fuse import fuse_rotation
from roundel.models.load import load_config, pick_device, pick_dtype, quantization_of, read_config, skeleton, without_quantization
from roundel.models.offload import FileWeights, load_on_demand, parameter_bytes
from roundel.models.plain import as_linears
from roundel.recipes import Recipe
from roundel.rounding.round import dequantized
from roundel.sweeps import Layers
from roundel.types import RoundedWeight, TokenBatch

__all__ = ["Source", "device_of", "load_dense", "load_source", "measured_kl", "outlined", "outlined_source", "positions"]

TERMS = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded original, and which of its linears are looked at."""

    name: str
    path: Path
    """Of the weights in 16 bits or more."""
    origin: Path
    """Of the directory that was asked for."""
    quantized: str | None
    """How its weights are quantized themselves; then `path` has them decoded."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    config: dict[str, Any]
    """config.json."""
    parameters: int
    """Of the original."""
    fusion: dict[str, Any] | None
    """What a fused rotation has changed in the model, for the report."""
    linears: dict[str, nn.Linear]
    skipped: dict[str, str]
    length: int
    """Tokens in a sequence: as asked for, at most the model's positions."""
    weights: FileWeights | None = None
    """Brings the decoder layers, where they are not in memory."""
    given: Mapping[str, RoundedWeight] = field(default_factory=dict)
    """What linears are quantized to already, where that is to be made better."""
    given_schemes: Mapping[str, str] = field(default_factory=dict)
    """Their schemes."""
    fixed: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    """What makes other parameters of decoder layers as that quantized model has them, by name."""

    def fixed_in(self, index: int) -> dict[str, Tensor]:
        """Those of a group of layers."""
        return {name: self.fixed[name]() for name in self.layers.inside(index, self.fixed)}

    @cached_property
    def layers(self) -> Layers:
        """The model, layer by layer."""
        return Layers(self.model, self.weights)

    def coverage(self, quantized: Collection[str] | None = None) -> Coverage:
        """The share of the decoder's weights in all linears that are looked at, or in these."""
        return coverage_of(self.model, self.layers.names, self.linears.keys() if quantized is None else quantized, self.skipped)

    def whole(self, what: str) -> PreTrainedModel:
        """The model, for what needs all of it at once.

        Raises:
            ModelError: it is not in memory.
        """
        if self.weights is not None:
            raise ModelError(f"{what} needs the whole model in memory, which is larger than the budget: give more (--memory)")
        return self.model

    @property
    def revision(self) -> str | None:
        """The Hub's commit, when the directory is one of its snapshots."""
        return self.origin.name if self.origin.parent.name == "snapshots" else None

    @property
    def repository(self) -> str | None:
        """Its id on the Hub, when the directory is a snapshot of that (`models--USER--NAME/snapshots/COMMIT`)."""
        kind, *parts = self.origin.parent.parent.name.split("--")
        return "/".join(parts) if self.revision and kind == "models" else None

    @property
    def terms(self) -> dict[str, Any]:
        """What the original's card says about its licence and languages, for the card of what is made of it."""
        try:
            card = metadata_load(self.origin / "README.md") or {}
        except Exception:  # no card, or one that cannot be read: the YAML reader has errors of its own
            return {}
        return {key: card[key] for key in TERMS if card.get(key)}


def load_source(
    name: str, recipe: Recipe, device: str, dtype: str, *, work: Work | None = None, warn: Callable[[str], object] | None = None
) -> Source:
    """The original model and the linears that the recipe chooses of it: those that all its schemes can store.

    Where its weights take more than half of `work`'s memory its decoder layers stay on the disk until they are run. `warn` is told where
    the model runs in another type than it should.
    """
    place = pick_device(device)
    kind = pick_dtype(dtype, place, warn)
    folder = processes.named("converted")
    with processes.in_turn():  # the first may have to fetch or to decode it
        return _loaded(name, recipe, place, kind, folder, work)


def _loaded(name: str, recipe: Recipe, place: torch.device, dtype: torch.dtype, folder: str, work: Work | None) -> Source:
    origin = locate(name)
    path = origin
    if (method := quantization_of(path)) is not None:
        path = decoded(path, method, work.path if work is not None else Path(scratch()))
    checkpoint, form = Checkpoint.open(path), recipe.written_format()
    config = read_config(path)
    config.pop("quantization_config", None)  # left behind over plain weights
    if form == "gguf":
        gguf.check_model(path, config, checkpoint)
    kind = torch.float32 if recipe.rotate == "fused" else dtype
    weights: FileWeights | None = None
    if work is not None and recipe.rotate != "fused" and stays_on_disk(parameter_bytes(path, kind), work.memory):
        keep_no_large_blocks()
        model, weights = load_on_demand(path, device=place, dtype=kind, folder=work.path / folder)
    else:
        model = load_model(path, device=place, dtype=kind)
    parameters, fusion = sum(p.numel() for p in model.parameters()), None
    if recipe.rotate == "fused":
        fused = fuse_rotation(model, seed=recipe.seed)
        checkpoint, config, fusion = fused.checkpoint(checkpoint.of(model)), fused.config(config), fused.as_json()
        nn.Module.to(model, dtype)
    return replace(
        outlined(model, checkpoint, recipe, path, name=name, config=config, quantized=method),
        origin=origin,
        tokenizer=load_tokenizer(path),
        parameters=parameters,
        fusion=fusion,
        weights=weights,
    )


def _selected(model: PreTrainedModel, checkpoint: Checkpoint, recipe: Recipe) -> tuple[Checkpoint, dict[str, nn.Linear], dict[str, str]]:
    """The linears that the recipe chooses, and why others stay; every expert's become linears first."""
    as_linears(model)
    split_experts(model)
    checkpoint = checkpoint.of(model)
    first, *others = (
        select_linears(model, partial(recipe.check_shape, scheme), include=recipe.include, exclude=recipe.exclude)
        for scheme in recipe.used_schemes
    )
    selection = first
    for other in others:  # a linear may get any of them
        selection = Selection(
            linears={module: linear for module, linear in selection.linears.items() if module in other.linears},
            skipped={**selection.skipped, **other.skipped},
        )
    found = {
        module: linear for module, linear in selection.linears.items() if (checkpoint.weight_of(module) or "").endswith(".weight")
    }  # packed tensors have names beside that one
    for owner in split_modules(model):  # experts that are stored as others' are, or not at all
        own = [name for name in selection.linears if name.startswith(f"{owner}.")]
        if not all(name in found for name in own):
            found = {name: linear for name, linear in found.items() if name not in own}
    skipped = {**selection.skipped, **dict.fromkeys(set(selection.linears) - set(found), "its weight is stored in another form")}
    form = recipe.written_format()
    if form == "gguf":
        gguf.check_linears(dict.fromkeys(found, " or ".join(recipe.used_schemes)), skipped)
    if _join_idle(model, found, skipped, keeps=form == "compressed-tensors"):
        checkpoint = checkpoint.of(model)
    if form in FORMATS:
        FORMATS[form].check_names(found)
    return checkpoint, found, skipped


def outlined_source(name: str, recipe: Recipe) -> Source:
    """The same without any weight: the model has no storage, and of the directory only config.json is needed.

    Where weights lie beside it their headers say how they are stored; else it is as this version of Transformers names them.
    """
    path = locate(name, ["config.json"])
    method = quantization_of(path)
    config = read_config(path)
    config.pop("quantization_config", None)
    settings = without_quantization(load_config(path))
    model: Any = skeleton(settings)
    checkpoint = Checkpoint.open(path)
    if method is not None or not checkpoint.files:
        item = getattr(settings.get_text_config(), "dtype", None)
        item = item.itemsize if isinstance(item, torch.dtype) else 2
        if any("*." in pattern for entry in get_model_conversion_mapping(model) for pattern in entry.source_patterns):
            split_experts(model)  # which files of such models have one by one
        stored = {own: values.numel() * item for own, values in model.state_dict().items()}
        checkpoint = Checkpoint(files=dict.fromkeys(stored, path / "config.json"), sizes=stored)
    return outlined(model, checkpoint, recipe, path, name=name, config=config, quantized=method)


def outlined(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    recipe: Recipe,
    path: Path,
    *,
    name: str = "",
    config: dict[str, Any] | None = None,
    quantized: str | None = None,
) -> Source:
    """A model with what a recipe chooses of it, and no tokenizer: for what reads no text."""
    parameters = sum(p.numel() for p in model.parameters())
    checkpoint, found, skipped = _selected(model, checkpoint, recipe)
    return Source(
        name=name,
        path=path,
        origin=path,
        quantized=quantized,
        model=model,
        tokenizer=None,  # type: ignore[arg-type]
        checkpoint=checkpoint,
        config=config or {},
        parameters=parameters,
        fusion=None,
        linears=found,
        skipped=skipped,
        length=min(recipe.seq_len, positions(model.config)),
    )


@cache
def scratch() -> str:
    """A directory for as long as the process runs, where no work is kept."""
    directory = tempfile.TemporaryDirectory(prefix="roundel-")
    atexit.register(directory.cleanup)
    return directory.name


def _join_idle(model: nn.Module, linears: Collection[str], skipped: dict[str, str], *, keeps: bool) -> bool:
    """Puts experts together again of whom none is looked at, and their reasons too; whether there are any.

    With `keeps` not those that Transformers reads one by one.
    """
    idle = {
        name: module
        for name, module in split_modules(model).items()
        if not (keeps and module.sequential) and not any(own.startswith(f"{name}.") for own in linears)
    }
    for name, module in idle.items():
        join_experts(module)
        own = [linear for linear in skipped if linear.startswith(f"{name}.")]
        skipped[name] = skipped[own[0]]
        for linear in own:
            del skipped[linear]
    return bool(idle)


def positions(config: PretrainedConfig) -> int:
    """How many tokens a model can take.

    Raises:
        ModelError: less than the two that a loss needs.
    """
    found = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if not (isinstance(found, int | float) and 2 <= found < math.inf):
        raise ModelError(f"config.json says max_position_embeddings = {found}: expected 2 or more")
    return int(found)


@torch.no_grad()
def load_dense(model: nn.Module, rounded: Mapping[str, RoundedWeight], others: Mapping[str, Tensor]) -> None:
    """Puts rounded weights, by module, and other parameters, by name, into a model of dense linears."""
    for name, weight in rounded.items():
        model.get_parameter(f"{name}.weight").copy_(dequantized(weight))
    for name, value in others.items():
        model.get_parameter(name).copy_(value)


def measured_kl(
    model: nn.Module,
    rounded: Mapping[str, RoundedWeight],
    others: Mapping[str, Tensor],
    text: TokenBatch,
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _n: None,
) -> float:
    """Of a copy of the whole model with these weights, in nats per token."""
    twin = copy.deepcopy(model)
    load_dense(twin, rounded, others)
    return compare_models(twin, model, text, batch_size=batch_size, advance=advance).kl_mean


def device_of(model: nn.Module) -> torch.device:
    """Where its parameters are."""
    return next(model.parameters()).device
