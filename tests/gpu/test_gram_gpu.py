"""Grams of 16-bit tokens on a GPU against float64 on the CPU."""

import pytest
import torch

from roundel.linalg.gram import add_gram, symmetrise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 256, 600])
def test_sixteen_bit_tokens_are_summed_in_float32(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(512, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    total = torch.zeros(width, width, device="cuda")
    add_gram(total, x.cuda())
    exact = x.double().T @ x.double()
    torch.testing.assert_close(symmetrise(total.cpu()).double(), exact, rtol=1e-5, atol=1e-4)
