"""The share of a model's weights that a quantization reaches."""

import pytest
import torch
from torch import nn

from roundel.models.coverage import coverage_of


class Layer(nn.Module):
    """A linear, another one, a norm, and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.norm = nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)
        self.experts = nn.ParameterDict({"up": nn.Parameter(torch.zeros(2, 3, 4)), "up_bias": nn.Parameter(torch.zeros(2, 3))})


def test_matrices_of_decoder_layers_are_counted_by_reason() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "layers": nn.ModuleList([Layer(), Layer()]), "tower": Layer()})
    quantized, skipped = ["layers.0.one", "layers.1.one", "layers.0.other"], {"layers.1.other": "excluded by pattern"}
    found = coverage_of(model, ["layers.0", "layers.1"], quantized, skipped)
    assert (found.weights, found.quantized) == (2 * 72, 72)
    assert list(found.left.items()) == [("ParameterDict is no linear", 48), ("excluded by pattern", 24)]
    assert found.share == 0.5
    assert found.warning == (
        "only 50 % of the weights of the decoder layers' matrices are quantized; most of the rest, 33 %: ParameterDict is no linear"
    )
    assert found.as_json() == {"decoder_weights": 144, "quantized": 72, "share": 0.5, "left": dict(found.left)}


@pytest.mark.parametrize("layers", [["layers.0"], []])
def test_nothing_is_said_where_all_is_reached(layers) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
    found = coverage_of(model, layers, ["layers.0"], {})
    assert found.share == (1.0 if layers else 0.0)
    assert found.warning is None
