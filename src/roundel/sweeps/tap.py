"""Catching `x` and `g` of every linear with hooks on the modules: no tracing, no forked model code.

A forward hook keeps the linear's input and puts a hook on its output tensor; when the backward pass brings the gradient, both go to the
consumer and are dropped. Parameters take no gradient, so autograd computes only `g W` for each linear; the graph starts at the
embedding's output. Linears that read the same tensor share one `LayerInput`, and so its Gram matrices.

Not every linear sees each token once. What counts is which sequence a row of its input belongs to (`by_sequence`): a linear of latent
attention may see `(sequences, 1, tokens, d_in)`, one that works on heads or images several rows for a token, an expert those tokens that
are routed to it. A linear that runs several times in a pass has the rows of all its uses, since its gradient is the sum over them.
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

__all__ = ["by_sequence", "tapped"]

Consumer = Callable[[str, LayerGrad], None]


def by_sequence(x: Tensor, sequences: int, tokens: int) -> Tensor | None:
    """`(sequences, rows, d)` of what a linear sees or writes; None where rows of different sequences cannot be told apart."""
    if sequences == 1:
        return x.reshape(1, -1, x.shape[-1])
    if x.ndim > 2 and x.shape[0] == sequences:
        return x.flatten(1, -2)
    if x.ndim == 2 and x.shape[0] == sequences * tokens:
        return x.reshape(sequences, tokens, x.shape[1])
    return None


class _Uses:
    """Of one linear in one forward pass, and the gradients that have come back."""

    def __init__(self) -> None:
        self.inputs: list[tuple[LayerInput, int]] = []
        """With the version of their memory, which must not change."""
        self.gradients: dict[int, Tensor] = {}
        self.ran = False


@contextmanager
def tapped(model: nn.Module, linears: Mapping[str, nn.Linear], consume: Consumer, *, apart: bool = True) -> Iterator[None]:
    """Within the context every backward pass calls `consume(name, LayerGrad)` once for each linear, at the latest when the context ends.

    One that no gradient has reached has no rows, and is `blind` if it was used. If sequences need not be told `apart`, all rows are those
    of one.

    Raises (in the pass):
        ModelError: a linear sees rows of several sequences that cannot be told apart, or its input is overwritten.
    """
    pending: dict[str, _Uses] = {}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in linears}
    entered: set[nn.Module] = set()
    shared: WeakValueDictionary[tuple[Any, ...], LayerInput] = WeakValueDictionary()
    shape: list[int] = []

    def begin(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        finish()
        entered.clear()
        pending.update((name, _Uses()) for name in linears)
        shape[:] = output.shape[:2] if apart else (1, output.shape[:2].numel())
        return output.requires_grad_().clone()  # which the model may overwrite

    def forward(name: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = by_sequence(args[0].detach(), *shape)
        if x is None:
            with in_layer(name):
                raise ModelError(
                    f"the input has shape {tuple(args[0].shape)}, in which {shape[0]} sequences of {shape[1]} tokens cannot be told apart; "
                    "take one at a time (--batch-size 1), or leave it out with --exclude"
                )
        if name in pending:
            pending[name].ran = True
        if output.requires_grad and name in pending:
            inputs = pending[name].inputs
            output.register_hook(partial(backward, name, pending[name], len(inputs)))
            inputs.append((shared.setdefault((x.data_ptr(), x.shape, x._version), LayerInput(x)), x._version))

    def backward(name: str, uses: _Uses, use: int, g: Tensor) -> None:
        input, version = uses.inputs[use]
        if input.x._version != version:
            with in_layer(name):
                raise ModelError("the model overwrites the linear's input after use; leave it out with --exclude")
        uses.gradients[use] = g.detach().reshape(*input.x.shape[:2], -1)
        if len(uses.gradients) == len(uses.inputs):
            hand_over(name, pending.pop(name))

    def hand_over(name: str, uses: _Uses) -> None:
        order = sorted(uses.gradients)
        if not order:
            weight = linears[name].weight
            input = LayerInput(weight.new_empty(shape[0], 0, weight.shape[1]))
            g = weight.new_empty(shape[0], 0, weight.shape[0])
        elif len(order) == 1:
            input, g = uses.inputs[order[0]][0], uses.gradients[order[0]]
        else:
            input = LayerInput(torch.cat([uses.inputs[use][0].x for use in order], dim=1))
            g = torch.cat([uses.gradients[use] for use in order], dim=1)
        with in_layer(name):
            used = uses.ran or owners[name] in entered  # which may take the weight without calling the linear
            consume(name, LayerGrad(input=input, g=g, text=shape[1], blind=used and not order))

    def finish() -> None:
        """What no gradient, or not that of all uses, has reached."""
        while pending:
            hand_over(*pending.popitem())

    wanted = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embedding.register_forward_hook(begin)]
    handles += [module.register_forward_hook(partial(forward, name)) for name, module in linears.items()]
    handles += [owner.register_forward_pre_hook(lambda module, _args: entered.add(module)) for owner in set(owners.values())]
    try:
        with torch.enable_grad():
            yield
        finish()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
