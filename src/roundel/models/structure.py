"""Which linears of a model read and write its residual stream, and which rows are values of attention heads.

The structure is found, not looked up by names: one forward pass over single tokens shows which linears read which norm, which one writes
what is added to the stream, and - attention over one token passes its value on - which rows of which linear are the values of a head.
What is not made of layers `x + f(norm(x))` is refused.

Cost: one forward pass over eight single tokens, whose inputs and outputs of all modules are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from roundel.errors import SchemeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Block", "Structure", "find_structure", "norm_scale", "random_tokens"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A norm on the residual stream, the linears that read it, and the one whose output is added to the stream.

    `values` are, for each head that the writer reads, the linear and the first row that its values come from; empty: this is no attention.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str
    values: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What a rotation of the residual stream and of the values has to know, by names of modules."""

    embedding: str
    blocks: tuple[Block, ...]
    norm: str
    head: str
    head_dim: int


def find_structure(model: PreTrainedModel, *, values: bool) -> Structure:
    """Finds what reads and writes the residual stream, and which rows are values if they are asked for.

    Raises:
        SchemeError: the model is not made of layers of the form `x + f(norm(x))`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = {module: name for name, module in model.named_modules()}
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or not {embedding, head} <= names.keys():
        raise _refused(model, "it has no embedding and output head of the usual kind")
    layers = _layers(model)
    for name, module in model.named_modules():
        inside = name.startswith(tuple(f"{layer}." for layer in layers))
        if inside and (isinstance(module, nn.ModuleList) or any(p.ndim == 3 for p in module.parameters(recurse=False))):
            raise _refused(model, f"{name} looks like a mixture of experts, which is not supported yet")
        if isinstance(module, nn.LayerNorm):
            raise _refused(model, f"{name} is a LayerNorm, whose mean is another after a rotation (only RMSNorm commutes with it)")
    trace = _Trace(model, layers)
    width = embedding.embedding_dim
    head_dim = _head_dim(model)
    stream = trace.outputs[names[embedding]]
    if next(iter(layers)) not in trace.inputs or not _is_multiple(trace.inputs[next(iter(layers))], stream):
        raise _refused(model, "what enters the first layer is not the embedding alone")
    stream, blocks = trace.inputs[next(iter(layers))], []
    for name, layer in layers.items():
        if trace.calls.get(name) != 1 or not torch.equal(trace.inputs[name], stream):
            raise _refused(model, f"{name} does not read what the layer before it returns, once")
        found = _blocks(model, trace, name, layer, width, head_dim)
        if values and not any(block.values for block in found):
            raise _refused(model, f"in {name} the rows of the values of each head were not found")
        blocks += found
        stream = trace.outputs[name]
    last = [name for name, module in model.named_modules() if _is_norm(module, width) and name in trace.inputs]
    last = [name for name in last if torch.equal(trace.inputs[name], stream)]
    if len(last) != 1 or not torch.equal(trace.outputs[last[0]], trace.inputs[names[head]]):
        raise _refused(model, "between the last layer and the output head is something other than one norm")
    norm_scale(model, last[0])
    return Structure(embedding=names[embedding], blocks=tuple(blocks), norm=last[0], head=names[head], head_dim=head_dim)


def norm_scale(model: PreTrainedModel, name: str) -> tuple[Float[Tensor, " width"], float]:
    """What an RMSNorm multiplies by, in float64, and the value of its parameter that stands for 1; verified on random vectors.

    Raises:
        SchemeError: it is no RMSNorm with its weight, or 1 + its weight.
    """
    module, weight = model.get_submodule(name), model.get_parameter(f"{name}.weight")
    generator = torch.Generator().manual_seed(0)
    x = (1000 * torch.randn(4, len(weight), generator=generator) + 500).to(weight.device)  # so large that no epsilon matters
    unit = x.double() * x.double().square().mean(dim=-1, keepdim=True).rsqrt()
    for scale, neutral in ((weight.double(), 1.0), (1 + weight.double(), 0.0)):
        if torch.allclose(module(x).double(), unit * scale, rtol=1e-4, atol=1e-4 * scale.abs().max().item()):
            return scale, neutral
    raise _refused(model, f"{name} ({type(module).__name__}) is no RMSNorm")


def random_tokens(model: PreTrainedModel, sequences: int, length: int) -> Tensor:
    """Always the same ones, where the model is."""
    size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size, (sequences, length), generator=generator).to(next(model.parameters()).device)


class _Trace:
    """What went into and came out of the modules of a model in one pass over single tokens, as `(tokens, width)`, in order of execution."""

    def __init__(self, model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        handles = []
        for name, module in model.named_modules():
            if name in layers or not list(module.children()):
                handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        try:
            model(input_ids=random_tokens(model, 8, 1), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            result = output[0] if isinstance(output, tuple) else output
            self.calls[name] = self.calls.get(name, 0) + 1
            if given is not None and isinstance(result, Tensor):
                self.inputs[name] = given.detach().reshape(given.shape[0], -1).clone()
                self.outputs[name] = result.detach().reshape(result.shape[0], -1).clone()

        return hook


def _refused(model: PreTrainedModel, reason: str) -> SchemeError:
    return SchemeError(f"rotations cannot be fused into {model.config.model_type}: {reason}; use --rotate none")


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder layers by name."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1 or not len(outer[0][1]):
        raise _refused(model, f"expected one list of decoder layers, found {len(outer)}")
    return {f"{outer[0][0]}.{index}": layer for index, layer in enumerate(outer[0][1])}


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether it could be a norm over the residual stream."""
    own = dict(module.named_parameters())
    return own.keys() == {"weight"} and own["weight"].shape == (width,)


