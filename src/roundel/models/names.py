"""Which stored tensor becomes which parameter, as Transformers itself finds it out when it loads a model.

Checkpoints are stored under names that are older than the code that reads them, or shared with other engines: prefixes differ between a
base model, a causal one and a wrapper with a vision tower, and blocks were renamed. Transformers keeps a list of such changes for each
architecture, and of others that change values too (experts that are stacked, halves that are joined). Only the former are names.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["stored_names"]


def stored_names(model: nn.Module, stored: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """By parameter or buffer the name of the stored tensor that has its values; and of those that are made of several, or of parts of one,
    all of theirs, in the order of the names."""
    if not isinstance(model, PreTrainedModel):
        return {name: name for name in stored}, {}
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    names: dict[str, str] = {}
    made: dict[str, list[str]] = {}
    for name in sorted(stored):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            names[target] = name
        else:
            made.setdefault(target, []).append(name)
    return names, made
