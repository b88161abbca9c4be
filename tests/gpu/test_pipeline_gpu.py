"""The whole job on a GPU."""

import json

import pytest
import torch

import roundel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TEXT = {"calibration": "stdlib", "eval_data": "stdlib-heldout", "sequences": 64, "seq_len": 256, "eval_sequences": 16}


@pytest.mark.parametrize("scheme", ["int3-g64", "trellis2"])
def test_the_demo_model_loses_as_little_as_on_the_cpu(tmp_path, scheme: str) -> None:
    result = roundel.quantize("demo", output=tmp_path / "out", scheme=scheme, device="cuda", dtype="float32", **TEXT)
    assert 0 < result.report.kl_mean < {"int3-g64": 0.06, "trellis2": 0.17}[scheme]
    predicted = result.details["predicted_kl"]["predicted_over_measured"]
    assert 0.5 < predicted < 1.5


def test_bits_for_each_linear(tmp_path) -> None:
    result = roundel.quantize(
        "demo", output=tmp_path / "out", scheme="int3-g64", bits=3.5, device="cuda", dtype="float32", **(TEXT | {"sequences": 128})
    )
    assert result.details["bits_per_weight"]["quantized"] <= 3.5
    allocation = json.loads((tmp_path / "out" / "roundel.json").read_text())["allocation"]
    assert 0 < allocation["predicted_kl"] <= allocation["uniform"]["predicted_kl"]


def test_bfloat16(tmp_path) -> None:
    result = roundel.quantize("demo", output=tmp_path / "out", scheme="int4-g64", device="cuda", dtype="bfloat16", **TEXT)
    assert 0 < result.report.kl_mean < 0.03
