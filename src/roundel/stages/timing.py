"""How long a job will take: its stages run over one decoder layer, and taken to the whole model.

One layer (of the kind that there are most of) is made with random weights, and the stages themselves are run over it three times: with few
sequences, with twice as many, and with more tokens in the vocabulary and no sweeps. What a sequence costs, what a linear costs whatever
the text, and what the output head costs are told apart by that, and each is taken to the whole model by multiply-adds (`Units`). A layer
of more than `TIMED` weights would take too long: then a narrow one is timed, and taken to the model's widths. Natural-gradient steps and
tuning are counted in passes of that kind, sampling of text in readings of the weights.

Seconds that the process has waited for a processor, because other programs had it, do not count (`undisturbed`): a plan is of a machine
that does nothing else, and warns where they were many.

Cost: some seconds. Not done: several processes; what a GPU does better with wide layers than with a narrow one.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, PretrainedConfig

from roundel.artifacts.imatrix_sums import imatrix_file
from roundel.artifacts.source import Source, outlined
from roundel.artifacts.work import HIDDEN, Work
from roundel.artifacts.written import Written
from roundel.calibration import SAMPLES_PER_PASS, split_tokens
from roundel.curvature import parse_curvature
from roundel.curvature.collect import pilot_first
from roundel.errors import RoundelError, SchemeError
from roundel.models import Checkpoint
from roundel.models.experts import experts_of
from roundel.models.load import load_config, skeleton, without_quantization
from roundel.progress import Silent
from roundel.recipes import STEP_TOKENS, Recipe
from roundel.stages.curvature import measure_curvature
from roundel.stages.ends import Ends
from roundel.stages.evaluation import PREDICTED, evaluate_values
from roundel.stages.notes import Notes
from roundel.stages.rounding import choose_schemes, round_model
from roundel.stages.text import default_batch
from roundel.stages.writing import write_model

__all__ = ["Timing", "Units", "seconds", "timing_of", "units_of"]

TIMED = 8_000_000
"""Weights of a layer that is timed itself."""

FEW, VOCABULARY, MORE_VOCABULARY = 3, 1024, 8192
"""Sequences, and tokens of the head, of the timed runs."""

DRAFTS = 4
"""Of `auto`, for each linear."""

INVERSES = 3
"""Factorisations of each factor in the curvature stage."""

REPLAY = 0.6
"""What a forward and backward pass takes of one in which curvature is summed, too. A prediction, in float32 and with the gradients of whole
weights, takes all of it."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """Multiply-adds in the linears of some decoder layers, and the numbers of a head."""

    gradients: float
    """Of a token: forward, forward and backward, and sums of curvature."""
    forward: float
    """Of a token."""
    moments: float
    """Of a token on both paths of the rounding sweep."""
    rounding: float
    """Of all linears, whatever the text."""
    cubes: float
    """Of the widths of all linears: factors are inverted."""
    head: float
    """Of a token: its width times the vocabulary."""
    linears: int
    weights: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds for each multiply-add of `Units`."""

    what: str
    """Which layer was timed."""
    waited: float
    """What part of the time of trying other programs had the processors."""
    gradients: float
    forward: float
    moments: float
    factors: float
    """For each of `Units.cubes`, in the curvature stage."""
    overhead: float
    """There too, for each linear, whatever its size."""
    rounding: float
    """Without sweeps."""
    sweep: float
    """For one sweep more."""
    head_gradients: float
    """Forward and backward."""
    head: float
    """Forward, of the original and of what is written."""
    reading: float
    """Seconds for a byte of weights that is read."""


def units_of(source: Source, length: int) -> Units:
    """Of all linears that are quantized, on sequences of this length."""
    used = _use_of_experts(source)
    forward = gradients = moments = rounding = cubes = 0.0
    for name, linear in source.linears.items():
        d_out, d_in = linear.out_features, linear.in_features
        use = used if experts_of(source.model, name) is not None else 1.0
        forward += use * d_out * d_in
        gradients += use * (5 * d_out * d_in + 2 * (d_in**2 + d_out**2))
        moments += use * (4 * d_out * d_in + 2 * d_in**2)
        cubes += d_in**3 + d_out**3
        rounding += 10 * d_in * d_out * (d_in + d_out) + 1.5 * (d_in**3 + d_out**3)
    embedding: Any = source.model.get_input_embeddings()
    return Units(
        gradients=gradients,
        forward=forward,
        moments=moments,
        rounding=rounding,
        cubes=cubes,
        head=float(embedding.num_embeddings * embedding.embedding_dim),
        linears=len(source.linears),
        weights=sum(linear.weight.numel() for linear in source.linears.values()),
    )


