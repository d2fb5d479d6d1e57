"""Measured speed: interleaved runs, oracles, memory; what they say is foveate.measure's."""

from foveate.bench.images import Images, natural_images, read_images
from foveate.bench.oracle import Counts, Oracle
from foveate.bench.result import Cell, Result
from foveate.bench.run import DTYPES, explain, speed
from foveate.bench.timing import Interval, Timings, measure, median_of

__all__ = [
    "DTYPES",
    "Cell",
    "Counts",
    "Images",
    "Interval",
    "Oracle",
    "Result",
    "Timings",
    "explain",
    "measure",
    "median_of",
    "natural_images",
    "read_images",
    "speed",
]
