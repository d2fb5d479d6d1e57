"""Search of the method and schedule that a model loses least with, on images without labels."""

from foveate.tuning.result import Tuned
from foveate.tuning.run import tune

__all__ = ["Tuned", "tune"]
