"""What a group of layers does with its linears, seen by running it: their order, which read the same tensor, and what is added to what.

Problem: prefix-aware rounding (`rounding.prefix`) takes linears in the order in which they run, those that read the same tensor together,
and treats those whose output is added to the residual stream in a special way. Names do not tell: architectures differ. `reading_order`
runs the group once; hooks on the linears tell what they read, and a dispatch mode sees every addition of a linear's output, directly or
after a multiplication by a number, to something that goes back to the group's input by additions alone, which is the stream.

Where several outputs are added up before they reach the stream (attention and MLP in parallel), what each is added to is all the rest.

Not done: outputs that go through a norm (Gemma) or a gate before they are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from roundel.sweeps.layers import Layers, ReachedError
from roundel.sweeps.tap import by_sequence

__all__ = ["Readers", "Seen", "observe", "reading_order"]

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Readers:
    """Linears that read the same tensor."""

    names: tuple[str, ...]
    """In the order in which they run."""
    added: tuple[str, ...]
    """Those whose output is added to the residual stream."""
    per_token: bool
    """Whether the tensor has one row for each token, in their order: not so for experts, which are given some of them."""

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Readers:
        """From its fields, as JSON has them."""
        return cls(names=tuple(known["names"]), added=tuple(known["added"]), per_token=known["per_token"])


@dataclass
class Seen:
    """What one linear saw in one forward pass."""

    x: Tensor
    """Its input, `(sequences, rows, d_in)` where rows can be told apart by sequence (`tap.by_sequence`), else as the linear got it."""
    order: int
    key: tuple[Any, ...]
    rest: Tensor | None = None
    """What its output was added to, that is the sum without it; of the same form."""
    factor: float = 1.0
    """What its output was multiplied by before."""
    runs: int = 1


class _Additions(TorchDispatchMode):
    """Follows outputs of linears until they are added to the stream."""

    def __init__(self, hidden: Tensor, found: Callable[[str, Tensor, float], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found
        self._stream: dict[tuple[Any, ...], Tensor] = {_key(hidden): hidden}
        self._parts: dict[tuple[Any, ...], tuple[Tensor, dict[str, tuple[Tensor, float]]]] = {}
        """Tensors that are sums of outputs of linears: of which, and how much of each."""

    def begin(self, name: str, output: Tensor) -> None:
        self._parts[_key(output)] = (output, {name: (output, 1.0)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Sees every operation below autograd."""
        before = None
        if func in (aten.add_.Tensor, aten.add.Tensor) and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args) and not kwargs:
            before = self._sides(*args)
            if before is not None and func is aten.add_.Tensor:  # which may overwrite an output
                same = args[0].data_ptr()
                parts = {name: (o.clone() if o.data_ptr() == same else o, c) for name, (o, c) in before[0].items()}
                before = parts, before[1]
        result = func(*args, **(kwargs or {}))
        if before is not None:
            self._added(*before, result)
        elif (
            func in (aten.mul.Tensor, aten.mul.Scalar)
            and isinstance(args[0], Tensor)
            and not (isinstance(args[1], Tensor) and args[1].ndim)
        ):
            known = self._parts.get(_key(args[0]))
            if known is not None:
                factor = float(args[1])
                self._parts[_key(result)] = (result, {name: (o, c * factor) for name, (o, c) in known[1].items()})
        return result

    def _sides(self, a: Tensor, b: Tensor) -> tuple[dict[str, tuple[Tensor, float]], bool] | None:
        """Outputs in the sum of two tensors, and whether one of them is the stream; None where the sum means nothing."""
        if a.shape != b.shape:
            return None
        parts_a, parts_b = self._parts.get(_key(a)), self._parts.get(_key(b))
        streams = [_key(each) in self._stream for each in (a, b)]
        if parts_a is not None and parts_b is not None:
            return {**parts_a[1], **parts_b[1]}, False
        for parts, is_stream in ((parts_a, streams[1]), (parts_b, streams[0])):
            if parts is not None:  # the other may be the output of a linear that is not watched
                return parts[1], is_stream
        return ({}, True) if any(streams) else None

    def _added(self, parts: dict[str, tuple[Tensor, float]], to_stream: bool, result: Tensor) -> None:
        if to_stream:
            self._stream[_key(result)] = result
            for name, (output, factor) in parts.items():
                self._found(name, result - factor * output.reshape(result.shape), factor)
        else:
            self._parts[_key(result)] = (result, parts)


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """Of a tensor's memory; what has a key is kept, so that none is used twice."""
    return tensor.data_ptr(), tensor.numel()


@torch.no_grad()
def observe(
    layers: Layers,
    index: int,
    ids: Tensor,
    hidden: Tensor,
    linears: Mapping[str, nn.Module],
    *,
    added: Sequence[str] = (),
    stop: bool,
) -> tuple[dict[str, Seen], Tensor]:
    """What linears of a group see when it is run on a hidden state, and the group's output.

    Args:
        layers: The model.
        index: Of the group.
        ids: The tokens.
        hidden: The state before the group.
        linears: Whose inputs are wanted, by name.
        added: Those of them for which it is also wanted what their output is added to.
        stop: Whether to end as soon as all is known; the output then means nothing.
    """
    seen: dict[str, Seen] = {}

    def told_apart(x: Tensor) -> Tensor:
        found = by_sequence(x, *hidden.shape[:2])
        return x if found is None else found

    def complete() -> bool:
        return len(seen) == len(linears) and all(seen[name].rest is not None for name in added)

    def found(name: str, rest: Tensor, factor: float) -> None:
        if name in seen:
            seen[name].rest, seen[name].factor = told_apart(rest), factor
            if stop and complete():
                raise ReachedError(hidden)

    follow = _Additions(hidden, found)

    def reads(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if name in seen:
            seen[name].runs += 1
            return
        seen[name] = Seen(x=told_apart(x), order=len(seen), key=(x.data_ptr(), x.shape, x._version))
        if stop and complete():
            raise ReachedError(hidden)

    def writes(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        follow.begin(name, output)

    handles = [_pre(module, name, reads) for name, module in linears.items()]
    handles += [_post(linears[name], name, writes) for name in added]
    try:
        with follow if added else nullcontext():
            return seen, layers.run(index, ids, hidden)
    finally:
        for handle in handles:
            handle.remove()


def _pre(module: nn.Module, name: str, call: Callable[..., None]) -> Any:
    return module.register_forward_pre_hook(lambda own, args: call(name, own, args))


def _post(module: nn.Module, name: str, call: Callable[..., None]) -> Any:
    return module.register_forward_hook(lambda own, args, output: call(name, own, args, output))


def reading_order(layers: Layers, index: int, ids: Tensor, hidden: Tensor, linears: Mapping[str, nn.Module]) -> list[Readers]:
    """The linears of a group by what they read, in the order in which they run; those that do not run on these tokens come last."""
    seen, _ = observe(layers, index, ids, hidden, linears, added=list(linears), stop=False)
    runs: dict[tuple[Any, ...], list[str]] = {}
    for name, own in sorted(seen.items(), key=lambda item: item[1].order):
        runs.setdefault(own.key, []).append(name)
    found = []
    for names in runs.values():
        first = seen[names[0]]
        per_token = all(seen[name].runs == 1 for name in names) and first.x.shape[:-1] == hidden.shape[:-1]
        added = tuple(name for name in names if seen[name].rest is not None and per_token)
        found.append(Readers(names=tuple(names), added=added, per_token=per_token))
    silent = [name for name in linears if name not in seen]
    return [*found, *(Readers(names=(name,), added=(), per_token=False) for name in silent)]
