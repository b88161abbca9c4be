"""What has been made already, for other engines: codes in another format, curvature as an importance matrix. Nothing is rounded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roundel.artifacts.checkpoints import check_apart, read, write
from roundel.artifacts.factors import FactorsDirectory
from roundel.curvature import Sketch
from roundel.errors import FactorsError, ModelError, OutputError, SchemeError, damaged, in_layer
from roundel.formats import FORMATS, gguf, imatrix
from roundel.grids import parse_scheme
from roundel.models import locate
from roundel.models.load import model_type
from roundel.progress import Progress, Silent
from roundel.recipes import WRITTEN, check_format
from roundel.stages.report import write_report
from roundel.store import check_output, staged_directory, staged_file, storage

__all__ = ["export", "export_imatrix"]


def export(
    source: str | Path, *, output: str | Path, to: str, model: str | Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes a directory that `quantize` has written in another format, with the same codes: nothing is rounded again.

    Args:
        source: In a format that keeps codes: any but dense and gguf.
        output: Directory to make; must not exist, or be empty.
        to: A format: any of `quantize`, of which `gguf:TYPE` must name the scheme.
        model: Another copy of the original, for the tokenizer; by default that in `source`.
        progress: Where to report; silent by default.

    Returns:
        The contents of the new roundel.json.

    Raises:
        RoundelError: see `roundel.errors`; no output is left then.
    """
    progress, path, target = progress or Silent(), Path(source), Path(output)
    check_output(target)
    form, _, kind = to.partition(":")
    if form not in WRITTEN:
        raise SchemeError(f"format {to!r}: expected one of {', '.join(WRITTEN)}, or gguf:TYPE")
    stored = read(path)
    frame = stored.frame.held_by(form)
    if model is not None:
        frame = dataclasses.replace(frame, directory=locate(str(model)))
    if form in FORMATS:
        FORMATS[form].check_mixture(weight.scheme for weight in stored.rounded.values())
    for module, weight in stored.rounded.items():
        rotation = getattr(weight.rotation, "kind", None)
        with in_layer(module):
            grid = parse_scheme(weight.scheme)
            check_format(form, grid, rotation)
            if form in FORMATS:
                FORMATS[form].check_shape(grid, *weight.shape)
            if kind not in ("", weight.scheme):
                raise SchemeError(
                    f"rounded to {weight.scheme}, not to {kind}: export carries codes over; quantize again with --scheme {kind}"
                )
    with damaged(ModelError, path / "roundel.json"):
        name = Path(stored.report["model"]["name"]).name
        if any("part_of" in row for row in stored.report["layers"].values()):
            check_apart(form)
    if form == "gguf":
        gguf.check_model(frame.directory, frame.config, frame.sizes)
    with staged_directory(target) as staging, progress.stage("writing", len(frame.sizes)) as advance:
        written = write(staging, frame, stored.rounded, form, name=name, advance=advance)
        with damaged(ModelError, path / "roundel.json"):
            details = {**stored.report, "format": form, "exported_from": stored.form}
            details["recipe"] = {**stored.report["recipe"], "format": form}
            parameters = stored.report["model"]["parameters"]
            details["bits_per_weight"] = {**stored.report["bits_per_weight"], "model": 8 * written / parameters}
            write_report(staging, details)
    return details


def export_imatrix(
    factors: str | Path, *, output: str | Path, model: str | Path | None = None, progress: Progress | None = None
) -> imatrix.Imatrix:
    """Writes the curvature of each linear's input columns as llama.cpp's importance matrix.

    Args:
        factors: A complete directory that `collect_factors` made.
        output: The GGUF file to write.
        model: Whose config.json tells the architecture, and so the tensors' names; by default the one that the factors name.
        progress: Where to warn of linears that are left out; silent by default.

    Returns:
        What was written.

    Raises:
        RoundelError: see `roundel.errors`.
    """
    progress, target = progress or Silent(), Path(output)
    if target.is_dir():
        raise OutputError(f"{target} is a directory: expected the name of a file to write")
    check_output(target)
    stored = FactorsDirectory.open(Path(factors))
    stored.check_complete()
    header = stored.header
    try:
        kind = model_type(str(model or header.model))
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(f"{error}; the factors name this model: give another copy with --model") from error
    architecture = imatrix.architecture(kind)
    names = imatrix.tensor_names(architecture, header.layers)
    values: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for module in header.layers:
        if module not in names:
            progress.warn(f"{module} is left out: llama.cpp has no matrix with its columns")
            continue
        sketch, _ = stored.restore(module, torch.device("cpu"))  # one at a time: the sums of all of them are large
        weights = _column_weights(sketch)
        if weights is None:
            progress.warn(f"{module} is left out: no usable gradient reached it")
            continue
        values[names[module]], counts[names[module]] = weights, sketch.tokens
    if not values:
        raise FactorsError(f"none of the factors' linears has a matrix in llama.cpp's {architecture}")
    matrix = imatrix.Imatrix(
        architecture=architecture,
        dataset=header.calibration,
        sequences=len(header.sequence_ids),
        seq_len=header.seq_len,
        values=values,
        counts=counts,
    )
    with storage(target):
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with staged_file(target) as temporary:
        imatrix.write(temporary, matrix)
    return matrix


def _column_weights(sketch: Sketch) -> Tensor | None:
    """`sum_i F_ij,ij` of the estimated Fisher for each column `j`, `(d_in,)`, scaled; None where the factors are not usable.

    Readers use only ratios of weights. Where the estimator has summed up `x x^T` the mean is that of `E[x_j^2]`, so that the
    weights of `activation` are exactly those of llama-imatrix; else it is 1.
    """
    total = torch.zeros(sketch.d_in, dtype=torch.float64)
    for _, group in sketch.factors().row_groups():
        total += group.scale * group.H_out.diagonal().sum(dtype=torch.float64) * group.H_in.diagonal().double()
    if not (torch.isfinite(total).all() and total.sum() > 0):
        return None
    squares = [total.diagonal().double().mean() for name, total in sketch.sums.items() if name.rpartition(".")[2] == "xx"]
    return total * (squares[0] / sketch.tokens if squares else 1.0) / total.mean()
