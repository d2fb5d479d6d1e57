"""Measure accuracy, occlusion, pruning, tokens and speed; all numbers go into one table."""

from foveate.measure.accuracy import Accuracy, Tally, accuracy, costs
from foveate.measure.dense import evaluate_dense
from foveate.measure.occlusion import RATIOS, occlusion
from foveate.measure.pruning import RATES, prune, pruning
from foveate.measure.report import write
from foveate.measure.run import Evaluation, Plan, evaluate
from foveate.measure.speed import speeds
from foveate.measure.table import COLUMNS, Results, frame, one, over_seeds, select
from foveate.measure.tokens import TokenStatistics, token_statistics
from foveate.measure.variants import DENSE, at_rate, variants

__all__ = [
    "COLUMNS",
    "DENSE",
    "RATES",
    "RATIOS",
    "Accuracy",
    "Evaluation",
    "Plan",
    "Results",
    "Tally",
    "TokenStatistics",
    "accuracy",
    "at_rate",
    "costs",
    "evaluate",
    "evaluate_dense",
    "frame",
    "occlusion",
    "one",
    "over_seeds",
    "prune",
    "pruning",
    "select",
    "speeds",
    "token_statistics",
    "variants",
    "write",
]
