"""Other quantizers beside each other: one model, the same calibration tokens, bits and groups, and one measure.

    python benchmarks/peers/run.py MODEL --calibration SPEC [--eval-data SPEC] --group 64 --bits 3,4,2 --seeds 3 [--peers NAME[:METHOD] ...]
        -o FILE

Each peer has an environment of its own, `.venv-peers/NAME`, made from NAME.txt, and an adapter, NAME.py, which runs in it and leaves the
float32 values of the weights. Those are put into the original model here, and the KL is measured by Roundel's own code on held-out text
in float32. Two things are checked of every row: that exactly those linears were quantized that Roundel would quantize, and nothing else but
norms has changed; and that no group of a weight has more different values than its bits allow.

CPU seconds (user and system) are those of the adapter's process with one thread; `quantize_cpu_seconds` is the part of the quantization
itself, without imports and loading. FILE is saved after every row; rows that it has are not measured again, failed ones are.

What is too slow here can be done on a machine with a GPU and measured here: `--write-jobs DIR` writes the jobs, each a directory, and no
row; there, `python PEER.py JOB` does one in whatever environment has the peer; `--read-jobs DIR` takes the weights that they have left.
Such rows name their device, and their seconds are no CPU seconds of this machine: tables of times leave them out.
"""

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from roundel.artifacts.source import Source, load_source
from roundel.calibration import data_hash
from roundel.evaluate import compare_models
from roundel.formats import gguf, imatrix
from roundel.models import load_model
from roundel.progress import Silent
from roundel.recipes import Recipe
from roundel.stages.notes import Notes
from roundel.stages.report import versions
from roundel.stages.text import default_batch, split_text
from roundel.store import write_json

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / ".venv-peers"

METHODS: dict[str, dict[str, tuple[int, ...]]] = {
    "llm_compressor": dict.fromkeys(("rtn", "gptq", "gptq-mse", "awq"), (2, 3, 4)),
    "gptq_model": dict.fromkeys(("gptq", "gptaq"), (2, 3, 4)),
    "llamacpp": {
        "q2_k": (2,),
        "iq2_xs": (2,),
        "q3_k": (3,),
        "iq3_xxs": (3,),
        "q4_0": (4,),
        "q4_k": (4,),
        "iq4_nl": (4,),
        "iq4_xs": (4,),
    },
    "autoround": dict.fromkeys(("iters-50", "iters-200", "iters-1000"), (2, 3, 4)),
}
"""Each peer's methods, and the bits that they exist for. Those of llama.cpp are block types, listed beside the nearest number of bits."""

BLOCK_WIDTHS = {"q4_0": 32, "iq4_nl": 32}
"""Of llama.cpp's types; all others have blocks of 256."""

ROW = ("peer", "method", "bits", "group", "seed")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row to measure."""

    peer: str
    method: str
    bits: int
    group: int
    seed: int

    def as_json(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ROW}

    @property
    def name(self) -> str:
        """Of the job's directory, where it is done elsewhere."""
        return "-".join(str(value) for value in self.as_json().values())


