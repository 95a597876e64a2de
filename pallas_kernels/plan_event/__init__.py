"""Significance to tiers."""

from .api import COUNT_MOVES as COUNT_MOVES, count_moves as count_moves
from .reference import (
    DROPPED as DROPPED,
    HIGH as HIGH,
    LOW as LOW,
    Moves as Moves,
    Rule as Rule,
    classify as classify,
    mean_significance as mean_significance,
    scored_by as scored_by,
    stored_victims as stored_victims,
)
