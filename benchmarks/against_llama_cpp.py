"""llama.cpp's own quantizer and its named mixes beside files of ours, in bytes and KL: by llama.cpp's tool, and by Transformers.

    make .venv-llama/installed
    .venv-llama/bin/python benchmarks/against_llama_cpp.py MODEL --calibration TEXT --heldout TEXT [--ours FILE ...] [-o FILE.json]

The original is written as a GGUF in float16 by Roundel, with nothing rounded. `llama-imatrix` measures the calibration text on it,
`llama-quantize` makes each mix with that, `llama-perplexity` compares each file with the original's: float16 keys and values, activations
rounded to 8 bits as the engine does, reference probabilities in 16 bits, on the second half of each window; its standard error is over
tokens. Transformers compares the weights alone, on the same tokens and positions, in float32 with log-softmax and KL in float64, with the
original as it was stored; its standard error is over windows. Bytes are of the whole file.

`error` is, by type, the squared error of its weights over their squares: a type of far less than its neighbours holds the grid that the
model was once stored in, and its rows are no fair test.

Cost: one pass over the calibration and, for each file, two over the held-out windows, in one thread; the original's logits are in memory
(float32) and its probabilities on the disk. Seconds are of the processor. Not done: mixtures of experts.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import read_json
from gguf import GGUFReader, dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM

from roundel.formats import gguf
from roundel.models import locate
from roundel.models.checkpoint import Checkpoint
from roundel.stages.report import versions
from roundel.store import write_json

TOOLS = Path(sys.prefix) / "llama.cpp"
MIXES = "q2_k_s,q2_k,q3_k_s,q3_k_m,q4_k_s,q4_k_m,iq2_xs,iq3_xxs,iq4_xs"


def tool(name: str, *arguments: object) -> tuple[str, float]:
    """What a tool of llama.cpp says, and how many seconds of the processor it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [str(TOOLS / name), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = done.stdout + done.stderr
    if done.returncode:
        sys.exit(f"{' '.join(line)}: exit {done.returncode}\n{said[-2000:]}")
    return said, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measured_by_llama_cpp(file: Path, base: Path, length: int) -> dict[str, float]:
    options = ["-c", length, "-b", length, "-t", 1]
    said, seconds = tool("llama-perplexity", "-m", file, "--kl-divergence-base", base, "--kl-divergence", *options)
    found = {}
    for key, label in {"kl": "Mean +KLD", "same_top_percent": "Same top p"}.items():
        match = re.search(rf"{label} *: *(-?[\d.]+) ± *([\d.]+)", said)
        if match is None:
            sys.exit(f"llama-perplexity said nothing of {label!r}:\n{said[-2000:]}")
        found |= {key: float(match[1]), f"{key}_stderr": float(match[2])}
    return found | {"seconds": seconds}


class Original:
    """The model as it is stored, and its logits at the positions that llama.cpp's tool compares."""

    def __init__(self, directory: Path) -> None:
        self.config = read_json(directory / "config.json")
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.checkpoint = Checkpoint.open(directory).of(self.model)
        self.directory = directory
        self.ids = torch.empty(0, 0, dtype=torch.long)
        self.reference: list[Tensor] = []

    def write(self, path: Path) -> None:
        """As a GGUF with nothing rounded."""
        about = {"tensors": list(self.checkpoint), "read": self.checkpoint.read, "name": self.directory.name}
        gguf.write(path, model=self.directory, rounded={}, **about)

    def take_windows(self, base: Path, file: Path) -> None:
        """The tokens as the tool has cut them, with the token that the file has it put first; then the reference."""
        with base.open("rb") as stored:
            if stored.read(8) != b"_logits_":
                sys.exit(f"{base} holds no probabilities of llama-perplexity")
            length, _vocabulary, count = np.fromfile(stored, dtype=np.int32, count=3).tolist()
            ids = np.fromfile(stored, dtype=np.int32, count=length * count).reshape(count, length)
        self.ids = torch.from_numpy(ids).long()
        fields = GGUFReader(file).fields
        if fields["tokenizer.ggml.add_bos_token"].contents():
            self.ids[:, 0] = fields["tokenizer.ggml.bos_token_id"].contents()
        self.reference = [self.logits(window) for window in self.ids]

    @torch.no_grad()
    def logits(self, window: Tensor) -> Tensor:
        """Of the second half; the last position has nothing to predict."""
        found: Tensor = self.model(window[None], logits_to_keep=len(window) - len(window) // 2).logits[0, :-1]
        return found

    def measured(self, file: Path) -> dict[str, float]:
        """KL with the weights of a file."""
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        weights = gguf.read(file, config=self.config, tensors=list(self.checkpoint))
        self.model.load_state_dict(weights, strict=False)  # without a tied head
        means = []
        for window, before in zip(self.ids, self.reference, strict=True):
            log_p, log_q = (each.double().log_softmax(-1) for each in (before, self.logits(window)))
            means.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        self.model.load_state_dict(state)
        each = torch.stack(means)
        return {"kl": each.mean().item(), "kl_stderr": (each.std() / len(each) ** 0.5).item()}


def by_type(file: Path, original: Path) -> dict[str, dict[str, float]]:
    """Of the matrices: how many weights have a type, and their squared error over their squares."""
    before = {each.name: each for each in GGUFReader(original).tensors}
    weights: defaultdict[str, int] = defaultdict(int)
    sums: defaultdict[str, Any] = defaultdict(lambda: np.zeros(2))
    for tensor in GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            W, W_hat = (dequantize(each.data, each.tensor_type).astype(np.float64) for each in (before[tensor.name], tensor))
            weights[tensor.tensor_type.name] += W.size
            sums[tensor.tensor_type.name] += ((W - W_hat) ** 2).sum(), (W**2).sum()
    return {kind: {"weights": weights[kind], "error": error / square} for kind, (error, square) in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="A directory, or demo.")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--mixes", default=MIXES)
    parser.add_argument("--ours", type=Path, nargs="*", default=[], metavar="FILE", help="GGUFs of Roundel, of the same model.")
    parser.add_argument("--windows", type=int, default=32, help="Held-out ones.")
    parser.add_argument("--chunks", type=int, default=32, help="Calibration windows for the importance matrix.")
    parser.add_argument("--tokens", type=int, default=512, help="In each window.")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if not TOOLS.is_dir():
        parser.error(f"no llama.cpp in {TOOLS}: run this with .venv-llama/bin/python, which make .venv-llama/installed makes")
    torch.set_num_threads(1)
    original = Original(locate(given.model))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        source, base, matrix = (Path(folder) / name for name in ("original.gguf", "original.kld", "imatrix.gguf"))
        original.write(source)
        options = ["-m", source, "-c", given.tokens, "-b", given.tokens, "-t", 1]
        _, imatrix_seconds = tool("llama-imatrix", *options, "-f", given.calibration, "--chunks", given.chunks, "--no-ppl", "-o", matrix)
        _, base_seconds = tool("llama-perplexity", *options, "-f", given.heldout, "--chunks", given.windows, "--save-all-logits", base)
        original.take_windows(base, source)
        if len(original.ids) < given.windows:
            sys.exit(f"{given.heldout} has {len(original.ids)} windows of {given.tokens} tokens, not {given.windows}")
        release, _ = tool("llama-perplexity", "--version")
        content = {
            "kind": "against-llama-cpp",
            "model": Path(given.model).name,
            "calibration": {"text": given.calibration.name, "windows": given.chunks},
            "heldout": {"text": given.heldout.name, "windows": given.windows},
            "tokens": given.tokens,
            "imatrix_seconds": imatrix_seconds,
            "base_seconds": base_seconds,
            "versions": {"llama.cpp": release.split()[1], **versions()},
            "rows": rows,
        }

        def add(name: str, file: Path, **details: Any) -> None:
            row = {"file": name, **details, "bytes": file.stat().st_size, "types": by_type(file, source)}
            row |= {"llama_cpp": measured_by_llama_cpp(file, base, given.tokens), "transformers": original.measured(file)}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if given.output is not None:
                write_json(given.output, content)

        add("f16", source)
        for mix in given.mixes.split(","):
            target = Path(folder) / f"{mix}.gguf"
            _, seconds = tool("llama-quantize", "--imatrix", matrix, source, target, mix.upper(), 1)
            add(mix, target, quantize_seconds=seconds)
            target.unlink()
        for file in given.ours:
            add(f"ours: {file.parent.name}", file)


if __name__ == "__main__":
    main()