class PeerError(Exception):
    """A peer could not do it; the text is what its row says."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-data")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-sequences", type=int, default=64)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--bits", type=lambda text: [int(part) for part in text.split(",")], default=[3, 4, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", default=list(METHODS), help="NAME, or NAME:METHOD")
    parser.add_argument("--timeout", type=int, default=7200, help="seconds that one row may take")
    parser.add_argument("--write-jobs", type=Path, help="for a machine with a GPU")
    parser.add_argument("--read-jobs", type=Path, help="that were done there")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    if given.write_jobs and any(name.partition(":")[0] == "llamacpp" for name in given.peers):
        parser.error("llama.cpp's quantizer has no use for a GPU: name other --peers")
    torch.set_num_threads(1)
    chosen = [
        (peer, method)
        for peer, methods in METHODS.items()
        for method in methods
        if peer in given.peers or f"{peer}:{method}" in given.peers
    ]
    todo = [
        Work(peer=peer, method=method, bits=bits, group=given.group, seed=seed)
        for seed in range(given.seeds)
        for bits in given.bits
        for peer, method in chosen
        if bits in METHODS[peer][method]
    ]
    settings = {
        "kind": "peers",
        "model": given.model if given.model == "demo" else f"MODELS/{Path(given.model).name}",
        "calibration": _spec(given.calibration),
        "eval_data": _spec(given.eval_data) if given.eval_data else None,
        "sequences": given.sequences,
        "seq_len": given.seq_len,
        "eval_sequences": given.eval_sequences,
        "group": given.group,
    }
    rows: list[dict[str, Any]] = []
    if given.output.exists():
        stored = json.loads(given.output.read_text(encoding="utf-8"))
        if changed := [key for key, value in settings.items() if stored[key] != value]:
            sys.exit(f"{given.output} was measured with another {', '.join(changed)}: give another file")
        rows = stored["rows"]
    base = Recipe(
        scheme=f"int4-g{given.group}",
        calibration=given.calibration,
        eval_data=given.eval_data,
        sequences=given.sequences,
        seq_len=given.seq_len,
        eval_sequences=given.eval_sequences,
    )
    source = load_source(given.model, base, "cpu", "float32")
    bench = Bench(source, base, given.timeout)
    settings |= {"heldout_sha256": data_hash(bench.heldout(0)), "linears": len(source.linears), "versions": bench.versions()}
    for work in todo:
        at = next((index for index, row in enumerate(rows) if all(row[key] == value for key, value in work.as_json().items())), len(rows))
        if at < len(rows) and not rows[at]["error"]:
            continue
        if given.write_jobs:
            bench.write(work, given.write_jobs)
            continue
        done = given.read_jobs and given.read_jobs / work.name
        if done and not (done / "result.json").exists():
            continue
        print(time.strftime("%H:%M:%S"), *work.as_json().values(), end=" ", flush=True)
        rows[at : at + 1] = [bench.measure(work, done)]
        print(rows[at]["error"] or f"KL {rows[at]['kl']:.5f}, {rows[at].get('quantize_cpu_seconds', math.nan):.1f} s", flush=True)
        write_json(given.output, {**settings, "rows": rows})
    wanted = {(work.peer, work.method, work.bits) for work in todo}
    print(table([row for row in rows if (row["peer"], row["method"], row["bits"]) in wanted]))


def _spec(text: str) -> str:
    return f"TEXT/{Path(text).name}" if Path(text).exists() else text


class Bench:
    """The original, the texts, and how a row is measured."""

    def __init__(self, source: Source, base: Recipe, timeout: int) -> None:
        self.source, self.base, self.timeout = source, base, timeout
        self.reference = source.model
        self.twin: nn.Module = load_model(source.path, device=torch.device("cpu"), dtype=torch.float32)
        self.state = {name: value.clone() for name, value in self.reference.state_dict().items()}
        self.length = source.length
        self.splits: dict[int, Any] = {}
        self.squares: dict[int, tuple[dict[str, Tensor], float]] = {}
        self.broken: dict[str, str] = {}

    def versions(self) -> dict[str, str]:
        return {"roundel": importlib.metadata.version("roundel"), **versions()}

    def split(self, seed: int) -> Any:
        if seed not in self.splits:
            recipe = Recipe(**{**self.base.as_json(), "seed": seed, "schemes": (), "include": (), "exclude": ()})
            self.splits[seed] = split_text(recipe, self.source, Notes(Silent()))
        return self.splits[seed]

    def heldout(self, seed: int) -> Any:
        return self.split(seed).heldout

    def write(self, work: Work, directory: Path) -> None:
        """A job for another machine, and the model beside it."""
        if not (directory / "model").exists():
            shutil.copytree(self.source.path, directory / "model")
        (directory / work.name).mkdir(exist_ok=True)
        self.prepare(work, directory / work.name, model="../model", device="cuda")

    def measure(self, work: Work, done: Path | None) -> dict[str, Any]:
        """The row of a job that is done here, or in `done` by another machine."""
        row: dict[str, Any] = {**work.as_json(), "version": self.version(work.peer), "error": None}
        if done:
            result = json.loads((done / "result.json").read_text(encoding="utf-8"))
            kept = {key: result[key] for key in ("device", "versions", "quantize_wall_seconds")}
            return row | kept | self.judge(work, done, result)
        with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
            directory = Path(scratch)
            try:
                python = self.environment(work.peer)
                before = self.prepare(work, directory)
                row |= self.run(work, python, directory)
                result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
                row["versions"] = result["versions"]
                for key, seconds in (("quantize_cpu_seconds", result["quantize_cpu_seconds"]), ("cpu_seconds", row["cpu_seconds"])):
                    row[key] = round(seconds + before, 2)
                row |= self.judge(work, directory, result)
            except PeerError as error:
                row["error"] = str(error)
        return row

    def version(self, peer: str) -> str:
        """Of the peer itself: the first of its requirements."""
        return (HERE / f"{peer}.txt").read_text(encoding="utf-8").split("\n")[0].partition("==")[2]

    def environment(self, peer: str) -> Path:
        """The peer's python; made if its requirements are not installed yet."""
        if peer in self.broken:
            raise PeerError(self.broken[peer])
        directory, wanted = ENVIRONMENTS / peer, (HERE / f"{peer}.txt").read_text(encoding="utf-8")
        stamp = directory / "installed.txt"
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            (ENVIRONMENTS / ".gitignore").write_text("*\n", encoding="utf-8")
            pip = [directory / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", HERE / f"{peer}.txt"]
            for command in ([sys.executable, "-m", "venv", directory], pip):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    self.broken[peer] = f"cannot be installed: {_reason(done.stderr)}"
                    raise PeerError(self.broken[peer])
            stamp.write_text(wanted, encoding="utf-8")
        return directory / "bin/python"

    def prepare(self, work: Work, directory: Path, model: str | None = None, device: str = "cpu") -> float:
        """Writes the job; returns the CPU seconds that calibration takes here, not in the peer."""
        tokens = self.split(work.seed).used
        path = model or str(self.source.path.absolute())
        job = {**work.as_json(), "model": path, "linears": list(self.source.linears), "device": device}
        (directory / "job.json").write_text(json.dumps(job), encoding="utf-8")
        save_file({"tokens": tokens.ids}, directory / "tokens.safetensors")
        if work.peer != "llamacpp":
            return 0.0
        width = BLOCK_WIDTHS.get(work.method, 256)
        if narrow := [name for name, linear in self.source.linears.items() if linear.in_features % width]:
            raise PeerError(f"blocks of {width} do not divide the width of {len(narrow)} of {len(self.source.linears)} linears")
        checkpoint = self.source.checkpoint
        read = lambda name: checkpoint.read(name).float()  # noqa: E731
        gguf.write(
            directory / "original.gguf", model=self.source.path, tensors=list(checkpoint), read=read, rounded={}, name="peer", dense="f32"
        )
        if work.seed not in self.squares:
            began = time.process_time()
            measured = self.mean_squares(tokens)
            self.squares[work.seed] = measured, time.process_time() - began
        squares, spent = self.squares[work.seed]
        names = imatrix.tensor_names(imatrix.architecture(self.source.config["model_type"]), squares)
        save_file({names[module]: value for module, value in squares.items()}, directory / "imatrix.safetensors")
        return spent

    @torch.no_grad()
    def mean_squares(self, tokens: Any) -> dict[str, Tensor]:
        """`E[x_j^2]` of every linear's input: llama.cpp's importance matrix."""
        modules = {name: module for name, module in self.reference.named_modules() if isinstance(module, nn.Linear) and ".layers." in name}
        sums = {name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in modules.items()}

        def adder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
                sums[name] += given[0].flatten(0, -2).square().sum(0)

            return add

        hooks = [module.register_forward_pre_hook(adder(name)) for name, module in modules.items()]
        for batch in tokens.split(default_batch(self.length)):
            self.reference(input_ids=batch.ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return {name: (total / tokens.ids.numel()).float() for name, total in sums.items()}

    def run(self, work: Work, python: Path, directory: Path) -> dict[str, Any]:
        """The adapter's process, on one thread."""
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
        environment = {**os.environ, **one, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        began = time.monotonic()
        with (directory / "log.txt").open("wb") as log:
            child = subprocess.Popen(
                [python, HERE / f"{work.peer}.py", directory], stdout=log, stderr=subprocess.STDOUT, cwd=directory, env=environment
            )
            status, usage = 0, None
            while usage is None:
                done, status, used = os.wait4(child.pid, os.WNOHANG)
                if done:
                    usage = used
                elif time.monotonic() - began > self.timeout:
                    child.kill()
                    os.wait4(child.pid, 0)
                    child.returncode = -9
                    raise PeerError(f"not done after {self.timeout} s")
                else:
                    time.sleep(0.2)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode or not (directory / "result.json").exists():
            text = (directory / "log.txt").read_text(encoding="utf-8", errors="replace")
            print(f"\n{text[-2000:]}", file=sys.stderr)
            raise PeerError(f"exit status {child.returncode}: {_reason(text)}")
        return {
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "wall_seconds": round(time.monotonic() - began, 2),
            "peak_mib": round(usage.ru_maxrss / 1024),
        }

    def judge(self, work: Work, directory: Path, result: dict[str, Any]) -> dict[str, Any]:
        """The row's KL, and whether it is fair."""
        placed = self.placed(work, directory, result)
        measured = compare_models(self.twin, self.reference, self.heldout(work.seed), batch_size=default_batch(self.length))
        return {"kl": measured.kl_mean, "kl_stderr": measured.kl_stderr, "top1": measured.top1_agreement, **placed}

    def placed(self, work: Work, directory: Path, result: dict[str, Any]) -> dict[str, Any]:
        """Puts a peer's weights into `twin`; whether the row is fair."""
        wanted = {f"{name}.weight" for name in self.source.linears}
        flags = []
        if work.peer == "llamacpp":
            written, bits = self.from_gguf(directory / "quantized.gguf", work)
            quantized = set(written)
        else:
            written, bits = load_file(directory / "weights.safetensors"), work.bits + 16 / work.group
            quantized = {f"{name}.weight" for name in result["quantized"]}
            most = max(_values(written.get(name, self.state[name]), work.group) for name in quantized & wanted)
            if most > 2**work.bits:
                flags.append(f"{most} values in a group: more than {work.bits} bits")
        if missing := wanted - quantized:
            flags.append(f"{len(missing)} linears are left out")
        if extra := {name for name in quantized | set(written) if self.state[name].ndim == 2} - wanted:
            flags.append(f"{len(extra)} other matrices are changed: {min(extra)}")
        self.twin.load_state_dict({**self.state, **{name: value.reshape(self.state[name].shape) for name, value in written.items()}})
        return {"quantized": len(quantized), "bits_per_weight": bits, "flags": flags}

    def from_gguf(self, path: Path, work: Work) -> tuple[dict[str, Tensor], float]:
        """The weights of the quantized linears in llama.cpp's file, and their stored bits per weight."""
        names = imatrix.tensor_names(imatrix.architecture(self.source.config["model_type"]), self.source.linears)
        stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        ours = {module: stored[name] for module, name in names.items() if stored[name].tensor_type.name.lower() == work.method}
        if not ours:
            raise PeerError(f"no tensor of the file is a {work.method}")
        tensors = gguf.read(path, config=self.source.config, tensors=list(self.source.checkpoint))
        bits = 8 * sum(int(tensor.n_bytes) for tensor in ours.values()) / sum(int(tensor.n_elements) for tensor in ours.values())
        return {f"{module}.weight": tensors[f"{module}.weight"] for module in ours}, bits


def _values(weight: Tensor, group: int) -> int:
    """The most different values that a group of the weight has, equal to within float32's rounding."""
    ordered = weight.reshape(-1, group).sort(1).values
    steps = ordered.diff(dim=1) > 1e-6 * ordered.abs().amax(1, keepdim=True)
    return int(steps.sum(1).max()) + 1


def _reason(text: str) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    return (errors or lines or ["no message"])[-1][:300]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds. The first error is over seeds, the second over held-out sequences, which all rows share."""
    heads = (
        "bits",
        "peer",
        "method",
        "bits/weight",
        "KL",
        "+- seeds",
        "+- text",
        "top-1",
        "quantizing s",
        "CPU s",
        "MiB",
        "linears",
        "seeds",
        "",
    )
    lines: list[tuple[str, ...]] = [heads]
    for bits, peer, method in sorted({(row["bits"], row["peer"], row["method"]) for row in rows}):
        own = [row for row in rows if (row["bits"], row["peer"], row["method"]) == (bits, peer, method)]
        good = [row for row in own if not row["error"]]
        if not good:
            lines.append((str(bits), peer, method, *[""] * (len(heads) - 4), own[0]["error"][:80]))
            continue
        mean = {key: statistics.fmean([row[key] for row in good if key in row] or [math.nan]) for key in _MEANS}
        spread = statistics.stdev(row["kl"] for row in good) / math.sqrt(len(good)) if len(good) > 1 else math.nan
        notes = sorted({note for row in good for note in row["flags"]} | {row["error"][:80] for row in own if row["error"]})
        numbers = (
            f"{mean['bits_per_weight']:.3f}",
            f"{mean['kl']:.5f}",
            f"{spread:.5f}",
            f"{mean['kl_stderr']:.5f}",
            f"{mean['top1']:.4f}",
            f"{mean['quantize_cpu_seconds']:.1f}",
            f"{mean['cpu_seconds']:.1f}",
            f"{mean['peak_mib']:.0f}",
        )
        lines.append((str(bits), peer, method, *numbers, str(good[0]["quantized"]), str(len(good)), "; ".join(notes)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join("  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines)


_MEANS = ("bits_per_weight", "kl", "kl_stderr", "top1", "quantize_cpu_seconds", "cpu_seconds", "peak_mib")


if __name__ == "__main__":
    main()
