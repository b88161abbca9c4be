"""Quantized models that others have made: their weights as ours, and new ones back into the very bytes.

A reader finds in the files of a model the weights that its grids know (`Slot`), by the names that the original gives them. What it does not
know stays as it is, byte for byte. Whether bytes were understood is not assumed: a weight is taken only if packing what was read gives the
bytes again, or, for GGUF, if the package `gguf` reads the same values.
"""

from roundel.given.base import Given, Slot
from roundel.given.open import open_given
from roundel.given.scaled import scales_of

__all__ = ["Given", "Slot", "open_given", "scales_of"]
