"""Mixtures of experts, expert by expert: every matrix of every expert a linear of its own.

Problem: Transformers keeps the matrices of all experts of a layer in one parameter of three dimensions and multiplies them together.
Nothing that looks at linears (gradients, rounding, packed weights) sees them. `split_experts` turns such a module, in place, into one that
has a module for each expert with `gate_proj`, `up_proj` and `down_proj`, views of the old parameters, and that runs one expert after the
other as the module's own definition does. Biases, activation, gate function, norms and the router stay what they are.

    fused      gate_up_proj (experts, 2 d_inner, d)     down_proj (experts, d, d_inner)      or transposed; halves in turn or interleaved
    split      EXPERT.gate_proj.weight (d_inner, d)     EXPERT.up_proj.weight     EXPERT.down_proj.weight (d, d_inner)

Only an expert that has tokens runs, with its tokens alone. Cost: the same products, in `3 experts` calls of smaller matrices.

Modules say how they store and run their experts (`use_experts_implementation`); `OTHERS` says it for those that do not.

Experts need not be feed-forward blocks: a module may multiply each token with one matrix of its own (`SplitMatrices`).

Not done: experts that are rows of one matrix (DBRX).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Part", "SplitExperts", "expert_family", "experts_of", "join_experts", "parts_of", "split_experts", "split_modules"]

PROJECTIONS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
    "weight": ("proj",),
}
"""Of an expert, by the parameter that holds those of all."""

USUAL: dict[str, bool] = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
OTHERS: dict[str, dict[str, bool]] = {
    "JetMoeParallelExperts": {},
    "Llama4TextExperts": {"is_transposed": True},
    "LongcatFlashExperts": {},
    "Step3p7Experts": {},
}
"""By class, in what its experts differ from the usual ones."""

SEQUENTIAL = {"Llama4TextExperts"}
"""Classes in whose place Transformers itself has experts one by one, as soon as a checkpoint is a compressed-tensors one."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where one expert's matrix is in the parameter of all."""

    stack: str
    expert: int
    rows: slice
    """Of the matrix `(d_out, d_in)`."""
    transposed: bool
    """Whether the parameter holds `(d_in, d_out)` for each expert."""

    def of(self, stack: Tensor, *, first: int = 0) -> Tensor:
        """A view of it, `(d_out, d_in)`, in the parameter's values from the expert `first` on."""
        matrix = stack[self.expert - first]
        return (matrix.T if self.transposed else matrix)[self.rows]


class SplitExperts:
    """What a module of fused experts is beside its own class once it is split."""

    stacks: dict[str, int]
    """Of `PROJECTIONS`, those that it had, and how many matrices were in each: not fewer than it has experts."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum, for each token, of what its experts make of it.

        Args:
            hidden_states: `(tokens, d)`.
            top_k_index: `(tokens, chosen)`, which experts.
            top_k_weights: `(tokens, chosen)`, of each.
        """
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            real = 0 <= expert < self.num_split
            if not real and not hasattr(self, "identity_expert"):
                continue  # a place that no expert has taken
            tokens, chosen = (top_k_index == expert).nonzero(as_tuple=True)
            x = hidden_states[tokens]
            y = (self.run_expert(int(expert), x) if real else x) * top_k_weights[tokens, chosen, None]
            total = total.index_add(0, tokens, y.to(total.dtype))
        return total

    def run_expert(self: Any, expert: int, x: Tensor) -> Tensor:
        """One expert's output for the tokens that it has, `(tokens, d)`."""
        own = self.get_submodule(str(expert))
        if self.has_gate:
            gate, up = own.gate_proj(x), own.up_proj(x)
            both = torch.cat([gate, up], -1) if self.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
            both = both + self.gate_up_proj_bias[expert] if self.has_bias else both
            inner = self._apply_gate(both) if hasattr(self, "_apply_gate") else self.act_fn(gate) * up
        else:
            up = own.up_proj(x)
            inner = self.act_fn(up + self.up_proj_bias[expert] if self.has_bias else up)
        y: Tensor = own.down_proj(inner)
        if self.has_bias:
            y = y + self.down_proj_bias[expert]
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        return y

    @property
    def sequential(self) -> bool:
        """Whether Transformers reads compressed-tensors experts of this class one by one."""
        return type(self).__bases__[1].__name__ in SEQUENTIAL

    def put(self: Any, stack: str, values: Tensor) -> None:
        """Gives the experts the values of a parameter of all, as views of it."""
        for name, part in parts_of(self).items():
            if part.stack == stack:
                self.get_submodule(name).weight = nn.Parameter(part.of(values), requires_grad=False)


