"""The two ends of a model, embedding and output head: which modules they are, and whether they are one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from roundel.models.checkpoint import Checkpoint

__all__ = ["End", "ends_of", "head_of_its_own"]


@dataclass(frozen=True, kw_only=True)
class End:
    """A matrix of a row for each token."""

    name: str
    """Of its module; of tied ones, the embedding's."""
    embeds: bool
    """Whether rows are looked up by token."""
    heads: bool
    """Whether its product with the last hidden state gives the logits."""

    @property
    def role(self) -> Literal["embedding", "head"]:
        """As users know it; what is both is most sensitive as the head."""
        return "embedding" if self.embeds and not self.heads else "head"


def ends_of(model: PreTrainedModel, checkpoint: Checkpoint) -> list[End]:
    """Those that are stored as one matrix each: a tied model has one, which is both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = {id(module): name for name, module in model.named_modules()}
    tied = isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear) and head.weight is embedding.weight
    found = []
    if isinstance(embedding, nn.Embedding):
        found.append(End(name=names[id(embedding)], embeds=True, heads=tied))
    if isinstance(head, nn.Linear) and not tied:
        found.append(End(name=names[id(head)], embeds=False, heads=True))
    return [end for end in found if (checkpoint.weight_of(end.name) or "").endswith(".weight")]


def head_of_its_own(model: Any) -> list[str]:
    """The output head, by name, if it is a linear without bias whose weight is not the embedding's; of a model without weights, too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None or model.config.get_text_config().tie_word_embeddings:
        return []
    return [name for name, module in model.named_modules() if module is head and head.weight is not getattr(embedding, "weight", None)]
