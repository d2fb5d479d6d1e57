"""Search for the method and schedule that change a model least, on images without labels."""

from foveate.tuning.result import Tuned
from foveate.tuning.run import tune

__all__ = ["Tuned", "tune"]
