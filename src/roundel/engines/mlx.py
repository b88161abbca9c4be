"""mlx-lm's side of `serve-check`; see `child`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

INSTALL = "pip install mlx-lm, and 'mlx[cpu]' where there is no Apple GPU"
FORMATS = ("mlx", "dense")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = None


def open_engine(request: dict[str, Any]) -> tuple[Callable[[list[int]], Any], Callable[[list[int], int], list[int]]]:
    """See `child`."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    model = mlx_lm.load(request["model"])[0]
    if request["dtype"] != "auto":
        model.set_dtype(getattr(mx, request["dtype"]))

    def rows_of(window: list[int]) -> Any:
        logits = model(mx.array([window]))[0].astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def continued(prompt: list[int], count: int) -> list[int]:
        generated = generate_step(mx.array(prompt), model, max_tokens=count)
        return [int(token) for token, _ in generated]

    return rows_of, continued