class SplitSortedExperts(SplitExperts):
    """Experts that are given all tokens each, multiplied with the router's weights: those of an expert that is not chosen are zero."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """`(experts tokens, d)`, all tokens of the first expert first."""
        found = []
        for expert, x in enumerate(hidden_states.chunk(self.num_split)):
            tokens = x.detach().any(-1).nonzero()[:, 0]
            y = torch.zeros_like(x)
            found.append(y.index_copy(0, tokens, self.run_expert(expert, x[tokens])) if len(tokens) else y)
        return torch.cat(found)


class SplitMatrices(SplitExperts):
    """Experts that are one matrix each, given the tokens of all of them, in order."""

    def forward(self: Any, inputs: Tensor, expert_size: list[int]) -> Tensor:  # type: ignore[override]
        """`(tokens, d_out)`; the first `expert_size[0]` tokens are those of the first expert."""
        found = []
        for expert, x in enumerate(inputs.split(expert_size)):
            linear = self.get_submodule(str(expert)).proj
            found.append(linear(x) if len(x) else x.new_zeros(0, linear.out_features))
        return torch.cat(found)


WAYS: dict[str, type[SplitExperts]] = {"Llama4TextExperts": SplitSortedExperts, "JetMoeParallelExperts": SplitMatrices}


def split_experts(model: nn.Module, wanted: Collection[str] | None = None) -> None:
    """Splits modules of fused experts of a model: all, or those that have any of the linears `wanted`."""
    owners = None if wanted is None else {name.rpartition(".")[0].rpartition(".")[0] for name in wanted}
    for name, module in list(model.named_modules()):
        if _is_fused(module) and (owners is None or name in owners):
            _split(module)


def split_modules(model: nn.Module) -> dict[str, SplitExperts]:
    """All modules that were split, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}


def join_experts(module: nn.Module | SplitExperts) -> None:
    """Gives a split module its fused parameters and its class back."""
    own: Any = module
    for stack in own.stacks:
        parts = {name: part for name, part in parts_of(module).items() if part.stack == stack}
        weights = {name: own.get_submodule(name).weight for name in parts}
        d_out, d_in = (sum(weight.shape[0] for weight in weights.values()) // own.num_split, next(iter(weights.values())).shape[1])
        shape = (own.stacks[stack], d_in, d_out) if own.is_transposed else (own.stacks[stack], d_out, d_in)
        values = next(iter(weights.values())).new_zeros(shape)
        for name, part in parts.items():
            part.of(values).copy_(weights[name])
        own._parameters[stack] = nn.Parameter(values, requires_grad=False)
    for expert in range(own.num_split):
        del own._modules[str(expert)]
    own.__class__ = type(module).__bases__[1]


def parts_of(module: nn.Module | SplitExperts) -> dict[str, Part]:
    """By name below a split module, of each of its linears."""
    own: Any = module
    found = {}
    for expert in range(own.num_split):
        for stack in own.stacks:
            half = own.d_inner
            sides = (slice(0, half), slice(half, None)) if own.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
            for name, rows in zip(PROJECTIONS[stack], sides if stack == "gate_up_proj" else (slice(None),), strict=True):
                found[f"{expert}.{name}"] = Part(stack=stack, expert=expert, rows=rows, transposed=own.is_transposed)
    return found


def _is_fused(module: nn.Module) -> bool:
    kind = type(module).__name__
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    stacks = ["weight"] if WAYS.get(kind) is SplitMatrices else [first, "down_proj"]
    known = hasattr(module, "is_transposed") or kind in OTHERS
    return known and all(getattr(module._parameters.get(name), "ndim", 0) == 3 for name in stacks)


def _split(module: nn.Module) -> None:
    own: Any = module
    for setting, value in {**USUAL, **OTHERS.get(type(module).__name__, {})}.items():
        if not hasattr(module, setting):
            setattr(module, setting, value)
    values = {name: values for name in PROJECTIONS if (values := module._parameters.pop(name, None)) is not None}
    own.stacks = {name: len(stack) for name, stack in values.items()}
    down = list(values.values())[-1]
    module.__dict__.pop("forward", None)  # of the old class, left by hooks that are gone
    own._is_hf_initialized = True  # Transformers would fill the old parameters
    own.num_split, own.d_inner = down.shape[0], down.shape[1 if own.is_transposed else 2]
    kind: Any = type(module)
    module.__class__ = _split_class(kind)
    for name, part in parts_of(module).items():
        expert, _, projection = name.partition(".")
        if expert not in module._modules:
            module.add_module(expert, nn.Module())
        weight = part.of(values[part.stack].detach())
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        module.get_submodule(expert).add_module(projection, linear)


def experts_of(model: nn.Module, linear: str) -> SplitExperts | None:
    """The split module that a linear is part of."""
    parent = model.get_submodule(linear.rpartition(".")[0].rpartition(".")[0])
    return parent if isinstance(parent, SplitExperts) else None


def expert_family(model: nn.Module, linear: str) -> str | None:
    """The name that an expert's linear shares with the same one of the others; None for all other linears."""
    owner, _, projection = linear.rpartition(".")
    return f"{owner.rpartition('.')[0]}.{projection}" if experts_of(model, linear) is not None else None


@cache
def _split_class(kind: Any) -> type:
    return type(f"Split{kind.__name__}", (WAYS.get(kind.__name__, SplitExperts), kind), {})
