"""Block rows of Gram matrices: every rectangle of the lower triangle once, for the strips of each device."""

import pytest
import torch

from roundel.linalg.gram import LEAF, STRIP, _rectangles


@pytest.mark.parametrize("device", list(STRIP))
@pytest.mark.parametrize("width", [1, 63, 64, 65, 255, 256, 257, 344, 511, 512, 600, 768, 1100, 2049])
def test_the_lower_triangle_is_covered_once(device: str, width: int) -> None:
    for leaf in (LEAF, 2 * STRIP[device]):
        covered = torch.zeros(width, width, dtype=torch.int8)
        for rows, columns in _rectangles(0, width, leaf, STRIP[device]):
            covered[rows, columns] += 1
        assert (covered.tril() == torch.ones(width, width).tril()).all()
        assert covered.max() == 1
