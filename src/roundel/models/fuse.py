"""Rotations that cost nothing at run time: folded into the weights on both sides of the residual stream, and of the values.

A model whose layers read the residual stream only through RMSNorms and write to it only through linears computes the same function in
any orthonormal basis of the stream. With `s` the weight of a norm, and `Q` orthonormal:

    norm_s(x) = s * x / rms(x),   rms(Q x) = rms(x)     =>     W norm_s(x) = (W diag(s) Q^T) norm_1(Q x)

    embedding rows    E    -> E Q^T                 linears that write (o, down)    W -> Q W,   b -> Q b
    norms             s    -> 1                     linears that read a norm (q, k, v, gate, up, output head)    W -> W diag(s) Q^T

and, since attention only averages over tokens, with one rotation `P` for each head of values, shared by the query heads of its group:

    rows of v         V_h  -> P_h V_h, b -> P_h b   columns of o                    O_h -> O_h P_h^T

`Q` and `P` are random signs followed by `linalg.hadamard`. The weights have no outliers in channels of the stream then (incoherence), for
every format, since the result is an ordinary checkpoint of the same architecture. An output head that is tied to the embedding is untied:
one needs the last norm's weight, the other does not.

The structure is found, not looked up by names (`models.structure`). What does not have this form is refused before anything is changed;
the logits of random tokens are compared before and after.

Cost: two transforms of each weight in float64, a part of one weight at a time; three small forward passes. In a checkpoint of 16-bit
weights the rotated embedding and head are rounded to its type once more, which all of the model's bfloat16 sums cost as well.
References: Ashkboos et al., SliceGPT (arXiv 2401.15024) and QuaRot (arXiv 2404.00456).

Not done: rotations that need an operation at run time (the input of down, queries and keys behind rotary embeddings); LayerNorm, which
would need the mean folded as well; norms behind a sublayer (Gemma 2, OLMo 2), which do not commute with a rotation; mixtures of experts;
learned rotations.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int8
from safetensors import safe_open
from torch import Tensor, nn

from roundel.errors import ModelError, SchemeError
from roundel.linalg.hadamard import hadamard
from roundel.models.checkpoint import Checkpoint
from roundel.models.structure import Structure, find_structure, norm_scale, random_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PARTS", "FusedModel", "OverlaidCheckpoint", "fuse_rotation"]

PARTS = ("residual", "values")
"""What can be rotated: the residual stream, and the values of each head."""
TOLERANCE = 1e-3
"""Of the logits, relative: float32 rounding is below 1e-5 even where the stream has outliers, a mistake is of order 1."""
ROWS = 4096
"""Rows that are held in float64 at once."""

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class OverlaidCheckpoint(Checkpoint):
    """A checkpoint of which some tensors are others than in its files, or are not in them at all."""

    overlay: Mapping[str, Tensor]
    """By stored name."""
    dtypes: Mapping[str, torch.dtype]
    """The type that each tensor of the overlay is stored in."""

    def read(self, name: str) -> Tensor:
        """One tensor, in the type in which it is stored."""
        if name not in self.overlay:
            return super().read(name)
        return self.overlay[name].to("cpu", self.dtypes[name]).contiguous()

    def exact(self, name: str) -> Tensor:
        """One tensor before it is rounded to the type in which it is stored."""
        return self.overlay[name].to("cpu") if name in self.overlay else super().read(name)


@dataclass(frozen=True, kw_only=True)
class FusedModel:
    """What `fuse_rotation` changed of a model's checkpoint."""

    overlay: dict[str, Tensor]
    """The changed parameters by the model's own names: they share their memory with it."""
    parts: tuple[str, ...]
    seed: int
    untied: str | None
    """The embedding's weight, if the output head was tied to it and is no longer."""
    head: str
    """The output head's weight."""
    difference: float
    """Of the logits before and after, relative to their spread: root mean squares over random tokens."""

    def checkpoint(self, original: Checkpoint) -> OverlaidCheckpoint:
        """The fused model's checkpoint: the original's tensors and types, and the output head's weight if it was tied.

        Raises:
            ModelError: a changed parameter is not stored under its name, or in a type that is no floating-point one.
        """
        files, sizes = dict(original.files), dict(original.sizes)
        overlay, dtypes = {}, {}
        twins = {self.head: self.untied, self.untied: self.head} if self.untied else {}
        for name, tensor in self.overlay.items():
            found = original.stored(name)
            like = found or original.stored(twins.get(name) or name)
            if like is None:
                raise ModelError(f"{name} is not in the checkpoint under this name: rotations cannot be fused into it; use --rotate none")
            stored = found or name
            overlay[stored], dtypes[stored] = tensor, _stored_type(original.files[like], like)
            files[stored], sizes[stored] = original.files[like], tensor.numel() * dtypes[stored].itemsize
        return OverlaidCheckpoint(files=files, sizes=sizes, names=original.names, overlay=overlay, dtypes=dtypes)

    def config(self, original: Mapping[str, Any]) -> dict[str, Any]:
        """The contents of config.json for the fused model."""
        changed = copy.deepcopy(dict(original))
        if self.untied:
            changed["tie_word_embeddings"] = False
            if "tie_word_embeddings" in changed.get("text_config", {}):
                changed["text_config"]["tie_word_embeddings"] = False
        return changed

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "parts": list(self.parts),
            "seed": self.seed,
            "untied": self.untied is not None,
            "added_parameters": self.overlay[self.head].numel() if self.untied else 0,
            "logits_difference": self.difference,
        }


