"""Checkpoint formats: pure functions between `RoundedWeight` and named tensors, and their metadata. No models, and no files but those of
`gguf` and `imatrix`, which the gguf package writes.

A new format of Hugging Face directories is one file with a `CheckpointFormat`, and one entry here.
"""

from roundel.formats.auto_round import AutoRound
from roundel.formats.awq import Awq
from roundel.formats.base import CheckpointFormat
from roundel.formats.compressed_tensors import CompressedTensors
from roundel.formats.exl3 import Exl3
from roundel.formats.gptq import Gptq
from roundel.formats.mlx import Mlx
from roundel.formats.native import Native

__all__ = ["FORMATS", "CheckpointFormat"]

FORMATS: dict[str, CheckpointFormat] = {
    form.name: form for form in (CompressedTensors(), Native(), Gptq(), Awq(), AutoRound(), Mlx(), Exl3())
}
