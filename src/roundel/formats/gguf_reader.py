"""GGUF files as they come: what they say of their own sizes is not believed.

The gguf package takes what lies beyond the end of a file for empty values, of which a damaged length can promise 2^63: it goes on until
memory ends. Here nothing is read that the file does not have.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np

__all__ = ["Reader"]


class Reader(gguf.GGUFReader):
    """gguf's reader, whose every access goes through `_get`.

    Raises:
        ValueError, KeyError, IndexError: of anything that is damaged (`errors.damaged` makes one error of it).
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if not 0 <= int(offset) <= int(offset) + np.dtype(dtype).itemsize * int(count) <= len(self.data):
            raise ValueError("it ends before what it says that it holds")
        return super()._get(offset, dtype, count, override_order)
