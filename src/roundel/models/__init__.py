"""The only package that knows Transformers' internals: finding, loading and naming."""

from roundel.models.checkpoint import Checkpoint
from roundel.models.linears import Selection, select_linears
from roundel.models.load import load_model, load_tokenizer, locate

__all__ = ["Checkpoint", "Selection", "load_model", "load_tokenizer", "locate", "select_linears"]
