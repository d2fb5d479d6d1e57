"""Evaluation: accuracy, occlusion, pruning without training, statistics of tokens, and reports."""

from foveate.evaluate.answers import Accuracy, Batch, Batches, Seeded, Tally, accuracy
from foveate.evaluate.convergence import convergence
from foveate.evaluate.occlusion import RATIOS, Occlusion, occlusion
from foveate.evaluate.output import write
from foveate.evaluate.pruning import RATES, Pruned, prune, pruning
from foveate.evaluate.rates import DENSE, Row, at_rate, by_rate, measure, variants
from foveate.evaluate.report import Entry, Report
from foveate.evaluate.run import Plan, evaluate
from foveate.evaluate.speed import Speed, speeds
from foveate.evaluate.statistics import Spread, TokenStatistics, token_statistics

__all__ = [
    "DENSE",
    "RATES",
    "RATIOS",
    "Accuracy",
    "Batch",
    "Batches",
    "Entry",
    "Inputs",
    "Occlusion",
    "Plan",
    "Pruned",
    "Report",
    "Row",
    "Seeded",
    "Speed",
    "Spread",
    "Tally",
    "TokenStatistics",
    "accuracy",
    "at_rate",
    "by_rate",
    "convergence",
    "evaluate",
    "measure",
    "occlusion",
    "prune",
    "pruning",
    "speeds",
    "token_statistics",
    "variants",
    "write",
]
