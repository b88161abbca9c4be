"""Shapes stated in annotations are checked while the tests run; nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

install_import_hook(["roundel.types", "roundel.linalg", "roundel.grids", "roundel.rounding", "roundel.formats.bits"], "beartype.beartype")
