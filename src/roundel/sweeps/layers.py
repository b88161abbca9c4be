"""A causal language model as a row of decoder layers, each of which can be run by itself.

Problem: whatever is done to a model layer by layer needs to call one decoder layer as the model would, with its masks, rotary tables and
whatever else an architecture hands around, without a line of code for any architecture. Here the model's own `forward` does it: for the
time of a call the layers before the wanted ones hand their input on, the first wanted one is given the hidden state that the caller has,
and after the last one the forward pass is ended. Embedding, masks and tables are made anew in each call, which costs next to nothing; the
weights of layers that are not run need not be in memory (`loaded`).

    embed(ids) -> x[0];   run(0, ids, x[0]) -> x[1];   ...;   logits(ids, x[-1])

Whether that gives what the whole model gives is not assumed but run, once, on a few tokens (`verified`). Where layers exchange more than
the hidden state (shared keys and values, a block that is used several times) all of them are one group that is run together: the results
are the same, the memory is that of the model.

What comes after the last layer, norm and output head, looks at each position by itself, so logits are made of slices of tokens, never of
all: `SLICE` numbers at a time.

Not done: groups of some, but not all layers, where only some exchange more; layers of two lists (encoder and decoder).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from roundel.errors import ModelError, RoundelError, is_out_of_memory, reason_of
from roundel.sweeps.cache import through_cache

__all__ = ["SLICE", "Layers", "OnDemand", "ReachedError", "decoder_layers", "text_lists"]

SLICE = 1 << 24
"""Logits that exist at a time: 64 MB in float32."""

PROBE_TOKENS = 8
TOWERS = ("audio", "image", "speech", "video", "vision", "visual")


class OnDemand(Protocol):
    """Where weights come from that are not in memory all the time."""

    def loaded(self, modules: Sequence[str]) -> AbstractContextManager[None]:
        """Within the context the weights below these modules are in memory."""

    def keep(self, group: str, parameters: Sequence[str]) -> None:
        """The values that parameters of a loaded group have now are loaded from now on; those of its others are the files' again."""


