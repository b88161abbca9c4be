"""Estimators of `H_out` and `H_in`, one file each.

An `Estimator` holds settings and says how many passes over the data it needs; for each pass and linear it starts a `Sketch`: running sums
of a gradient stream. A new estimator is one file and one entry in `ESTIMATORS`.
"""

import dataclasses

from roundel.curvature.sketches.activation import Activation
from roundel.curvature.sketches.base import Estimator, Sketch
from roundel.curvature.sketches.identity import Identity
from roundel.curvature.sketches.kfac import Kfac
from roundel.curvature.sketches.mean import Mean
from roundel.curvature.sketches.sketch_a import SketchA
from roundel.curvature.sketches.sketch_b import SketchB
from roundel.errors import SchemeError

__all__ = ["ESTIMATORS", "Activation", "Estimator", "Identity", "Kfac", "Mean", "Sketch", "SketchA", "SketchB", "parse_curvature"]

ESTIMATORS: dict[str, type[Estimator]] = {
    "identity": Identity,
    "activation": Activation,
    "kfac": Kfac,
    "sketch-a": SketchA,
    "sketch-b": SketchB,
    "mean": Mean,
}


def parse_curvature(spec: str) -> Estimator:
    """The estimator of a name with settings, such as `kfac` or `sketch-a:rounds=3`.

    Raises:
        SchemeError: unknown name or setting.
    """
    name, _, settings = spec.partition(":")
    if name not in ESTIMATORS:
        raise SchemeError(f"unknown curvature {name!r}: expected one of {', '.join(ESTIMATORS)}")
    kind = ESTIMATORS[name]
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, int] = {}
    for setting in filter(None, settings.split(":")):
        key, _, value = setting.partition("=")
        if key not in known or not value.isdecimal():
            expected = ", ".join(f"{k}=INTEGER" for k in sorted(known)) or "no settings"
            raise SchemeError(f"curvature {name!r} does not take {setting!r}: expected {expected}")
        values[key] = int(value)
    return kind(**values)
