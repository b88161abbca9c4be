"""Keys and values on their way into an attention's cache: seen, or rounded as engines keep them.

Every attention of Transformers hands its keys, after the rotary embedding, and its values to `past_key_values.update`, and goes on with
what comes back. Here that is an object whose `update` is a function of ours; nothing is kept.

Not done: latent attention, whose engines keep something else; attentions that take more of their cache than `update`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Change", "attentions", "through_cache"]

Change = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From an attention's name, its keys and its values, both `(sequences, heads, tokens, width)`, to what it goes on with."""

CACHES = ("past_key_values", "past_key_value")
"""What a cache is called."""


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that make keys and values of their own and have a cache, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and hasattr(module, "k_proj") and hasattr(module, "v_proj") and _argument(module)
    }


def _argument(module: nn.Module) -> str | None:
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHES if name in parameters), None)


class _Through:
    """In the place of a cache."""

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.change = change

    def update(self, keys: Float[Tensor, "..."], values: Float[Tensor, "..."], *_args: Any, **_given: Any) -> tuple[Tensor, Tensor]:
        return self.change(keys, values)


@contextmanager
def through_cache(modules: Mapping[str, nn.Module], change: Change) -> Iterator[None]:
    """Within the context keys and values of these attentions go through `change`."""

    def given(through: _Through, argument: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, argument: through}

    hooks = [
        module.register_forward_pre_hook(partial(given, _Through(partial(change, name)), argument), with_kwargs=True)
        for name, module in modules.items()
        if (argument := _argument(module)) is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
