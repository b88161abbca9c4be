"""Modules that are linears under another name, as `nn.Linear`s, so that all else sees one kind.

Subclasses of `nn.Linear` that compute the same, which one input tells (Falcon's do; routers do not), and `Conv1D` (GPT-2), whose weight is
stored transposed: `(d_in, d_out)`. In memory its linear has a view of that, `(d_out, d_in)`; its stored tensor is turned whenever it is
read or written (`turned`).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["as_linears", "is_turned"]


def is_turned(module: nn.Module) -> bool:
    """Whether a linear's weight is stored `(d_in, d_out)`."""
    return isinstance(module, Conv1D) or getattr(module, "turned", False)


def as_linears(model: nn.Module) -> None:
    """Puts plain linears in the place of all such modules, with the same parameters."""
    same: dict[type, bool] = {}
    for name, module in list(model.named_modules()):
        kind = type(module)
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf, bias=False, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().T, requires_grad=False)
            linear.bias = module.bias
            linear.turned = True  # type: ignore[assignment]
            model.set_submodule(name, linear.train(module.training))
        elif isinstance(module, nn.Linear) and kind is not nn.Linear:
            if kind not in same:
                same[kind] = _computes_the_same(module)
            if same[kind]:
                module.__class__ = nn.Linear


@torch.no_grad()
def _computes_the_same(module: nn.Linear) -> bool:
    """Whether a subclass does what `nn.Linear` does, for one input and weights drawn anew."""
    kept, random = dict(module._parameters), torch.Generator().manual_seed(0)
    x = torch.randn(3, module.in_features, generator=random)
    try:
        for name, parameter in kept.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.randn(parameter.shape, generator=random), requires_grad=False)
        wanted = nn.functional.linear(x, module.weight, module.bias)
        found = module(x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    finally:
        module._parameters.update(kept)
    return isinstance(found, torch.Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
