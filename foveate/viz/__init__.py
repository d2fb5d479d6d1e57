"""Draw what any method does to an image, from its trace.

``draw``, ``heat`` and ``sheet`` take models and images. ``kept``, ``groups``, ``depth`` and
``brought_back`` take an existing trace and draw one of its images. ``usage`` measures a data
set with objects, and ``usage_figure`` draws the result. ``Walk`` has a picture for each block.
"""

from foveate.viz.answers import answers
from foveate.viz.captions import caption
from foveate.viz.found import found_objects, found_pixels
from foveate.viz.layout import stacked
from foveate.viz.relevance import HEATS, heat_map
from foveate.viz.show import KINDS, SHEETS, draw, heat, sheet
from foveate.viz.tokens import brought_back, depth, groups, kept
from foveate.viz.usage import Usage, UsageSums, usage, usage_figure
from foveate.viz.walk import Walk

__all__ = [
    "HEATS",
    "KINDS",
    "SHEETS",
    "Usage",
    "UsageSums",
    "Walk",
    "answers",
    "brought_back",
    "caption",
    "depth",
    "draw",
    "found_objects",
    "found_pixels",
    "groups",
    "heat",
    "heat_map",
    "kept",
    "sheet",
    "stacked",
    "usage",
    "usage_figure",
]
