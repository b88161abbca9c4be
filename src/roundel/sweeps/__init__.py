"""Going over a model one group of decoder layers at a time: forward, backward, and what each linear sees on the way."""

from roundel.sweeps.gradients import Visit, forward, gradient_visits, head_gradients, safe_batch_size
from roundel.sweeps.hidden import HiddenStates, HiddenStore
from roundel.sweeps.layers import Layers, OnDemand

__all__ = [
    "HiddenStates",
    "HiddenStore",
    "Layers",
    "OnDemand",
    "Visit",
    "forward",
    "gradient_visits",
    "head_gradients",
    "safe_batch_size",
]
