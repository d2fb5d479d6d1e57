"""Tokens, schedules, attention, gates and the driver: what every method and family shares."""

from foveate.core.attention import AttentionReader, Heads, attend
from foveate.core.backbone import Backbone, BackboneSpec, Embedded, pool_mask, pool_tokens
from foveate.core.chain import Chain
from foveate.core.context import Context
from foveate.core.cost import linear_cost
from foveate.core.driver import ReducedViT, dense
from foveate.core.gated import GatedReducer
from foveate.core.gates import decide, shift_odds
from foveate.core.layout import Layout
from foveate.core.reducer import Match, MatchReducer, Reducer, ScoreReducer
from foveate.core.schedule import (
    Schedule,
    check_blocks,
    check_choice,
    check_keep,
    check_removed,
    split_evenly,
    stage_blocks,
)
from foveate.core.selection import Selection
from foveate.core.tokens import TokenState
from foveate.core.trace import BlockTrace, Outcome, Recorder, Trace
from foveate.core.windows import Windows

__all__ = [
    "AttentionReader",
    "Backbone",
    "BackboneSpec",
    "BlockTrace",
    "Chain",
    "Context",
    "Embedded",
    "GatedReducer",
    "Heads",
    "Layout",
    "Match",
    "MatchReducer",
    "Outcome",
    "Recorder",
    "ReducedViT",
    "Reducer",
    "Schedule",
    "ScoreReducer",
    "Selection",
    "TokenState",
    "Trace",
    "Windows",
    "attend",
    "check_blocks",
    "check_choice",
    "check_keep",
    "check_removed",
    "decide",
    "dense",
    "linear_cost",
    "pool_mask",
    "pool_tokens",
    "shift_odds",
    "split_evenly",
    "stage_blocks",
]