def _stored_type(path: Path, name: str) -> torch.dtype:
    with safe_open(path, framework="pt") as handle:
        kind = handle.get_slice(name).get_dtype()
    if kind not in _TYPES:
        raise ModelError(f"{name} in {path} is stored as {kind}: expected one of {', '.join(_TYPES)}; start from the original model")
    return _TYPES[kind]


def fuse_rotation(model: PreTrainedModel, *, seed: int, parts: Iterable[str] = PARTS) -> FusedModel:
    """Rotates a model's weights, in place, such that it computes the same function.

    Args:
        model: A causal language model in float32 and evaluation mode; convert it to another type after. It must not be used after an error
            other than `SchemeError`, which is raised before anything is changed.
        seed: Of all signs, together with the names of the parts.
        parts: Some of `PARTS`. Without "residual" norms and the tied head stay as they are.

    Returns:
        The changed parameters, and what else changes in the checkpoint.

    Raises:
        SchemeError: the model has not the structure that this needs, or `parts` are unknown.
        ModelError: the model is not in float32, or it computes another function after (then its structure was misread).
    """
    chosen = tuple(part for part in PARTS if part in set(parts))
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not chosen:
        raise SchemeError(f"parts to rotate {', '.join(map(repr, unknown)) or 'are none'}: expected some of {', '.join(PARTS)}")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ModelError(f"{name} is in {parameter.dtype}: rotations are fused in float32; load the model so and convert it after")
    with torch.no_grad():
        found = find_structure(model, values="values" in chosen)
        before = _logits(model)
        untied = None
        changed: list[str] = []
        if "residual" in chosen:
            untied = _untie(model, found)
            changed += _rotate_residual(model, found, seed)
        if "values" in chosen:
            changed += _rotate_values(model, found, seed)
        difference = _relative(_logits(model), before)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"rotations fused into {model.config.model_type} change its logits by {difference:.1e} (at most {TOLERANCE:g} expected): "
            "something reads its residual stream that was not found; use --rotate none"
        )
    parameters = dict(model.named_parameters())
    return FusedModel(
        overlay={name: parameters[name].detach() for name in dict.fromkeys(changed)},
        parts=chosen,
        seed=seed,
        untied=untied,
        head=f"{found.head}.weight",
        difference=difference,
    )


