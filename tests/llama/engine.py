"""llama.cpp through its C interface: logits, greedy text and tokens of one file, in this process.

`make test-llama` puts the libraries into the environment that runs the tests (`scripts/install_llama_cpp.py`); elsewhere there are none,
and what needs them is skipped. The structures below are those of that release's llama.h, which is compared when it is loaded; some of
their defaults are compared too.

Keys and values are kept in float32: llama.cpp's float16 costs 1e-3 of the largest logit. Weights stay as they are in the file.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = "0.5.0"
HOME = Path(sys.prefix) / "llama.cpp"
LIBRARY = HOME / f"libllama.v{VERSION}.so"
CONTEXT = 256
"""Tokens at once, at most."""
FLOAT32 = 0
"""Of ggml's types."""

POINTER, INT, UNSIGNED, FLOAT, BOOL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_bool


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class ModelParams(ctypes.Structure):
    _fields_ = [
        *fields(POINTER, "devices tensor_buft_overrides"),
        *fields(INT, "n_gpu_layers split_mode load_mode lazy_mode main_gpu"),
        *fields(POINTER, "tensor_split progress_callback progress_callback_user_data kv_overrides"),
        *fields(BOOL, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
    ]


class ContextParams(ctypes.Structure):
    _fields_ = [
        *fields(UNSIGNED, "n_ctx n_batch n_ubatch n_seq_max n_rs_seq n_outputs_max n_outputs_max_per_seq"),
        *fields(INT, "n_threads n_threads_batch ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"),
        *fields(FLOAT, "rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor yarn_beta_fast yarn_beta_slow"),
        ("yarn_orig_ctx", UNSIGNED),
        ("defrag_thold", FLOAT),
        *fields(POINTER, "cb_eval cb_eval_user_data"),
        *fields(INT, "type_k type_v"),
        *fields(POINTER, "abort_callback abort_callback_data"),
        *fields(BOOL, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
        ("samplers", POINTER),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", POINTER),
    ]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", INT),
        ("token", ctypes.POINTER(INT)),
        ("embd", POINTER),
        ("pos", ctypes.POINTER(INT)),
        ("n_seq_id", ctypes.POINTER(INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, POINTER)

FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_version": (ctypes.c_char_p, []),
    "llama_log_set": (None, [LOG, POINTER]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (POINTER, [ctypes.c_char_p, ModelParams]),
    "llama_model_free": (None, [POINTER]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_vocab_n_tokens": (INT, [POINTER]),
    "llama_init_from_model": (POINTER, [POINTER, ContextParams]),
    "llama_free": (None, [POINTER]),
    "llama_get_memory": (POINTER, [POINTER]),
    "llama_memory_clear": (None, [POINTER, BOOL]),
    "llama_batch_init": (Batch, [INT, INT, INT]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (INT, [POINTER, Batch]),
    "llama_get_logits": (ctypes.POINTER(FLOAT), [POINTER]),
    "llama_tokenize": (INT, [POINTER, ctypes.c_char_p, INT, ctypes.POINTER(INT), INT, BOOL, BOOL]),
}


@LOG
def errors_only(level: int, text: bytes, _data: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def load() -> ctypes.CDLL:
    backends = ctypes.CDLL(str(HOME / f"libggml.v{VERSION}.so"))
    backends.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    library = ctypes.CDLL(str(LIBRARY))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found = library.llama_version().decode()
    assert found.partition("-")[0] == VERSION, f"llama.cpp {found}, not {VERSION}: its structures may be others"
    model, context = library.llama_model_default_params(), library.llama_context_default_params()
    assert (model.use_extra_bufts, model.vocab_only) == (True, False)
    assert (context.n_ctx, context.yarn_beta_fast, context.type_k, context.offload_kqv, context.n_samplers) == (512, -1.0, 1, True, 0)
    library.llama_log_set(errors_only, None)
    backends.ggml_backend_load_all_from_path(bytes(HOME))
    return library


class Engine:
    """A file, loaded."""

    def __init__(self, library: ctypes.CDLL, model: int, context: int) -> None:
        self.calls, self.context = library, context
        self.vocabulary = library.llama_model_get_vocab(model)
        self.rows: int = library.llama_vocab_n_tokens(self.vocabulary)

    def logits(self, ids: list[int], after: int = 0) -> Tensor:
        """At each of these tokens, `(tokens, vocabulary)`; the `after` tokens before them have been read."""
        assert 0 < len(ids) <= CONTEXT - after
        if after == 0:
            self.calls.llama_memory_clear(self.calls.llama_get_memory(self.context), True)
        batch = self.calls.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for k, token in enumerate(ids):
            batch.token[k], batch.pos[k], batch.n_seq_id[k], batch.seq_id[k][0], batch.logits[k] = token, after + k, 1, 0, 1
        status = self.calls.llama_decode(self.context, batch)
        self.calls.llama_batch_free(batch)
        assert status == 0, f"llama_decode returned {status}"
        found = ctypes.cast(self.calls.llama_get_logits(self.context), ctypes.POINTER(FLOAT * (len(ids) * self.rows)))
        return torch.frombuffer(found.contents, dtype=torch.float32).view(len(ids), self.rows).clone()

    def greedy(self, ids: list[int], tokens: int) -> list[int]:
        """What follows, always the likeliest token, which is read with the keys and values of those before it."""
        found = [int(self.logits(ids)[-1].argmax())]
        while len(found) < tokens:
            found.append(int(self.logits(found[-1:], after=len(ids) + len(found) - 1)[-1].argmax()))
        return found

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """With the tokens that the model adds by itself; names of special tokens stand for those where `special`."""
        raw = text.encode()
        room = (INT * (len(raw) + 8))()
        count = self.calls.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), True, special)
        assert count >= 0, f"llama_tokenize returned {count}"
        return list(room[:count])


@contextmanager
def engine(path: Path) -> Iterator[Engine]:
    library = load()
    params = library.llama_model_default_params()
    params.use_extra_bufts = False  # other forms of the weights depend on the machine
    model = library.llama_model_load_from_file(bytes(path), params)
    assert model, f"llama.cpp did not load {path}"
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = FLOAT32
    settings.flash_attn_type = 0
    context = library.llama_init_from_model(model, settings)
    assert context, f"llama.cpp made no context for {path}"
    try:
        yield Engine(library, model, context)
    finally:
        library.llama_free(context)
        library.llama_model_free(model)
