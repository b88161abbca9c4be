"""Hooks that come and go, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from oracles.tiny import backward, linears, random_tokens, tiny_llama
from roundel.errors import ModelError
from roundel.sweeps.tap import tapped
from roundel.types import LayerGrad


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def test_linears_with_one_input_share_it_and_others_do_not() -> None:
    model, seen = tiny_llama(), {}
    with tapped(model, linears(model), seen.__setitem__):
        backward(model, random_tokens(2, 4), 0)
    inputs = {name.removeprefix("model.layers.0."): grad.input for name, grad in seen.items()}
    assert inputs["self_attn.q_proj"] is inputs["self_attn.k_proj"] is inputs["self_attn.v_proj"]
    assert inputs["mlp.gate_proj"] is inputs["mlp.up_proj"]
    assert len({id(i) for name, i in inputs.items() if not name.startswith("model.")}) == 4
    assert len(seen) == 14


def test_hooks_and_requires_grad_are_put_back_even_after_an_error() -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}

    def consume(_name: str, _grad: LayerGrad) -> None:
        assert not any(p.requires_grad for p in model.parameters())
        raise ModelError("refused")

    with pytest.raises(ModelError, match=r"^model\.layers.*: refused$"), tapped(model, linears(model), consume):
        backward(model, random_tokens(1, 3), 0)
    assert hooks(model) == 0
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())


class Odd(nn.Module):
    """A linear that sees not each token once."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding, self.linear, self.kind = nn.Embedding(5, 4), nn.Linear(4, 4), kind

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        logits = {
            "twice": lambda: self.linear(self.linear(hidden)),
            "a use without gradient": lambda: self.linear(hidden) + self.linear(hidden + 1).detach(),
            "heads": lambda: self.linear(torch.stack([hidden, 2 * hidden], 1)).sum(1),
            "one head": lambda: self.linear(hidden[:, None]).squeeze(1),
            "not run": lambda: hidden,
            "run for nothing": lambda: (self.linear(hidden), hidden)[1],
            "flat": lambda: self.linear(hidden.flatten(0, 1)).unflatten(0, input_ids.shape),
            "some": lambda: hidden.index_add(1, torch.tensor([1]), self.linear(hidden[:, 1]).unsqueeze(1)),
        }[self.kind]()
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize(
    ("kind", "rows"),
    {"twice": 4, "a use without gradient": 2, "heads": 4, "one head": 2, "not run": 0, "run for nothing": 0, "flat": 2, "some": 1}.items(),
)
def test_rows_are_those_of_each_sequence_and_tokens_those_of_its_text(kind, rows, sequences) -> None:
    model, found, tokens = Odd(kind), list[tuple[str, LayerGrad]](), random_tokens(sequences, 2, vocabulary=5)
    if kind == "some" and sequences > 1:
        message = r"^linear: the input has shape \(3, 4\), in which 3 sequences of 2 tokens cannot be told apart; take one at a time"
        with pytest.raises(ModelError, match=message), tapped(model, {"linear": model.linear}, lambda _n, _g: None):
            backward(model, tokens, 0)
        return
    with tapped(model, {"linear": model.linear}, lambda name, grad: found.append((name, grad))):
        backward(model, tokens, 0)
    ((name, grad),) = found
    assert name == "linear"
    assert grad.input.x.shape == grad.g.shape == (sequences, rows, 4)
    assert grad.tokens == 2
    backward(model, tokens, 0)
    wanted = torch.zeros(4, 4) if model.linear.weight.grad is None else model.linear.weight.grad
    summed = sum(grad.weight_gradient(sequence) for sequence in grad.sequences())
    torch.testing.assert_close(summed, wanted)
    assert bool(wanted.any()) == (rows > 0)
