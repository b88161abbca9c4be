"""`quantize`, `tune`, `export`: what writes a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roundel.commands.line.options import (
    DEFAULT,
    Batch,
    Device,
    Dtype,
    JsonFile,
    Memory,
    Output,
    Quiet,
    TuneMethod,
    TuneRest,
    TuneSteps,
    TuneTokens,
    Work,
    Written,
    count_or_auto,
    recipe_settings,
)
from roundel.commands.line.output import emit, print_rows

if TYPE_CHECKING:
    from roundel.stages.report import Quantized

__all__ = ["export", "quantize", "tune"]


def quantize(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Local directory, Hub id, or demo for the embedded model.")],
    output: Output,
    effort: Annotated[
        str,
        typer.Option(
            help="quick, normal or best: how much text and time; sets curvature, sequences, sweeps and tuning where they are not given."
        ),
    ] = DEFAULT.effort,
    scheme: Annotated[
        str,
        typer.Option(
            help="Integers: intB-gN, intB-channel, intB-tensor, B from 2 to 8, with -asym for zero points, -affine for biases (int4-g128, "
            "int3-g64-asym). Floats: fp8, mxfp4, nvfp4. With rounded activations: int8-channel-a8, fp8-a8, nvfp4-a4. "
            "llama.cpp's blocks: q8_0, q6_k, q5_k, q5_0, q4_k, q4_0, iq4_nl, iq4_xs, q3_k, q2_k, iq3_s, iq3_xxs, iq2_s, iq2_xs, iq2_xxs. "
            "Vectors: lattice2, trellisB[-CODE], B from 1 to 8 (trellis2, trellis3-hyb)."
        ),
    ] = DEFAULT.scheme,
    curvature: Annotated[
        str,
        typer.Option(
            help="auto, identity, activation (GPTQ), kfac, sketch-a[:rounds=N], sketch-b[:rounds=N], mean, pilot, "
            "power[:rounds=N], fastkron[:steps=N][:batch=N], guided[:groups=N], diagonal[:of=NAME], "
            "triangular[:rounds=N][:shrinkage=X], or llama.cpp's: imatrix[:FILE]."
        ),
    ] = DEFAULT.curvature,
    labels: Annotated[
        str,
        typer.Option(
            help="What is sent back from the logits: sampled (labels drawn from the model), probe (random signs, the same Fisher) "
            "or data (the text's next tokens: the empirical Fisher)."
        ),
    ] = DEFAULT.labels,
    factor_type: Annotated[
        str,
        typer.Option(help="In which type curvature lies on the disk until a layer is rounded: float32, or bfloat16 in half of the space."),
    ] = DEFAULT.factor_type,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="Text or .jsonl file, directory, Hub dataset (name:split=train:num=1000:field=text), stdlib, or self (sampled).",
        ),
    ] = DEFAULT.calibration,
    sequences: Annotated[
        Any, typer.Option(parser=count_or_auto, metavar="N|auto", help="Calibration sequences; auto: until more are of no use.")
    ] = DEFAULT.sequences,
    seq_len: Annotated[int, typer.Option(help="Tokens in each, at most the model's positions.")] = DEFAULT.seq_len,
    eval_data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Evaluation text; default: held out from the calibration text.")
    ] = None,
    eval_sequences: Annotated[int, typer.Option(help="Evaluation sequences.")] = DEFAULT.eval_sequences,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Average bits per weight, scales included: each linear gets that of several schemes with which this loses least."
        ),
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="In the place of --bits: how large all tensors may be, such as 1.5G; in GGUF, the file."),
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="With --bits: the schemes to choose from; default: --scheme with 1 to 8 bits.")
    ] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="One of llama.cpp's mixes of types, such as q4_k_m or q2_k_s; also as format gguf:q4_k_m."),
    ] = None,
    embedding: Annotated[
        str,
        typer.Option(
            metavar="SCHEME",
            help="Of the embedding: a scheme, none (16 bits), or auto: what the format's own tools do (gguf, mlx; else none).",
        ),
    ] = DEFAULT.embedding,
    head: Annotated[
        str, typer.Option(metavar="SCHEME", help="The same of the output head; where both are one matrix this decides.")
    ] = DEFAULT.head,
    kv_cache: Annotated[
        str,
        typer.Option(
            help="fp8: engines keep keys and values in 8 bits, with scales from the calibration text (compressed-tensors); none: as the "
            "model has them."
        ),
    ] = DEFAULT.kv_cache,
    rotate: Annotated[
        str,
        typer.Option(
            help="Random rotation of weights before rounding: auto (online for trellises and lattices), none, fused (into the model's "
            "weights: nothing is left to do at run time), online (undone at run time) or online128 (in blocks of 128)."
        ),
    ] = DEFAULT.rotate,
    format: Annotated[
        str,
        typer.Option(
            help="compressed-tensors (vLLM, Transformers), gguf or gguf:TYPE (llama.cpp), mlx (mlx-lm), exl3 (exllamav3), gptq, awq, "
            "auto-round, native (any scheme; Transformers with roundel), dense (rounded values in the original's type), or auto: "
            "what most engines load."
        ),
    ] = DEFAULT.format,
    sweeps: Annotated[
        int, typer.Option(help="Rounds of scale refitting and coordinate descent over whole weights; 0: feedback alone.")
    ] = DEFAULT.sweeps,
    damping: Annotated[float, typer.Option(help="Added to each factor's diagonal, relative to its mean.")] = DEFAULT.damping,
    prefix_aware: Annotated[
        bool | None,
        typer.Option(
            "--prefix-aware/--no-prefix-aware",
            help="Later linears make up for the errors of those rounded before; default: with 8192 tokens of calibration text or more.",
        ),
    ] = DEFAULT.prefix_aware,
    prefix_sequences: Annotated[
        int | None,
        typer.Option(help="Sequences run through what is rounded already, for that; default: --sequences, or 192 if the text has them."),
    ] = DEFAULT.prefix_sequences,
    prefix_strength: Annotated[
        float, typer.Option(help="How much of the correction for the rounded layers' other inputs is taken, 0 to 1.")
    ] = DEFAULT.prefix_strength,
    stream_strength: Annotated[
        float, typer.Option(help="How much of the correction for the residual stream's error is taken, 0 to 1.")
    ] = DEFAULT.stream_strength,
    prefix_damping: Annotated[
        float, typer.Option(help="Added to the diagonal of the inputs' second moment, relative to its mean.")
    ] = DEFAULT.prefix_damping,
    natural_places: Annotated[
        int | None,
        typer.Option(
            help="At how many places of the depth what is not rounded yet takes steps down the KL of the whole model; "
            "default: 2, or 4 with much text; none with more than 34 million weights."
        ),
    ] = DEFAULT.natural_places,
    tune: TuneMethod = DEFAULT.tune,
    tune_steps: TuneSteps = DEFAULT.tune_steps,
    tune_tokens: TuneTokens = DEFAULT.tune_tokens,
    tune_rest: TuneRest = DEFAULT.tune_rest,
    seed: Annotated[int, typer.Option(help="Seeds the choice of sequences and the labels.")] = DEFAULT.seed,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Only linears that match, like '*.mlp.*' or 're:layers\\.[0-3]\\.'; repeatable."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="No linears that match; repeatable.")] = None,
    factors: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Use these collected factors, with their curvature, labels, text and seed.")
    ] = None,
    work: Work = None,
    memory: Memory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL into a directory that Transformers and vLLM load."""
    from roundel.progress import make_progress
    from roundel.stages.quantize import quantize as run

    settings = recipe_settings(context, locals())
    result = run(
        model,
        output=output,
        factors=factors,
        work=work,
        memory=memory,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        progress=make_progress(quiet=quiet),
        **settings,
    )
    _show_quantized(result, model, json_file, quiet=quiet)


