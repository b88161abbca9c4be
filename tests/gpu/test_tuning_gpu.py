"""Tuning on a GPU, in the type in which models run there and in float32."""

from pathlib import Path

import pytest
import torch

import roundel
from roundel.artifacts.checkpoints import read

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TEXT = {"calibration": "stdlib", "eval_data": "stdlib-heldout", "sequences": 128, "seq_len": 256, "eval_sequences": 32, "device": "cuda"}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, float]:
    """A type, a checkpoint that is not tuned, and its KL."""
    output = tmp_path_factory.mktemp(request.param) / "plain"
    result = roundel.quantize("demo", output=output, scheme="int3-g64", format="native", dtype=request.param, prefix_aware=False, **TEXT)
    return request.param, output, result.report.kl_mean


@pytest.mark.parametrize(("method", "steps", "share"), [("end-to-end", 200, 0.85), ("blocks", 60, 0.95)])
def test_the_loss_falls(plain: tuple[str, Path, float], tmp_path: Path, method: str, steps: int, share: float) -> None:
    dtype, directory, before = plain
    result = roundel.tune(directory, output=tmp_path / "tuned", tune=method, tune_steps=steps, device="cuda", dtype=dtype)
    found = result.details["tuning"]
    assert found["held_out_kl"]["after"] < found["held_out_kl"]["before"]
    assert result.report.kl_mean < share * before
    assert found["other_parameters"] == (22 if method == "end-to-end" else 0)
    assert set(read(tmp_path / "tuned").rounded) == set(read(directory).rounded)
