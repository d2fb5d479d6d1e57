"""Comparisons: methods, rates, seeds and base models under one protocol."""

from foveate.compare.cells import Cell, Key, make_cells
from foveate.compare.numbers import Number
from foveate.compare.settings import Comparison
from foveate.compare.state import State, states_of

__all__ = ["Cell", "Comparison", "Key", "Number", "State", "make_cells", "states_of"]
