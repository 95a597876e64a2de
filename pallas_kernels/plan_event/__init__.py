"""Significance to tiers."""

from .api import COUNT_MOVES as COUNT_MOVES
from .api import count_moves as count_moves
from .reference import DROPPED as DROPPED
from .reference import HIGH as HIGH
from .reference import LOW as LOW
from .reference import Moves as Moves
from .reference import Rule as Rule
from .reference import classify as classify
from .reference import mean_significance as mean_significance
from .reference import stored_victims as stored_victims
