"""Dense bit streams, against their definition and against compressed-tensors' own."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from roundel.formats.bits import pack_rows, unpack_rows

widths = pytest.mark.parametrize("bits", range(2, 9))


def random_codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    return torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int16)


@widths
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_unpack_inverts_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, bits, seed)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack_rows(words, bits, columns), codes)


@widths
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 96, 130])
def test_words_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = random_codes(4, columns, bits, seed=columns)
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    words = pack_rows(codes, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, signed.shape), signed)


@widths
def test_code_i_is_at_bit_i_times_bits(bits: int) -> None:
    codes = random_codes(2, 50, bits, seed=0)
    for row, words in zip(codes.tolist(), pack_rows(codes, bits).tolist(), strict=True):
        stream = sum((word % 2**32) << (32 * k) for k, word in enumerate(words))
        assert stream == sum(code << (bits * i) for i, code in enumerate(row))


def test_more_rows_than_are_expanded_at_a_time() -> None:
    codes = random_codes(600, 7, 3, seed=1)
    assert torch.equal(unpack_rows(pack_rows(codes, 3), 3, 7), codes)
