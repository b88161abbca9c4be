"""Models small enough for their exact Fisher."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from roundel.curvature import collect, parse_curvature
from roundel.curvature.collect import factors_of
from roundel.sweeps import Layers
from roundel.sweeps.labels import Labels
from roundel.types import Factors, TokenBatch

VOCABULARY = 11


def tiny_llama(seed: int = 0, *, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """Two layers of width 16, with weights large enough that the output depends on the input."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


class LinearChain(nn.Module):
    """An embedding and linears without anything between them; the last one gives the logits."""

    def __init__(self, weights: list[Tensor], embedding: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embedding)
        self.chain = nn.ModuleList(nn.Linear(W.shape[1], W.shape[0], bias=False) for W in weights)
        for linear, W in zip(self.chain, weights, strict=True):
            linear.weight.data = W

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        for linear in self.chain:
            hidden = linear(hidden)
        return SimpleNamespace(logits=hidden)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}


def random_tokens(sequences: int, length: int, *, seed: int = 0, vocabulary: int = VOCABULARY) -> TokenBatch:
    ids = torch.randint(vocabulary, (sequences, length), generator=torch.Generator().manual_seed(seed))
    return TokenBatch(ids=ids, sequence_ids=tuple(range(sequences)))


def repeated(tokens: TokenBatch, times: int) -> TokenBatch:
    """One sequence under many sequence ids: many draws of its labels."""
    return TokenBatch(ids=tokens.ids.expand(times, -1), sequence_ids=tuple(range(times)))


def label_gradient(logits: Tensor, tokens: TokenBatch, seed: int, labels: str = "sampled") -> Tensor:
    """What `Labels` sends back from the logits of whole sequences."""
    whole = slice(0, tokens.ids.shape[1])
    return torch.stack([Labels(tokens, row, seed, labels).gradient(own, whole) for row, own in enumerate(logits)])


def backward(model: nn.Module, tokens: TokenBatch, seed: int, labels: str = "sampled") -> None:
    """A forward and backward pass of the whole model, all sequences together."""
    logits = model(input_ids=tokens.ids, use_cache=False).logits
    logits.backward(label_gradient(logits.detach(), tokens, seed, labels))


def collected(model: nn.Module, chosen: dict[str, nn.Linear], tokens: TokenBatch, spec: str, **settings: Any) -> dict[str, Factors]:
    """Factors of all linears by the estimator of that name."""
    return factors_of(collect(Layers(model), chosen, tokens, parse_curvature(spec), **settings))


def dense_fisher(model: nn.Module, weights: list[nn.Parameter], ids: Tensor) -> Tensor:
    """`sum_t J_t^T (diag p_t - p_t p_t^T) J_t` of one sequence, over the flattened weights, by one backward pass for each logit."""
    for W in weights:
        W.requires_grad_(True)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    size = sum(W.numel() for W in weights)
    total = torch.zeros(size, size, dtype=torch.float64)
    for position in logits:
        rows = [torch.autograd.grad(z, weights, retain_graph=True) for z in position]
        J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
        p = position.detach().double().softmax(-1)
        total += J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    for W in weights:
        W.requires_grad_(False)
    return total
