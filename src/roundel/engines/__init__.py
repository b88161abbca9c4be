"""Engines that serve written directories, asked for what they compute: `vllm`, `mlx` and `llama.cpp`."""

from pathlib import Path

from roundel.engines import llama_cpp, mlx, vllm
from roundel.engines.base import Answer, Engine, Request

__all__ = ["ENGINES", "Answer", "Engine", "Request"]

ENGINES = {
    name: Engine(
        name=name,
        file=Path(str(module.__file__)),
        install=module.INSTALL,
        formats=module.FORMATS,
        dtypes=module.DTYPES,
        kernels=module.KERNELS,
    )
    for name, module in {"vllm": vllm, "mlx": mlx, "llama.cpp": llama_cpp}.items()
}
