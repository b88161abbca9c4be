"""Rounding of matrices, and steps of tuning of models, as large models have them, on one GPU.

    python benchmarks/gpu.py [--shapes 4096x4096 4096x14336] -o FILE

One line of JSON for each shape and scheme: seconds of the LDL factors, of feedback and of each sweep, after one run on a small weight that
compiles everything; the numba path on all cores of the same machine beside it where it ends within a minute or two; and for small weights
the torch specification on the same GPU. Then the coder alone: tiles a second and the distance to the specification. Last, steps of tuning
end to end of a Llama of a billion weights, drawn at random, in bfloat16: seconds a step, and the most memory.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from roundel.artifacts.source import load_source
from roundel.formats.native import Layout, Native
from roundel.grids import ScalarGrid, TileGrid, parse_scheme
from roundel.integration.linear import QuantizedLinear
from roundel.linalg import viterbi
from roundel.models import locate
from roundel.recipes import Recipe
from roundel.rounding import feedback, make_problem, nearest, refit_scales, round_weights, sweep
from roundel.rounding.descent import sweep_waves
from roundel.rounding.feedback import feedback_waves
from roundel.rounding.tiles import feedback_tiles, in_step, sweep_tiles
from roundel.stages.report import versions
from roundel.tuning import Job, tune_end_to_end
from roundel.types import KroneckerFactors, RoundedWeight, RoundingProblem, TokenBatch


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - began, result


def factors_of(d_out: int, d_in: int) -> tuple[torch.Tensor, KroneckerFactors]:
    generator = torch.Generator("cuda").manual_seed(0)

    def covariance(width: int) -> torch.Tensor:
        A = torch.randn(width, 2 * width, generator=generator, device="cuda") * torch.linspace(0, 3, width, device="cuda").exp()[:, None]
        return A @ A.T

    W = torch.randn(d_out, d_in, generator=generator, device="cuda")
    return W, KroneckerFactors.normalised(covariance(d_out), covariance(d_in), trace=1.0)


def moved(problem: RoundingProblem, device: str) -> RoundingProblem:
    tensors = {name: getattr(problem, name).to(device) for name in ("W", "H_out", "H_in", "L_out", "L_in", "D_out", "D_in")}
    return RoundingProblem(**tensors, scale=problem.scale, damping=problem.damping)


def matrix(d_out: int, d_in: int, scheme: str, sweeps: int) -> dict[str, Any]:
    grid = parse_scheme(scheme)
    W, factors = factors_of(d_out, d_in)
    torch.cuda.reset_peak_memory_stats()
    line: dict[str, Any] = {"shape": [d_out, d_in], "scheme": scheme}
    line["factorisation"], problem = seconds(lambda: make_problem(W, factors, damping=0.1))
    line["scales"], scales = seconds(lambda: grid.fit_scales(problem.W, problem.H_in.diagonal(), torch.float16))
    if isinstance(grid, TileGrid):
        line["feedback"], codes = seconds(lambda: in_step([feedback_tiles(problem, grid, scales)], grid)[0])
    else:
        assert isinstance(grid, ScalarGrid)
        line["feedback"], codes = seconds(lambda: feedback(problem, grid, scales))
    line["sweeps"], line["refits"] = [], []
    for _ in range(sweeps):
        spent, scales = seconds(lambda s=scales, c=codes: refit_scales(problem, grid, s, c))
        line["refits"].append(spent)
        if isinstance(grid, TileGrid):
            spent, codes = seconds(lambda s=scales, c=codes: in_step([sweep_tiles(problem, grid, s, c)], grid)[0])
        else:
            spent, codes = seconds(lambda s=scales, c=codes: sweep(problem, grid, s, c))
        line["sweeps"].append(spent)
    line["total"] = line["factorisation"] + line["scales"] + line["feedback"] + sum(line["sweeps"]) + sum(line["refits"])
    line["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return line


def against_cpu(d_out: int, d_in: int, scheme: str) -> dict[str, Any]:
    """Feedback and one sweep by Triton and by numba on all cores, of one problem."""
    grid = parse_scheme(scheme)
    assert isinstance(grid, ScalarGrid)
    problem = make_problem(*factors_of(d_out, d_in), damping=0.1)
    scales = grid.fit_scales(problem.W, problem.H_in.diagonal(), torch.float16)
    near, near_scales = moved(problem, "cpu"), {name: scale.cpu() for name, scale in scales.items()}
    on_gpu, codes = seconds(lambda: feedback(problem, grid, scales))
    on_cpu, near_codes = seconds(lambda: feedback(near, grid, near_scales))
    swept_gpu, _ = seconds(lambda: sweep(problem, grid, scales, codes))
    swept_cpu, _ = seconds(lambda: sweep(near, grid, near_scales, codes.cpu()))
    line = {
        "shape": [d_out, d_in],
        "scheme": scheme,
        "feedback": {"gpu": on_gpu, "cpu": on_cpu},
        "sweep": {"gpu": swept_gpu, "cpu": swept_cpu},
    }
    return line | {"codes_that_differ": (codes.cpu() != near_codes).double().mean().item()}


def against_specification(width: int, scheme: str) -> dict[str, Any]:
    """float64, where codes must be equal."""
    from roundel.kernels import triton_rounding

    grid = parse_scheme(scheme)
    assert isinstance(grid, ScalarGrid)
    problem = make_problem(*factors_of(width, width), damping=0.1, dtype=torch.float64)
    scales = grid.fit_scales(problem.W, problem.H_in.diagonal(), torch.float16)
    feedback(problem, grid, scales)
    fast, codes = seconds(lambda: feedback(problem, grid, scales))
    slow, expected = seconds(lambda: feedback_waves(problem, grid, scales))
    sweep(problem, grid, scales, codes)
    fast_sweep, swept = seconds(lambda: sweep(problem, grid, scales, codes))
    slow_sweep, expected_sweep = seconds(lambda: sweep_waves(problem, grid, scales, codes, tile=triton_rounding.TILE))
    return {
        "width": width,
        "scheme": scheme,
        "feedback": {"triton": fast, "torch": slow, "codes_that_differ": int((codes != expected).sum())},
        "sweep": {"triton": fast_sweep, "torch": slow_sweep, "codes_that_differ": int((swept != expected_sweep).sum())},
    }


def coder(scheme: str, tiles: int, few: int) -> dict[str, Any]:
    from roundel.grids.trellis import REACH
    from roundel.kernels import triton_viterbi

    grid = parse_scheme(scheme)
    targets = torch.randn(tiles, 256 // grid.values, grid.values, device="cuda")
    table, options = grid.table.cuda(), {"reach": REACH // grid.values}
    triton_viterbi.circular_path(targets[:few], table, grid.shift, **options)
    fast, (found, _) = seconds(lambda: triton_viterbi.circular_path(targets, table, grid.shift, **options))
    slow, (expected, _) = seconds(lambda: viterbi.circular_path(targets[:few], table, grid.shift, **options))
    return {
        "scheme": scheme,
        "tiles_per_second": {"triton": tiles / fast, "torch": few / slow},
        "states_that_differ": int((found[:few] != expected).sum()),
    }


def linear(d_out: int, d_in: int, scheme: str, rows: int) -> dict[str, Any]:
    """A packed linear and a dense one in bfloat16, microseconds a call."""
    grid = parse_scheme(scheme)
    W = torch.randn(d_out, d_in)
    scales = grid.fit_scales(W, torch.ones(d_in), torch.bfloat16)
    if isinstance(grid, TileGrid):
        height, width = grid.tile(d_out, d_in)
        codes = torch.randint(2**grid.shift, (d_out // height, d_in // width, 256 // grid.values)).to(torch.uint8)
    else:
        assert isinstance(grid, ScalarGrid)
        codes = grid.encode(W, *grid.affine(scales, (d_out, d_in), torch.float32))
    packed = Native().pack(RoundedWeight(scheme=scheme, codes=codes, scales=scales, shape=(d_out, d_in)))
    module = QuantizedLinear(Layout.of(packed, grid, (d_out, d_in)), tensors=packed).cuda()
    dense = W.to("cuda", torch.bfloat16)
    x = torch.randn(rows, d_in, device="cuda", dtype=torch.bfloat16)
    line: dict[str, Any] = {"shape": [d_out, d_in], "scheme": scheme, "rows": rows}
    with torch.no_grad():
        for name, run in {"packed": lambda: module(x), "dense": lambda: torch.nn.functional.linear(x, dense)}.items():
            run()
            spent = min(seconds(lambda r=run: [r() for _ in range(20)])[0] for _ in range(5))
            line[f"{name}_us"] = round(1e6 * spent / 20, 1)
    return line


class _EnoughError(Exception):
    """Ends the tuning."""


def tuning(scheme: str, steps: int, layers: int) -> dict[str, Any]:
    """Steps of 2048 tokens; the first third is left out."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        with torch.device("cuda"):
            LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
        AutoTokenizer.from_pretrained(locate("demo")).save_pretrained(directory)  # a source has one; it is not used
        source = load_source(directory, Recipe(scheme=scheme), "cuda", "bfloat16")
    grid = parse_scheme(scheme)
    assert isinstance(grid, ScalarGrid)
    rounded = {}
    for name, linear in source.linears.items():
        W = linear.weight.detach().float()
        scales = grid.fit_scales(W, torch.ones(W.shape[1], device="cuda"), torch.bfloat16)
        codes = nearest(W, grid, scales).cpu()
        rounded[name] = RoundedWeight(
            scheme=scheme, codes=codes, scales={part: scale.cpu() for part, scale in scales.items()}, shape=(W.shape[0], W.shape[1])
        )
    ids = torch.randint(config.vocab_size, (8 + 2 * steps, 1024))
    at: list[float] = []

    def advance(_steps: int) -> None:
        torch.cuda.synchronize()
        at.append(time.perf_counter())
        if len(at) == steps:
            raise _EnoughError

    torch.cuda.reset_peak_memory_stats()
    job = Job(
        source=source,
        rounded=rounded,
        tokens=TokenBatch.of(ids[8:]),
        unseen=TokenBatch.of(ids[:2]),
        steps=100 * steps,  # so that nothing is measured or saved between those that are taken
        step_tokens=2048,
        others={"model.norm.weight": torch.bfloat16, "model.embed_tokens.weight": torch.bfloat16},
        seed=0,
        batch_size=2,
        advance=advance,
    )
    with contextlib.suppress(_EnoughError):
        tune_end_to_end(job)
    skipped, weights = steps // 3, sum(linear.weight.numel() for linear in source.linears.values())
    return {
        "weights": weights,
        "scheme": scheme,
        "step_seconds": round((at[-1] - at[skipped]) / (len(at) - 1 - skipped), 4),
        "tokens": 2048,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x14336"])
    parser.add_argument("--tiles", type=int, default=1024)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "versions": {**versions(), "triton": __import__("triton").__version__},
    }
    for scheme in ("int4-g128", "trellis2", "lattice2"):  # compiles
        problem = make_problem(*factors_of(256, 256), damping=0.1)
        round_weights([problem], parse_scheme(scheme), sweeps=1, scale_dtypes=[torch.float16])
    small = make_problem(*factors_of(256, 256), damping=0.1)
    round_weights([moved(small, "cpu")], parse_scheme("int4-g128"), sweeps=1, scale_dtypes=[torch.float16])

    def keep(key: str, line: dict[str, Any]) -> None:
        record.setdefault(key, []).append(line)
        print(json.dumps({key: line}), flush=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")

    keep("specification", against_specification(512, "int4-g128"))
    for scheme in ("trellis2", "trellis4", "trellis2-hyb"):
        keep("coder", coder(scheme, args.tiles, 16))
    for shape in args.shapes:
        d_out, d_in = map(int, shape.split("x"))
        keep("matrix", matrix(d_out, d_in, "int4-g128", 4))
        keep("matrix", matrix(d_out, d_in, "trellis2", 1))
    for width in (512, 1024, 2048, 4096):
        keep("numba", against_cpu(width, width, "int4-g128"))
    for scheme in ("int4-g128", "trellis2"):
        for rows in (1, 8):
            keep("linear", linear(14336, 4096, scheme, rows))
    keep("tuning", tuning("int4-g128", 12, 16))


if __name__ == "__main__":
    main()
