"""Measured speed: interleaved runs, oracles, memory, and what may be said of them."""

from foveate.bench.images import Images, natural_images, read_images
from foveate.bench.oracle import Counts, Oracle
from foveate.bench.result import (
    BreakEven,
    Cell,
    Comparison,
    Result,
    Row,
    Variant,
    compare,
    compare_all,
)
from foveate.bench.run import DTYPES, explain, speed
from foveate.bench.timing import Interval, Timings, measure, median_of

__all__ = [
    "DTYPES",
    "BreakEven",
    "Cell",
    "Comparison",
    "Counts",
    "Images",
    "Interval",
    "Oracle",
    "Result",
    "Row",
    "Timings",
    "Variant",
    "compare",
    "compare_all",
    "explain",
    "measure",
    "median_of",
    "natural_images",
    "read_images",
    "speed",
]