def _use_of_experts(source: Source) -> float:
    """The part of a layer's experts that a token goes through."""
    config = source.model.config.get_text_config()

    def first(*names: str) -> int:
        return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), 0)

    chosen = first("num_experts_per_tok", "moe_topk", "top_k_experts")
    there = first("num_experts", "num_local_experts", "n_routed_experts")
    return min(1.0, chosen / there) if chosen and there else 1.0


def seconds(recipe: Recipe, units: Units, timing: Timing, *, item: int) -> dict[str, float]:
    """Of each stage of a job; `item`: bytes of a weight in memory."""
    length = recipe.seq_len
    collected, held = recipe.sequences * length, recipe.eval_sequences * length
    head = timing.head_gradients * units.head
    one_pass = REPLAY * timing.gradients * units.gradients + head
    found = {"text": 0.0}
    if recipe.calibration == "self":
        draws = -(-(recipe.sequences + (0 if recipe.eval_data else recipe.eval_sequences)) // SAMPLES_PER_PASS) * length
        found["text"] = draws * max(
            timing.reading * item * (units.weights + units.head), SAMPLES_PER_PASS * timing.forward * (units.forward + units.head)
        )
    found["curvature"] = 0.0 if imatrix_file(recipe) else collected * (timing.gradients * units.gradients + head)
    found["curvature"] += timing.factors * units.cubes + timing.overhead * units.linears
    compared = DRAFTS if parse_curvature(recipe.curvature).held_out(recipe.sequences) else 0
    compared = compared if recipe.bits is None else len(recipe.used_schemes)
    found["curvature"] += compared * timing.rounding * units.rounding
    found["rounding"] = (timing.rounding + recipe.sweeps * timing.sweep) * units.rounding
    if recipe.corrects(collected):
        found["rounding"] += recipe.prefix_count * length * timing.moments * units.moments
        places, steps = recipe.natural_steps(recipe.sequences, length, weights=units.weights)
        found["rounding"] += places * steps * STEP_TOKENS * 2 * one_pass
    if recipe.tune != "none":
        found["tuning"] = recipe.steps * recipe.step_tokens * 2 * one_pass
    found["writing"] = units.weights * item * timing.reading * 4
    found["evaluation"] = held * (timing.forward * units.forward + timing.head * units.head)
    found["prediction"] = PREDICTED * length * (timing.gradients * units.gradients + head)
    return found


def timing_of(source: Source, names: list[str], recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Timing:
    """Runs the stages over one decoder layer of `names`; over a narrow one where that is too large, or cannot be run by itself."""
    layer = _usual(source.model, names)
    size = sum(p.numel() for p in source.model.get_submodule(layer).parameters())
    if size <= TIMED:
        settings = without_quantization(load_config(source.path))
        try:
            return _timed(settings, layer, f"{layer} of {size:,} weights", recipe, device, dtype)
        except (RoundelError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
            pass  # a layer that needs more of its model than what is left of it here
    narrow = LlamaConfig(
        hidden_size=384,
        intermediate_size=1152,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=1 << 16,
    )
    what = "a Llama's layer 384 wide, in the place of a larger one"
    try:
        return _timed(narrow, "model.layers.0", what, recipe, device, dtype)
    except SchemeError:  # its groups are of another width
        return _timed(narrow, "model.layers.0", what, dataclasses.replace(recipe, scheme="int4-g64", rotate="auto"), device, dtype)


def _usual(model: nn.Module, names: list[str]) -> str:
    """The first layer of the kind that there are most of."""
    kinds = {name: tuple((own, tuple(p.shape)) for own, p in model.get_submodule(name).named_parameters()) for name in names}
    most = Counter(kinds.values()).most_common(1)[0][0]
    return next(name for name, kind in kinds.items() if kind == most)


def _timed(settings: PretrainedConfig, layer: str, what: str, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Timing:
    length, sweeps = min(recipe.seq_len, 512), max(1, recipe.sweeps)

    def run(count: int, vocabulary: int, sweeps: int, length: int) -> tuple[dict[str, float], Units]:
        given = dataclasses.replace(
            recipe,
            curvature="imatrix" if imatrix_file(recipe) else recipe.curvature,  # the file is not this model's
            sequences=count,
            prefix_sequences=count,
            eval_sequences=2 * count,
            seq_len=length,
            sweeps=sweeps,
            natural_places=0,
            prefix_aware=True,
            tune="none",
            bits=None,
            schemes=(),
            eval_data=None,
            include=(),
            exclude=(),
            format="native",
        )
        with tempfile.TemporaryDirectory(prefix="roundel-") as scratch:
            alone = _layer_alone(settings, layer, vocabulary, given, device, dtype, Path(scratch))
            return _stages(alone, given, Path(scratch)), units_of(alone, length)

    run(FEW, VOCABULARY, 1, 16)  # compiled and warm
    began, began_alone = time.monotonic(), undisturbed()
    few, units = run(FEW, VOCABULARY, sweeps, length)
    more, _ = run(2 * FEW, VOCABULARY, sweeps, length)
    wide, wider = run(FEW, MORE_VOCABULARY, 0, length)
    tokens, head = FEW * length, wider.head - units.head

    def each_token(stage: str, unit: float) -> float:
        return max(more[stage] - few[stage], 0.05 * few[stage]) / (tokens * unit)

    def whatever_the_text(stage: str) -> float:
        return max(2 * few[stage] - more[stage], 0.1 * few[stage])

    fixed, factors = whatever_the_text("rounding"), INVERSES * _inverting(device)
    swept = min(max(few["rounding"] - wide["rounding"], 0.0), 0.9 * fixed)
    return Timing(
        what=what,
        waited=1 - (undisturbed() - began_alone) / (time.monotonic() - began),
        gradients=each_token("curvature", units.gradients),
        forward=each_token("evaluation", units.forward) / 2,  # twice as many sequences are held out
        moments=each_token("rounding", units.moments),
        factors=factors,
        overhead=max(0.0, whatever_the_text("curvature") - factors * units.cubes) / units.linears,
        rounding=(fixed - swept) / units.rounding,
        sweep=swept / sweeps / units.rounding,
        head_gradients=max(0.0, wide["curvature"] - few["curvature"]) / (tokens * head),
        head=max(0.0, wide["evaluation"] - few["evaluation"]) / (2 * tokens * head),
        reading=_reading(device),
    )


def _layer_alone(
    settings: PretrainedConfig, layer: str, vocabulary: int, recipe: Recipe, device: torch.device, dtype: torch.dtype, folder: Path
) -> Source:
    """A model of this one layer, random, with so many tokens in its vocabulary; its weights are in the folder."""
    model: Any = skeleton(settings)
    model.set_submodule(layer.rpartition(".")[0], nn.ModuleList([model.get_submodule(layer)]))
    width = model.get_input_embeddings().embedding_dim
    with torch.device("meta"):
        model.set_input_embeddings(nn.Embedding(vocabulary, width))
        model.set_output_embeddings(nn.Linear(width, vocabulary, bias=False))
    model = model.to_empty(device="cpu").to(dtype)
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.initialize_weights()
    save_file({name: value.detach().clone() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    model = model.to(device).eval()
    return outlined(model, Checkpoint.open(folder), recipe, folder)


def _stages(source: Source, recipe: Recipe, folder: Path) -> dict[str, float]:
    """Seconds of each stage over a model of one layer and random text."""
    recipe = dataclasses.replace(recipe, embedding="none", head="none")
    notes, work = Notes(Silent(), undisturbed), Work(path=folder / "work", kept=False, memory=1 << 34, hidden=HIDDEN)
    work.path.mkdir()
    ids = torch.randint(
        source.layers.vocabulary,
        (recipe.sequences + recipe.eval_sequences, recipe.seq_len),
        generator=torch.Generator().manual_seed(recipe.sequences),
    )
    split = split_tokens(ids, calibration=recipe.sequences, heldout=recipe.eval_sequences, seed=0, source="random text")
    split = dataclasses.replace(split, calibration=pilot_first(parse_curvature(recipe.curvature), split.calibration))
    batch = default_batch(recipe.seq_len)
    measured = measure_curvature(recipe, source, split, None, notes, batch_size=batch, work=work)
    rounded = round_model(
        recipe, source, split, measured, choose_schemes(recipe, source, measured), Ends(), notes, batch_size=batch, work=work
    )
    target = folder / "out"
    target.mkdir()
    write_model(target, recipe, source, rounded, notes)
    written = Written(target, source, recipe.written_format(), {**rounded.layers, **rounded.ends.rows}, rounded.others)
    evaluate_values(written, source, split, notes, batch_size=batch, work=work)
    return notes.seconds


def undisturbed() -> float:
    """A clock that stands still while the thread that has waited longest waits for a processor (where Linux tells)."""
    waits = [0]
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has ended
            waits.append(int(task.read_text(encoding="ascii").split()[1]))
    return time.monotonic() - max(waits) / 1e9


def _inverting(device: torch.device) -> float:
    """Seconds for a cube of the width of a matrix that is factorised in float64."""
    width = 1024
    matrix = torch.eye(width, dtype=torch.float64, device=device) + 1e-4
    torch.linalg.cholesky(matrix).sum().item()
    began = undisturbed()
    torch.linalg.cholesky(matrix).sum().item()
    return (undisturbed() - began) / width**3


def _reading(device: torch.device) -> float:
    """Seconds for a byte that is read from memory, by one sum over a quarter of a gigabyte."""
    values = torch.zeros(1 << 26, device=device)
    values.sum().item()
    began = undisturbed()
    values.sum().item()
    return (undisturbed() - began) / values.nbytes
