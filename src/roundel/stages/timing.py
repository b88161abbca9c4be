"""How long a job will take: its stages run over one decoder layer, and taken to the whole model.

One layer (of the kind that there are most of) is made with random weights, and the stages themselves are run over it three times: with few
sequences and no sweeps, with more sequences, and with sweeps and more tokens in the vocabulary. What a sequence costs, what a linear costs
whatever the text, and what the output head costs are told apart by that. Of each the part is taken off that matrix products take, whose
rates are measured by themselves, on large ones; products are taken to the whole model by their multiply-adds, what is left by widths and
weights (`Units`). A layer of more than `TIMED` weights would take too long: then a narrow one is timed, of which almost everything is that
rest, on sequences half as long. Natural-gradient steps and tuning are counted in passes of that kind, sampling of text in readings of
the weights.

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
from roundel.evaluate.continuations import PROMPT, PROMPTS
from roundel.models import Checkpoint
from roundel.models.experts import experts_of
from roundel.models.load import load_config, skeleton, without_quantization
from roundel.progress import Silent
from roundel.recipes import STEP_TOKENS, Recipe
from roundel.settings import NEW_TOKENS
from roundel.stages.curvature import measure_curvature
from roundel.stages.ends import Ends
from roundel.stages.evaluation import PREDICTED, evaluate_values, predict
from roundel.stages.notes import Notes
from roundel.stages.rounding import choose_schemes, round_model
from roundel.stages.text import default_batch
from roundel.stages.writing import write_model

__all__ = ["Timing", "Units", "seconds", "timing_of", "units_of"]

TIMED = 8_000_000
"""Weights of a layer that is timed itself."""

FEW, MORE, VOCABULARY, MORE_VOCABULARY = 4, 12, 1024, 8192
"""Sequences, and tokens of the head, of the timed runs: so few cost what a batch costs, and the difference is well above the noise."""

LENGTH, NARROW_LENGTH = 512, 256
"""Tokens of a sequence, at most: of a layer of the model, and of the narrow one."""

DRAFTS = 4
"""Of `auto`, for each linear."""

INVERSES = 3
"""Factorisations of each factor in the curvature stage; half as many are counted for its rounding."""

FEEDBACK, SWEPT = 1.0, 0.5
"""Products of a linear with both of its factors: for its feedback, and for each sweep."""

REPLAY = 0.6
"""What a forward and backward pass takes of one in which curvature is summed, too."""

BACKWARD = 4
"""Forward passes that a prediction is: two of them, and the products with gradients of inputs and of weights."""

CONTINUED = 2 * PROMPTS * NEW_TOKENS * (PROMPT + NEW_TOKENS // 2)
"""Tokens that the original and what is written go through for the continuations of a report."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """What there is to do for some decoder layers, in multiply-adds or numbers of their linears, and of a head."""

    gradients: float
    """Multiply-adds of a token: forward, forward and backward, and sums of curvature."""
    forward: float
    """The same, forward."""
    moments: float
    """On both paths of the rounding sweep."""
    widths: float
    """Inputs and outputs of a token."""
    products: float
    """Multiply-adds of all linears with their factors of both sides, whatever the text."""
    cubes: float
    """Of the widths of all linears: factors are inverted."""
    squares: float
    """Entries of all factors."""
    head: float
    """Of a token: its width times the vocabulary."""
    weights: int


@dataclass(frozen=True, kw_only=True)
class Products:
    """Seconds of products and factorisations that are large enough."""

    product: float
    """For a multiply-add of large matrices in the type in which the model runs."""
    product32: float
    """In float32."""
    inverse: float
    """For a cube of the width of a matrix that is factorised in float64."""

    def factors_made(self, units: Units) -> float:
        """In the curvature stage, whatever the text."""
        return INVERSES * self.inverse * units.cubes

    def swept(self, units: Units, sweeps: int) -> float:
        """Of so many sweeps."""
        return SWEPT * sweeps * self.product32 * units.products

    def fed_back(self, units: Units) -> float:
        """Of rounding without sweeps."""
        return FEEDBACK * self.product32 * units.products + INVERSES / 2 * self.inverse * units.cubes


@dataclass(frozen=True, kw_only=True)
class Timing(Products):
    """Seconds for each of `Units`, beside what products take."""

    what: str
    """Which layer was timed."""
    waited: float
    """What part of the time of trying other programs had the processors."""
    gradients: float
    """For each width of a token."""
    forward: float
    moments: float
    predicted: float
    factors: float
    """For each entry of factors, in the curvature stage."""
    rounding: float
    """For each weight, without sweeps."""
    sweep: float
    """For each weight and one sweep more."""
    writing: float
    """For each weight."""
    head_gradients: float
    """For each number of the head: forward and backward."""
    head: float
    """Forward, of the original and of what is written."""
    reading: float
    """Seconds for a byte of weights that is read."""

    def curvature(self, units: Units, tokens: float) -> float:
        """Of a model whose curvature is collected on so many tokens, without its head."""
        text = tokens * (self.product * units.gradients + self.gradients * units.widths)
        return text + self.factors_made(units) + self.factors * units.squares

    def rounded(self, units: Units, sweeps: int) -> float:
        """Of rounding with feedback and so many sweeps, whatever the text."""
        return self.fed_back(units) + self.swept(units, sweeps) + (self.rounding + sweeps * self.sweep) * units.weights


def units_of(source: Source) -> Units:
    """Of all linears that are quantized."""
    used = _use_of_experts(source)
    forward = gradients = moments = widths = products = cubes = squares = 0.0
    for name, linear in source.linears.items():
        d_out, d_in = linear.out_features, linear.in_features
        use = used if experts_of(source.model, name) is not None else 1.0
        forward += use * d_out * d_in
        gradients += use * (5 * d_out * d_in + 2 * (d_in**2 + d_out**2))
        moments += use * (4 * d_out * d_in + 2 * d_in**2)
        widths += use * (d_in + d_out)
        products += d_in * d_out * (d_in + d_out)
        cubes += d_in**3 + d_out**3
        squares += d_in**2 + d_out**2
    embedding: Any = source.model.get_input_embeddings()
    return Units(
        gradients=gradients,
        forward=forward,
        moments=moments,
        widths=widths,
        products=products,
        cubes=cubes,
        squares=squares,
        head=float(embedding.num_embeddings * embedding.embedding_dim),
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


def seconds(recipe: Recipe, units: Units, timing: Timing, *, item: int, on_disk: bool = False) -> dict[str, float]:
    """Of each stage of a job; `item`: bytes of a weight in memory; `on_disk`: the model stays there, and continues no text."""
    length = recipe.seq_len
    collected, held = recipe.sequences * length, recipe.eval_sequences * length
    head, forward = timing.head_gradients * units.head, timing.product * units.forward + timing.forward * units.widths
    one_pass = REPLAY * (timing.product * units.gradients + timing.gradients * units.widths) + head
    found = {"text": 0.0}
    if recipe.calibration == "self":
        draws = -(-(recipe.sequences + (0 if recipe.eval_data else recipe.eval_sequences)) // SAMPLES_PER_PASS) * length
        found["text"] = draws * max(
            timing.reading * item * (units.weights + units.head), SAMPLES_PER_PASS * (forward + timing.product * units.head)
        )
    collected_on = 0 if imatrix_file(recipe) else collected
    found["curvature"] = timing.curvature(units, collected_on) + collected_on * head
    compared = DRAFTS if parse_curvature(recipe.curvature).held_out(recipe.sequences) else 0
    compared = compared if recipe.bits is None else len(recipe.used_schemes)
    found["curvature"] += compared * timing.rounded(units, 0)
    found["rounding"] = timing.rounded(units, recipe.sweeps)
    if recipe.corrects(collected):
        found["rounding"] += recipe.prefix_count * length * (timing.product * units.moments + timing.moments * units.widths)
        places, steps = recipe.natural_steps(recipe.sequences, length, weights=units.weights)
        found["rounding"] += places * steps * STEP_TOKENS * 2 * one_pass
    if recipe.tune != "none":
        found["tuning"] = recipe.steps * recipe.step_tokens * 2 * one_pass
    found["writing"] = timing.writing * units.weights + timing.reading * item * 4 * units.head
    found["evaluation"] = held * (2 * forward + timing.head * units.head)
    found["continuations"] = 0.0 if on_disk else CONTINUED * forward + timing.writing * units.weights
    predicted = BACKWARD * timing.product32 * units.forward + timing.predicted * units.widths
    found["prediction"] = PREDICTED * length * (predicted + head)
    return found


def timing_of(source: Source, names: list[str], recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Timing:
    """Runs the stages over one decoder layer of `names`; over a narrow one where that is too large, or cannot be run by itself."""
    layer = _usual(source.model, names)
    size = sum(p.numel() for p in source.model.get_submodule(layer).parameters())
    if size <= TIMED:
        settings = without_quantization(load_config(source.path))
        try:
            return _timed(settings, layer, f"{layer} of {size:,} weights", LENGTH, recipe, device, dtype)
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
        return _timed(narrow, "model.layers.0", what, NARROW_LENGTH, recipe, device, dtype)
    except SchemeError:  # its groups are of another width
        return _timed(
            narrow, "model.layers.0", what, NARROW_LENGTH, dataclasses.replace(recipe, scheme="int4-g64", rotate="auto"), device, dtype
        )


def _usual(model: nn.Module, names: list[str]) -> str:
    """The first layer of the kind that there are most of."""
    kinds = {name: tuple((own, tuple(p.shape)) for own, p in model.get_submodule(name).named_parameters()) for name in names}
    most = Counter(kinds.values()).most_common(1)[0][0]
    return next(name for name, kind in kinds.items() if kind == most)


def _timed(
    settings: PretrainedConfig, layer: str, what: str, longest: int, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> Timing:
    length, sweeps = min(recipe.seq_len, longest), max(1, recipe.sweeps)

    def run(count: int, vocabulary: int, sweeps: int, length: int) -> tuple[dict[str, float], Units]:
        given = dataclasses.replace(
            recipe,
            curvature="imatrix" if imatrix_file(recipe) else recipe.curvature,  # the file is not this model's
            sequences=count,
            prefix_sequences=count,
            eval_sequences=count,
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
            return _stages(alone, given, Path(scratch)), units_of(alone)

    run(FEW, VOCABULARY, 1, 16)  # compiled and warm
    began, began_alone = time.monotonic(), undisturbed()
    few, units = run(FEW, VOCABULARY, 0, length)
    more, _ = run(MORE, VOCABULARY, 0, length)
    wide, wider = run(FEW, MORE_VOCABULARY, sweeps, length)
    tokens, head = FEW * length, wider.head - units.head
    large = Products(product=_product(device, dtype), product32=_product(device, torch.float32), inverse=_inverting(device))

    def each_token(stage: str, products: float) -> float:
        """For each width, beside these products of a token."""
        all_of_it = max(more[stage] - few[stage], 0.05 * few[stage]) / ((MORE - FEW) * length)
        return max(all_of_it - products, 0.0) / units.widths

    def whatever_the_text(stage: str) -> float:
        return max(few[stage] - (more[stage] - few[stage]) * FEW / (MORE - FEW), 0.1 * few[stage])

    swept = max(wide["rounding"] - few["rounding"], 0.0) / sweeps
    return Timing(
        what=what,
        waited=1 - (undisturbed() - began_alone) / (time.monotonic() - began),
        **dataclasses.asdict(large),
        gradients=each_token("curvature", large.product * units.gradients),
        forward=each_token("evaluation", 2 * large.product * units.forward) / 2,  # the original, and what is written
        moments=each_token("rounding", large.product * units.moments),
        predicted=each_token("prediction", BACKWARD * large.product32 * units.forward),
        factors=max(0.0, whatever_the_text("curvature") - large.factors_made(units)) / units.squares,
        rounding=max(0.0, whatever_the_text("rounding") - large.fed_back(units)) / units.weights,
        sweep=max(0.0, swept - large.swept(units, 1)) / units.weights,
        writing=few["writing"] / units.weights,
        head_gradients=max(0.0, wide["curvature"] - few["curvature"]) / (tokens * head),
        head=max(0.0, wide["evaluation"] - few["evaluation"]) / (tokens * head),
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
    predict(recipe, source, split, rounded, notes, batch_size=batch, work=work, sequences=recipe.sequences)
    return notes.seconds


def undisturbed() -> float:
    """A clock that stands still while the thread that has waited longest waits for a processor (where Linux tells)."""
    waits = [0]
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has ended
            waits.append(int(task.read_text(encoding="ascii").split()[1]))
    return time.monotonic() - max(waits) / 1e9


def _product(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds for a multiply-add of matrices that are large enough."""
    rows, width = 2048, 1024
    left, right = (torch.ones(n, width, device=device, dtype=dtype) for n in (rows, width))
    (left @ right).sum().item()
    began = undisturbed()
    (left @ right).sum().item()
    return (undisturbed() - began) / (rows * width**2)


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
