"""Estimators of `H_out` and `H_in`, one file each.

An `Estimator` holds settings and says how many passes over the data it needs; for each pass and linear it starts a `Sketch`: running sums
of a gradient stream. A new estimator is one file and one entry in `ESTIMATORS`.
"""

import dataclasses
from typing import Any, get_type_hints

from roundel.curvature.sketches.activation import Activation
from roundel.curvature.sketches.auto import Auto
from roundel.curvature.sketches.base import Candidate, Estimator, Sketch
from roundel.curvature.sketches.diagonal import Diagonal
from roundel.curvature.sketches.fastkron import FastKron
from roundel.curvature.sketches.guided import Guided
from roundel.curvature.sketches.identity import Identity
from roundel.curvature.sketches.imatrix import Imatrix
from roundel.curvature.sketches.kfac import Kfac
from roundel.curvature.sketches.mean import Mean
from roundel.curvature.sketches.pilot import Pilot
from roundel.curvature.sketches.power import Power
from roundel.curvature.sketches.sketch_a import SketchA
from roundel.curvature.sketches.sketch_b import SketchB
from roundel.curvature.sketches.triangular import Triangular
from roundel.errors import SchemeError

__all__ = [
    "ESTIMATORS",
    "Activation",
    "Auto",
    "Candidate",
    "Diagonal",
    "Estimator",
    "FastKron",
    "Guided",
    "Identity",
    "Imatrix",
    "Kfac",
    "Mean",
    "Pilot",
    "Power",
    "Sketch",
    "SketchA",
    "SketchB",
    "Triangular",
    "parse_curvature",
]

ESTIMATORS: dict[str, type[Estimator]] = {
    "auto": Auto,
    "identity": Identity,
    "imatrix": Imatrix,
    "activation": Activation,
    "kfac": Kfac,
    "sketch-a": SketchA,
    "sketch-b": SketchB,
    "pilot": Pilot,
    "mean": Mean,
    "power": Power,
    "fastkron": FastKron,
    "guided": Guided,
    "triangular": Triangular,
    "diagonal": Diagonal,
}

_PLACEHOLDERS = {int: "INTEGER", float: "NUMBER", str: "NAME"}
"""The types that a setting can have, and how a message calls their values."""


def parse_curvature(spec: str) -> Estimator:
    """The estimator of a name with settings, such as `kfac`, `sketch-a:rounds=3`, `triangular:rounds=1:shrinkage=0.3`; or `imatrix:FILE`.

    Raises:
        SchemeError: unknown name or setting, or a value that the setting cannot have.
    """
    name, _, settings = spec.partition(":")
    if name not in ESTIMATORS:
        raise SchemeError(f"unknown curvature {name!r}: expected one of {', '.join(ESTIMATORS)}")
    kind = ESTIMATORS[name]
    if kind is Imatrix:
        return Imatrix(file=settings)
    hints = get_type_hints(kind)
    known = {field.name: hints[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(":")):
        key, _, value = setting.partition("=")
        try:
            values[key] = known[key](value)
        except (KeyError, ValueError):
            expected = ", ".join(f"{k}={_PLACEHOLDERS[known[k]]}" for k in sorted(known)) or "no settings"
            raise SchemeError(f"curvature {name!r} does not take {setting!r}: expected {expected}") from None
    return kind(**values)
