"""Several jobs one after another: pre-train, fine-tune, reduce, evaluate, and one report."""

from foveate.stages.recipe import Measured, Pipeline, Stage
from foveate.stages.run import run

__all__ = ["Measured", "Pipeline", "Stage", "run"]
