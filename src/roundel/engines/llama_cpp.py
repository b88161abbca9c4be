"""llama.cpp's side of `serve-check`, by llama-cpp-python; see `child`.

With `LLAMA_CPP_LIB_PATH` that is another llama.cpp than its own, whose code for processors may be in files beside its libraries.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

INSTALL = "pip install llama-cpp-python"
FORMATS = ("gguf",)
DTYPES = ("auto", "float32", "float16")
KERNELS = r"\b(CPU_\w+|CUDA\d|Metal|Vulkan\d)\b model buffer size"


def open_engine(request: dict[str, Any]) -> tuple[Callable[[list[int]], Any], Callable[[list[int], int], list[int]]]:
    """See `child`; `dtype` is that of keys and values."""
    import llama_cpp

    if libraries := os.environ.get("LLAMA_CPP_LIB_PATH"):
        for file in [*Path(libraries).glob("libggml.*")][:1]:
            ctypes.CDLL(str(file)).ggml_backend_load_all_from_path(os.fsencode(libraries))
    kind = {"auto": llama_cpp.GGML_TYPE_F16, "float16": llama_cpp.GGML_TYPE_F16, "float32": llama_cpp.GGML_TYPE_F32}[request["dtype"]]
    llm = llama_cpp.Llama(
        model_path=f"{request['model']}/model.gguf",
        n_ctx=request["longest"],
        n_batch=request["longest"],
        type_k=kind,
        type_v=kind,
        logits_all=True,
        verbose=True,  # the log has the reason where a file is refused
    )

    def rows_of(window: list[int]) -> Any:
        llm.reset()
        llm.eval(window)
        logits = np.array(llm.scores[: len(window)], dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def continued(prompt: list[int], count: int) -> list[int]:
        llm.reset()
        generated = llm.generate(prompt, temp=0.0, repeat_penalty=1.0)
        return [int(token) for token, _ in zip(generated, range(count))]  # noqa: B905 (any Python)

    return rows_of, continued