def tune(
    directory: Written,
    output: Output,
    method: TuneMethod = "end-to-end",
    steps: TuneSteps = DEFAULT.tune_steps,
    step_tokens: TuneTokens = DEFAULT.tune_tokens,
    rest: TuneRest = DEFAULT.tune_rest,
    calibration: Annotated[str | None, typer.Option(metavar="SPEC", help="Other text than it was quantized with.")] = None,
    sequences: Annotated[int | None, typer.Option(help="Another number of sequences.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed of the choice and order of sequences.")] = None,
    model: Annotated[str | None, typer.Option(help="The original, if it is not where roundel.json says.")] = None,
    work: Work = None,
    memory: Memory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Batch = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Tune the codes and scales of a quantized model, and write it in the same format."""
    from roundel.progress import make_progress
    from roundel.stages.tune import tune as run

    others = {"calibration": calibration, "sequences": sequences, "seed": seed}
    result = run(
        directory,
        output=output,
        model=model,
        work=work,
        memory=memory,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        progress=make_progress(quiet=quiet),
        tune=method,
        tune_steps=steps,
        tune_tokens=step_tokens,
        tune_rest=rest,
        **{name: value for name, value in others.items() if value is not None},
    )
    _show_quantized(result, str(directory), json_file, quiet=quiet)


def export(
    source: Written,
    to: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="compressed-tensors, gguf, gguf:TYPE, mlx, exl3, gptq, awq, auto-round, native or dense."),
    ],
    output: Output,
    model: Annotated[str | None, typer.Option(help="A copy of the original to take the tokenizer from; default: that in SOURCE.")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a quantized model in another engine's format, with the same codes and scales."""
    from roundel.progress import make_progress
    from roundel.stages.export import export as run

    details = run(source, output=output, to=to, model=model, progress=make_progress(quiet=quiet))
    if not quiet:
        bits = details["bits_per_weight"]["model"]
        print(f"{output}: {len(details['layers'])} linears in {details['format']}, {bits:.3f} bits per weight of the whole checkpoint")


def _show_quantized(result: Quantized, model: str, json_file: Path | None, *, quiet: bool) -> None:
    from roundel.evaluate.report import checkpoint_rows

    emit(result.details, json_file)
    if not quiet and str(json_file) != "-":
        print_rows(f"{model} in {result.details['scheme']}", checkpoint_rows(result.details))
        print(f"{result.path}: written; report.html shows what was measured, roundel.json has every layer's numbers")