def _blocks(model: PreTrainedModel, trace: _Trace, prefix: str, layer: nn.Module, width: int, head_dim: int) -> list[Block]:
    """The parts `x + c f(norm(x))` of a layer, in order."""
    linears = [f"{prefix}.{name}" for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    linears = [name for name in linears if trace.calls.get(name) == 1 and name in trace.inputs]
    norms = {f"{prefix}.{name}" for name, module in layer.named_children() if _is_norm(module, width)}
    order = [name for name in trace.inputs if name in norms]
    for norm in order:
        if any(torch.equal(trace.inputs[norm], trace.outputs[name]) for name in linears):
            raise _refused(model, f"{norm} normalises what a sublayer adds to the residual stream, which does not commute with a rotation")
        norm_scale(model, norm)
    if not order or not torch.equal(trace.inputs[order[0]], trace.inputs[prefix]):
        raise _refused(model, f"{prefix} does not begin with a norm of its input")
    found = []
    stations = [*(trace.inputs[norm] for norm in order), trace.outputs[prefix]]
    for norm, start, end in zip(order, stations, stations[1:], strict=False):
        readers = tuple(name for name in linears if torch.equal(trace.inputs[name], trace.outputs[norm]))
        writers = [name for name in linears if trace.outputs[name].shape == start.shape and _is_sum(end, start, trace.outputs[name])]
        if not readers or len(writers) != 1:
            raise _refused(model, f"no linear was found that reads {norm}, or not one that writes what is added to the residual stream")
        values = _value_rows(trace, readers, writers[0], head_dim)
        found.append(Block(norm=norm, readers=readers, writer=writers[0], values=values))
    return found


def _value_rows(trace: _Trace, readers: Iterable[str], writer: str, head_dim: int) -> tuple[tuple[str, int], ...]:
    """For each head in the writer's input the linear and the first of its rows with just these outputs; nothing unless all have one."""
    readers = [name for name in readers if trace.outputs[name].shape[1] % head_dim == 0]
    if trace.inputs[writer].shape[1] % head_dim or not readers:
        return ()
    heads = _pieces(trace.inputs[writer], head_dim)
    rows = [(name, start) for name in readers for start in range(0, trace.outputs[name].shape[1], head_dim)]
    given = torch.cat([_pieces(trace.outputs[name], head_dim) for name in readers])
    apart = torch.cdist(heads, given, compute_mode="donot_use_mm_for_euclid_dist")
    fits = apart <= 1e-4 * torch.linalg.vector_norm(heads, dim=1, keepdim=True)
    if not (fits.sum(dim=1) == 1).all():
        return ()
    return tuple(rows[int(row)] for row in fits.int().argmax(dim=1))


def _pieces(x: Float[Tensor, "tokens width"], size: int) -> Float[Tensor, "pieces features"]:
    """Consecutive columns, `size` of them in each piece, of all tokens."""
    pieces: Tensor = x.unflatten(1, (-1, size)).transpose(0, 1).flatten(1).double()
    return pieces


def _is_multiple(y: Tensor, x: Tensor) -> bool:
    return x.shape == y.shape and _is_sum(y, torch.zeros_like(y), x)


def _is_sum(end: Tensor, start: Tensor, added: Tensor) -> bool:
    """Whether `end = start + c added` for some number `c > 0`, in float32."""
    change, added = end.double() - start.double(), added.double()
    factor = (change * added).sum() / added.square().sum()
    rest = torch.linalg.vector_norm(change - factor * added)
    rounding = 1e-4 * torch.linalg.vector_norm(change) + 1e-6 * torch.linalg.vector_norm(end.double())
    return bool(factor > 0) and bool(rest <= rounding)