def _signs(seed: int, name: str, *shape: int) -> Int8[Tensor, "..."]:
    digest = hashlib.sha256(f"{seed} fused {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    return 2 * torch.randint(2, shape, generator=generator, dtype=torch.int8) - 1


def _turned(x: Float[Tensor, "*batch n"], signs: Int8[Tensor, "... n"]) -> Float[Tensor, "*batch n"]:
    """`Q x` for the vectors along the last axis, in float64."""
    return hadamard(x.double() * signs.to(x.device))


def _turn_inputs(weight: Tensor, signs: Tensor, scale: Tensor | None = None) -> None:
    """`W <- W diag(scale) Q^T`, in place."""
    for rows in weight.split(ROWS):
        rows.copy_(_turned(rows.double() if scale is None else rows.double() * scale, signs))


def _turn_outputs(linear: nn.Linear, signs: Tensor) -> None:
    """`W <- Q W, b <- Q b`, in place."""
    for columns in linear.weight.split(ROWS, dim=1):
        columns.copy_(_turned(columns.T, signs).T)
    if linear.bias is not None:
        linear.bias.copy_(_turned(linear.bias, signs))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _own_names(model: nn.Module, module: str) -> list[str]:
    return [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters(recurse=False)]


def _untie(model: PreTrainedModel, found: Structure) -> str | None:
    """Gives a tied output head a weight of its own; returns the embedding's name then."""
    embedding, head = model.get_submodule(found.embedding), _linear(model, found.head)
    weight = embedding.weight
    assert isinstance(weight, nn.Parameter)
    if head.weight is not weight:
        return None
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)  # what save_pretrained asks
    return f"{found.embedding}.weight"


def _rotate_residual(model: PreTrainedModel, found: Structure, seed: int) -> list[str]:
    """Folds all norms and rotates both sides of the residual stream; returns the names of all changed parameters."""
    changed = _own_names(model, found.embedding)
    embedding = model.get_parameter(changed[0])
    signs = _signs(seed, "residual", embedding.shape[1])
    _turn_inputs(embedding, signs)
    for norm, readers in [*((block.norm, block.readers) for block in found.blocks), (found.norm, (found.head,))]:
        weight = model.get_parameter(f"{norm}.weight")
        scale, neutral = norm_scale(model, norm)
        for name in readers:
            _turn_inputs(_linear(model, name).weight, signs, scale)
            changed.append(f"{name}.weight")
        weight.fill_(neutral)
        changed.append(f"{norm}.weight")
    for block in found.blocks:
        _turn_outputs(_linear(model, block.writer), signs)
        changed += _own_names(model, block.writer)
    return changed


def _rotate_values(model: PreTrainedModel, found: Structure, seed: int) -> list[str]:
    """Rotates the values of each head and what reads them; returns the names of all changed parameters."""
    changed = []
    width = found.head_dim
    for block in found.blocks:
        sources = tuple(dict.fromkeys(block.values))
        if not sources:
            continue
        signs = dict(zip(sources, _signs(seed, block.writer, len(sources), width), strict=True))
        for name, start in sources:
            linear, rows = _linear(model, name), slice(start, start + width)
            linear.weight[rows] = _turned(linear.weight[rows].T, signs[name, start]).T.float()
            if linear.bias is not None:
                linear.bias[rows] = _turned(linear.bias[rows], signs[name, start]).float()
            changed += _own_names(model, name)
        heads = _linear(model, block.writer).weight.unflatten(1, (-1, width))
        for head, source in enumerate(block.values):
            heads[:, head] = _turned(heads[:, head], signs[source]).float()
        changed.append(f"{block.writer}.weight")
    return changed


def _logits(model: PreTrainedModel) -> Float[Tensor, "sequences tokens vocabulary"]:
    """Of random tokens, in float32."""
    length = min(32, int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 32))
    logits: Tensor = model(input_ids=random_tokens(model, 2, length), use_cache=False).logits
    return logits.float()


def _relative(after: Tensor, before: Tensor) -> float:
    """The root mean square difference of logits, relative to their spread over the vocabulary."""
    spread = before - before.mean(dim=-1, keepdim=True)
    change: float = torch.linalg.vector_norm(after - before, dtype=torch.float64).item()
    size: float = torch.linalg.vector_norm(spread, dtype=torch.float64).item()
    return change / size
