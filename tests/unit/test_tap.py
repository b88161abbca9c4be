"""Hooks that come and go, and what they refuse."""

from types import SimpleNamespace

import pytest
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


class Twice(nn.Module):
    """A linear that runs twice, or reads something that is no sequence of tokens."""

    def __init__(self, *, pooled: bool) -> None:
        super().__init__()
        self.embedding, self.linear, self.pooled = nn.Embedding(5, 4), nn.Linear(4, 4), pooled

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        return SimpleNamespace(logits=self.linear(hidden.mean(1)) if self.pooled else self.linear(self.linear(hidden)))


@pytest.mark.parametrize(("pooled", "message"), [(True, r"linear: the input has shape \(3, 4\)"), (False, "linear: the linear runs twice")])
def test_linears_without_one_input_per_token_are_refused(pooled: bool, message: str) -> None:
    model = Twice(pooled=pooled)
    with pytest.raises(ModelError, match=message), tapped(model, {"linear": model.linear}, lambda _n, _g: None):
        backward(model, random_tokens(3, 2, vocabulary=5), 0)
