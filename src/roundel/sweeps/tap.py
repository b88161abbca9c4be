"""Catching `x` and `g` of every linear with hooks on the modules: no tracing, no forked model code.

A forward hook keeps the linear's input and puts a hook on its output tensor; when the backward pass brings the gradient, both go to the
consumer and are dropped. Parameters take no gradient, so autograd computes only `g W` for each linear; the graph starts at the
embedding's output. Linears that read the same tensor share one `LayerInput`, and so its Gram matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from roundel.errors import ModelError, in_layer
from roundel.types import LayerGrad, LayerInput

__all__ = ["tapped"]

Consumer = Callable[[str, LayerGrad], None]


@contextmanager
def tapped(model: nn.Module, linears: Mapping[str, nn.Linear], consume: Consumer) -> Iterator[None]:
    """Within the context every backward pass calls `consume(name, LayerGrad)` once for each linear that took part.

    Raises (in the pass):
        ModelError: a linear sees something that is not `(sequences, tokens, d_in)`, or runs twice in a forward pass.
    """
    pending: dict[str, tuple[LayerInput, int]] = {}
    shared: WeakValueDictionary[tuple[Any, ...], LayerInput] = WeakValueDictionary()
    shape: list[torch.Size] = []

    def begin(_module: nn.Module, _args: Any, output: Tensor) -> None:
        pending.clear()
        shape[:] = [output.shape[:2]]
        output.requires_grad_()

    def forward(name: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        with in_layer(name):
            if name in pending:
                raise ModelError(
                    "the linear runs twice in a forward pass, so its gradient has no single input; leave it out with --exclude"
                )
            if x.ndim == 2 and x.shape[0] == shape[0].numel():
                x = x.unflatten(0, shape[0])
            if x.ndim != 3 or x.shape[:2] != shape[0]:
                raise ModelError(
                    f"the input has shape {tuple(x.shape)}, expected {tuple(shape[0])} sequences and tokens; leave it out with --exclude"
                )
        key = (x.data_ptr(), x.shape, x._version)
        pending[name] = (shared.setdefault(key, LayerInput(x)), x._version)
        output.register_hook(partial(backward, name))

    def backward(name: str, g: Tensor) -> None:
        input, version = pending.pop(name)
        with in_layer(name):
            if input.x._version != version:
                raise ModelError("the model overwrites the linear's input after use; leave it out with --exclude")
            consume(name, LayerGrad(input=input, g=g.detach().reshape(*input.x.shape[:2], -1)))

    wanted = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embedding.register_forward_hook(begin)]
    handles += [module.register_forward_hook(partial(forward, name)) for name, module in linears.items()]
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
