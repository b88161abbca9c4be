"""What the peers' adapters share. It is run by their environments and imports nothing of Roundel.

A job is a directory: `job.json` (model, method, bits, group, seed, the linears to quantize) and `tokens.safetensors` come from the runner;
the adapter leaves `weights.safetensors`, float32 values of everything that it has changed, as an engine would compute them, and
`result.json`. Only `quantizing` is timed as the peer's own work: imports and loading are not. A job is done where it lies, so that the
directory can be taken to another machine and back.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Job:
    """The job named on the command line."""

    def __init__(self) -> None:
        self.directory = Path(sys.argv[1])
        given = json.loads((self.directory / "job.json").read_text(encoding="utf-8"))
        self.model: str = given["model"]
        self.method: str = given["method"]
        self.bits: int = given["bits"]
        self.group: int = given["group"]
        self.seed: int = given["seed"]
        self.linears: list[str] = given["linears"]
        self.device: str = given["device"]
        self.cpu_seconds = self.wall_seconds = 0.0

    def tokens(self) -> Any:
        from safetensors.torch import load_file

        return load_file(self.directory / "tokens.safetensors")["tokens"]

    def load(self) -> tuple[Any, Any]:
        """The model in float32, on the CPU, and its tokenizer."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        path = self.directory / self.model  # which is absolute, or beside the directory
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(path)

    @contextmanager
    def quantizing(self) -> Iterator[None]:
        began, began_wall = time.process_time(), time.monotonic()
        yield
        self.cpu_seconds += time.process_time() - began
        self.wall_seconds += time.monotonic() - began_wall

    def done(self, quantized: Sequence[str], packages: Sequence[str], state: dict[str, Any] | None = None, **more: Any) -> None:
        """Writes the parameters in `state` that are not the original's, and the result."""
        if state is not None:
            from safetensors.torch import save_file

            save_file(
                {name: value.detach().cpu().float().contiguous().clone() for name, value in state.items()},
                self.directory / "weights.safetensors",
            )
        result = {
            "quantized": list(quantized),
            "quantize_cpu_seconds": self.cpu_seconds,
            "quantize_wall_seconds": self.wall_seconds,
            "device": _name_of(self.device),
            "versions": _versions(packages),
            **more,
        }
        (self.directory / "result.json").write_text(json.dumps(result), encoding="utf-8")


def changed(
    model: Any, original: dict[str, Any], weight: Callable[[str, Any], Any] = lambda _name, module: module.weight
) -> dict[str, Any]:
    """All parameters of `model` that differ from `original`; `weight` gives that of a linear by its name and module."""
    import torch

    values = {name: parameter.detach().cpu() for name, parameter in model.named_parameters() if name in original}
    for name, module in model.named_modules():
        if f"{name}.weight" in original and isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim == 2:
            values[f"{name}.weight"] = weight(name, module).detach().cpu()
    return {name: value for name, value in values.items() if not torch.equal(value.float(), original[name].float())}


def _name_of(device: str) -> str:
    if device == "cpu":
        return device
    import torch  # which not all peers have

    return torch.cuda.get_device_name(device)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}
