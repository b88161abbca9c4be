"""llama.cpp's own quantizer, from llama-cpp-python's build, with an importance matrix of the calibration tokens.

The runner gives the original as a float32 GGUF and `E[x_j^2]` of each matrix's input columns. Every matrix gets the one type that the
method names (as with `--pure`); the embedding stays float32. The runner reads the file.
"""

import ctypes

import llama_cpp
import numpy as np
from adapter import Job
from safetensors.numpy import load_file

FILES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "iq4_nl": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "iq4_xs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "q3_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S,
    "iq3_xxs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_XXS,
    "q2_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "iq2_xs": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XS,
}

job = Job()
squares = {
    name: np.ascontiguousarray(values, dtype=np.float32) for name, values in load_file(job.directory / "imatrix.safetensors").items()
}
matrix = (llama_cpp.llama_model_imatrix_data * (len(squares) + 1))()  # ends with an entry without a name
for entry, (name, values) in zip(matrix, squares.items(), strict=False):
    entry.name = name.encode()
    entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    entry.size = values.size

settings = llama_cpp.llama_model_quantize_default_params()
settings.nthread = 1
settings.ftype = FILES[job.method]
settings.pure = True
settings.token_embedding_type = llama_cpp.GGML_TYPE_F32
settings.output_tensor_type = llama_cpp.GGML_TYPE_F32
settings.imatrix = matrix
with job.quantizing():
    status = llama_cpp.llama_model_quantize(
        bytes(job.directory / "original.gguf"), bytes(job.directory / "quantized.gguf"), ctypes.byref(settings)
    )
if status:
    raise SystemExit(f"Error: llama_model_quantize returned {status}")
job.done(job.linears, ["llama_cpp_python"])