class ReachedError(Exception):
    """Ends a forward pass, also when a hook raises it; what it has reached."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Layers:
    """The decoder layers of a model in groups, each of which can be run by itself."""

    def __init__(self, model: nn.Module, weights: OnDemand | None = None) -> None:
        """Finds the layers and tries whether they can be run one by one.

        Args:
            model: A causal language model in evaluation mode.
            weights: Brings the weights of layers that are on the meta device, where not all are in memory.

        Raises:
            ModelError: the model has no list of decoder layers.
        """
        self.model, self._weights = model, weights
        self.names = decoder_layers(model)
        self._modules = [model.get_submodule(name) for name in self.names]
        self.inputs: dict[str, Callable[[Tensor], Tensor]] = {}
        """How linears of the quantized model have their inputs rounded as it runs, by name."""
        self.cache: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
        """How attentions of the quantized model have their keys and values rounded, by name."""
        self._returned: dict[int, Any] = {}
        """Of each layer that has been run, what it returned beside the hidden state."""
        self.groups: list[list[str]] = [[name] for name in self.names]
        if _share_weights(self._modules) or not self.verified():
            self.groups = [list(self.names)]
            if not self.verified():
                raise ModelError(
                    "the model's decoder layers cannot be run by themselves: its forward pass does more than call them in order"
                )

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def device(self) -> torch.device:
        """Where hidden states have to be."""
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return next(embedding.parameters()).device

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    def inside(self, index: int, modules: Iterable[str]) -> list[str]:
        """Which of these modules, or parameters, belong to a group, in their order."""
        prefixes = tuple(f"{name}." for name in self.groups[index])
        return [name for name in modules if name.startswith(prefixes) or name in self.groups[index]]

    def outside(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """Which of these modules belong to no group."""
        prefixes = tuple(f"{name}." for name in self.names)
        return [name for name in modules if not name.startswith(prefixes) and name not in self.names]

    def loaded(self, index: int) -> AbstractContextManager[None]:
        """Within the context the group's weights are in memory."""
        return nullcontext() if self._weights is None else self._weights.loaded(self.groups[index])

    def keep(self, index: int, linears: Sequence[str]) -> None:
        """Weights of these linears of a loaded group have been changed: they are so from now on, also when it is loaded again."""
        if self._weights is not None:
            self._weights.keep(self.groups[index][0], [f"{name}.weight" for name in linears])

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, "sequences tokens"]) -> Float[Tensor, "sequences tokens d"]:
        """The hidden state before the first layer."""
        return self._forward(ids, {0: _reach_input})

    def embedded(self, ids: Int[Tensor, "sequences tokens"]) -> tuple[Tensor, Tensor]:
        """What the embedding returns, as a leaf, and the hidden state before the first layer, which gradients come back from."""
        with _as_leaf(self.model.get_input_embeddings()) as leaves:  # type: ignore[operator]
            hidden = self._forward(ids, {0: _reach_input})
        return leaves[-1], hidden

    @torch.no_grad()
    def head_inputs(self, ids: Int[Tensor, "sequences tokens"], hidden: Float[Tensor, "sequences tokens d"]) -> Tensor:
        """What the output head reads, given the hidden state after the last layer."""

        def reach(_module: nn.Module, args: tuple[Any, ...]) -> None:
            raise ReachedError(args[0])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(reach)  # type: ignore[operator]
        try:
            self.logits(ids, hidden)
        except ReachedError as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise ModelError("the forward pass never came to the output head")

    def head_outputs(self, ids: Int[Tensor, "sequences tokens"], hidden: Float[Tensor, "sequences tokens d"]) -> tuple[Tensor, Tensor]:
        """What the output head returns, as a leaf, and the logits, which gradients come back from."""
        with _as_leaf(self.model.get_output_embeddings()) as leaves:  # type: ignore[operator]
            logits = self.logits(ids, hidden)
        return leaves[-1], logits

    def run(
        self,
        index: int,
        ids: Int[Tensor, "sequences tokens"],
        hidden: Float[Tensor, "sequences tokens d"],
        *,
        instead: nn.Module | None = None,
    ) -> Tensor:
        """The hidden state after a group, given that before it; gradients flow from one to the other.

        `instead`: a module that is called in the place of the group's only layer.
        """
        first = self.names.index(self.groups[index][0])
        last = first + len(self.groups[index]) - 1
        if instead is not None:
            assert first == last
            return self._forward(ids, self._steps(first, last, hidden) | {last: self._really(last, given=hidden, ends=True, layer=instead)})
        return self._forward(ids, self._steps(first, last, hidden))

    def through(self, ids: Int[Tensor, "sequences tokens"]) -> Float[Tensor, "sequences tokens d"]:
        """The hidden state after the last group, of a model that is in memory as a whole."""
        last = len(self.names) - 1
        return self._forward(ids, {last: self._really(last, given=None, ends=True)})

    def logits(self, ids: Int[Tensor, "sequences tokens"], hidden: Float[Tensor, "sequences tokens d"]) -> Tensor:
        """Of the hidden state after the last layer, at some positions: `ids` only tells how many, each is looked at by itself."""
        last = len(self.names) - 1
        steps = {i: self._hand_on(i) for i in range(last)} | {last: self._hand_on(last, hidden)}
        with self._patched(steps):
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found

    def slices(self, tokens: int) -> list[slice]:
        """Positions of a sequence whose logits exist at the same time."""
        size = max(1, SLICE // self.vocabulary)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def pieces(self, rows: int, tokens: int) -> list[tuple[slice, slice]]:
        """Sequences, and positions of them, whose logits exist at the same time: several sequences, or a part of one."""
        parts = self.slices(tokens)
        together = max(1, SLICE // (tokens * self.vocabulary))
        return [(slice(start, min(start + together, rows)), part) for start in range(0, rows, together) for part in parts]

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context the model has other values for some of its parameters, by name; tied ones everywhere.

        It stands for the quantized model there, so linears also read their inputs as engines round them (`inputs`),
        and attentions their keys and values (`cache`).
        """
        readers = {self.model.get_submodule(name): rounding for name, rounding in self.inputs.items()}
        hooks = [module.register_forward_pre_hook(partial(_read, rounding)) for module, rounding in readers.items()]
        attentions = {name: self.model.get_submodule(name) for name in self.cache}
        wanted = {id(self.model.get_parameter(name)): value for name, value in values.items()}
        places = [
            (module, key, parameter)
            for module in self.model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in wanted
        ]
        for module, key, parameter in places:
            value = wanted[id(parameter)].to(self.device if parameter.is_meta else parameter.device, parameter.dtype)
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        try:
            with through_cache(attentions, lambda name, keys, values: self.cache[name](keys, values)):
                yield
        finally:
            for module, key, parameter in places:
                module._parameters[key] = parameter
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def verified(self) -> bool:
        """Whether the groups, run one by one, give what the whole model gives, bit for bit, on a few tokens.

        Raises:
            ModelError: it cannot be run at all.
        """
        ids = torch.randint(self.vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(self.device)
        seen: list[Tensor] = []
        with self._patched({i: self._observed(i, seen) for i in range(len(self.names))}):
            try:
                whole = self.model(input_ids=ids, use_cache=False).logits
            except Exception as error:  # whatever an architecture raises whose settings do not go together
                if isinstance(error, RoundelError) or is_out_of_memory(error):
                    raise
                if any(parameter.is_meta for parameter in self.model.parameters()):  # a forward pass that looks at values
                    return False
                raise ModelError(
                    f"the model cannot be run ({type(error).__name__}: {reason_of(error)}): is its config.json right?"
                ) from error
        firsts = [self.names.index(group[0]) for group in self.groups]
        if len(seen) != len(self.names):
            return False
        try:
            hidden = self.embed(ids)
            for index, first in enumerate(firsts):
                if not torch.allclose(hidden, seen[first], rtol=0, atol=0, equal_nan=True):
                    return False
                with self.loaded(index):
                    hidden = self.run(index, ids, hidden)
            own = torch.cat([self.logits(ids[:, part], hidden[:, part]) for part in (slice(0, 3), slice(3, None))], dim=1)
        except (ReachedError, ModelError):
            raise
        except Exception:  # whatever an architecture raises when it misses what a layer that was not run would have left behind
            return False
        close = max(1e-3, 4 * torch.finfo(whole.dtype).eps)  # products of other shapes may add up in another order
        largest = whole.abs().nan_to_num(0, 0, 0).max().item()
        return own.shape == whole.shape and torch.allclose(own, whole, rtol=close, atol=close * largest, equal_nan=True)

    def _forward(self, ids: Tensor, steps: Mapping[int, _Step]) -> Tensor:
        with self._patched(steps):
            try:
                self.model(input_ids=ids, use_cache=False)
            except ReachedError as reached:
                return reached.hidden
        raise ModelError("the forward pass never came to the decoder layers")

    def _steps(self, first: int, last: int, hidden: Tensor) -> dict[int, _Step]:
        steps: dict[int, _Step] = {i: self._hand_on(i) for i in range(first)}
        for i in range(first, last + 1):
            steps[i] = self._really(i, given=hidden if i == first else None, ends=i == last)
        return steps

    def _hand_on(self, index: int, hidden: Tensor | None = None) -> _Step:
        """A layer that returns its input, or `hidden`."""

        def step(_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            state = _hidden_of(args, kwargs) if hidden is None else hidden
            rest = self._returned.get(index)
            return state if rest is None else (state, *rest)

        return step

    def _really(self, index: int, *, given: Tensor | None, ends: bool, layer: nn.Module | None = None) -> _Step:
        def step(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if given is not None:
                args, kwargs = _with_hidden(args, kwargs, given)
            output = (layer or forward)(*args, **kwargs)
            self._remember(index, output)
            if ends:
                raise ReachedError(output if isinstance(output, Tensor) else output[0])
            return output

        return step

    def _observed(self, index: int, seen: list[Tensor]) -> _Step:
        def step(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen.append(_hidden_of(args, kwargs).clone())
            group = next(number for number, names in enumerate(self.groups) if self.names[index] in names)
            with self.loaded(group):
                output = forward(*args, **kwargs)
            self._remember(index, output)
            return output

        return step

    def _remember(self, index: int, output: Any) -> None:
        rest = None if isinstance(output, Tensor) else tuple(None if isinstance(other, Tensor) else other for other in output[1:])
        self._returned[index] = rest

    @contextmanager
    def _patched(self, steps: Mapping[int, _Step]) -> Iterator[None]:
        """Within the context calls of these layers go to the steps."""
        modules = {index: self._modules[index] for index in steps}
        before = {id(module): module.__dict__.get("forward") for module in modules.values()}  # where somebody else has patched it
        for index, module in modules.items():
            module.forward = _Patch(steps[index], module.forward)  # an attribute of the instance, before that of its class
        try:
            yield
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)
                if (forward := before[id(module)]) is not None:
                    module.forward = forward


@contextmanager
def _as_leaf(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context the module's outputs are leaves, which are kept, and gradients are recorded."""
    leaves: list[Tensor] = []

    def leaf(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    handle = module.register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            yield leaves
    finally:
        handle.remove()


_Step = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _Patch:
    """In the place of a layer's `forward`."""

    def __init__(self, step: _Step, forward: Callable[..., Any]) -> None:
        self.step, self.forward = step, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.step(self.forward, args, kwargs)


def _read(rounding: Callable[[Tensor], Tensor], _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return rounding(args[0]), *args[1:]


def _reach_input(_forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise ReachedError(_hidden_of(args, kwargs))


def _hidden_name(kwargs: Mapping[str, Any]) -> str:
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return "hidden_states"
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point())


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs[_hidden_name(kwargs)]
    return found


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, _hidden_name(kwargs): hidden})


def text_lists(model: nn.Module) -> list[str]:
    """Names of the outermost lists of layers of the language model: those beside its embedding, not the towers of a wrapper.

    Towers that are kept beside the embedding themselves tell by their names (`TOWERS`).
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    inside = next((name for name, module in model.named_modules() if module is embedding), "")
    while inside:
        inside = inside.rpartition(".")[0]
        if own := [name for name in lists if name.startswith(f"{inside}." if inside else "")]:
            return [name for name in own if not any(word in name for word in TOWERS)] or own
    return lists


def decoder_layers(model: nn.Module) -> list[str]:
    """Names of the decoder layers: the modules of that list of the language model that has most weights.

    Raises:
        ModelError: there is none.
    """
    lists = text_lists(model)
    if not lists:
        raise ModelError("the model has no list of decoder layers, over which it could be quantized layer by layer")

    def size(name: str) -> int:
        return sum(p.numel() for p in model.get_submodule(name).parameters())

    chosen = max(lists, key=size)
    return [f"{chosen}.{index}" for index in range(len(model.get_submodule(chosen)))]  # type: ignore[arg-type]


def _share_weights(layers: Sequence[nn.Module]) -> bool:
    """Whether a parameter is part of several layers, in one module or in several that are tied."""
    seen: set[int] = set()
    for layer in layers:
        own = {id(parameter) for parameter in layer.parameters()}
        if own & seen:
            return True
        seen |= own
    return False
