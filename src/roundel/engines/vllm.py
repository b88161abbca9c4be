"""vLLM's side of `serve-check`; see `child`.

Everything is asked for in one process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so that an error is the engine's own, and without compilation.
`prompt_logprobs` has what is before each token but the first; the row after the last is that of the token generated. All of a vocabulary
are Python objects for a while, some 100 bytes for each number.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

INSTALL = "pip install vllm, or make test-vllm for its build for CPUs"
FORMATS = ("compressed-tensors", "gptq", "awq", "dense")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = r"\] (Using [^\n]*?(?:Kernel|Method|Experts|[Bb]ackend)\b[^\n]*)"

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of the environment, where it does not say otherwise."""


def open_engine(request: dict[str, Any]) -> tuple[Callable[[list[int]], Any], Callable[[list[int], int], list[int]]]:
    """See `child`."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=request["model"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=request["longest"],
        max_num_seqs=2,
        max_logprobs=-1,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )

    def asked(ids: list[int], **settings: Any) -> Any:
        parameters = SamplingParams(temperature=0.0, detokenize=False, ignore_eos=True, **settings)
        return llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)[0]

    def rows_of(window: list[int]) -> Any:
        answer = asked(window, max_tokens=1, prompt_logprobs=-1, logprobs=-1)
        entries = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
        rows = np.full((len(entries), max(map(len, entries))), np.nan, dtype=np.float32)
        for row, entry in zip(rows, entries):  # noqa: B905 (any Python)
            row[np.fromiter(entry, dtype=np.int64)] = [value.logprob for value in entry.values()]
        return rows

    def continued(prompt: list[int], count: int) -> list[int]:
        return list(asked(prompt, max_tokens=count).outputs[0].token_ids)

    return rows_of, continued
