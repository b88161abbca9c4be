"""The rounding of a whole model. The mathematics of one weight is in `roundel.rounding`."""

from roundel.stages.rounding.allocation import Chosen, choose_schemes
from roundel.stages.rounding.model import Rounded, round_model, rounding_digest

__all__ = ["Chosen", "Rounded", "choose_schemes", "round_model", "rounding_digest"]
