"""Pure functions on tensors and integers. Nothing here knows a model or a method."""

from foveate.ops.match import alternate_split, best_partner, pairwise, unit
from foveate.ops.noise import hashed
from foveate.ops.order import highest_first, marked_first
from foveate.ops.sample import inverse_transform, nearest

__all__ = [
    "alternate_split",
    "best_partner",
    "hashed",
    "highest_first",
    "inverse_transform",
    "marked_first",
    "nearest",
    "pairwise",
    "unit",
]
