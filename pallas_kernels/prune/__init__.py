"""Significance to tiers."""

from .reference import DROPPED as DROPPED
from .reference import HIGH as HIGH
from .reference import LOW as LOW
from .reference import classify as classify
from .reference import least_significant as least_significant
from .reference import mean_significance as mean_significance
