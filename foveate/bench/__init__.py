"""Measure speed in interleaved runs, oracles and memory; foveate.measure reports the results."""

from foveate.bench.images import Images, natural_images, read_images
from foveate.bench.lineup import CALIBRATION_IMAGES, DTYPES
from foveate.bench.oracle import Counts, Oracle
from foveate.bench.result import Cell, Result
from foveate.bench.run import explain, speed
from foveate.timing import Interval, Timings, measure, median_of

__all__ = [
    "CALIBRATION_IMAGES",
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
