"""Products of a few rows with a model's weights."""

from .api import linear as linear
from .api import sum_of_rows as sum_of_rows
