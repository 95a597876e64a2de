"""What a policy costs: distributions against the full cache's, tasks, and a command line
(`python -m diffkv_jax.evaluation --help`).
"""

from diffkv_jax.evaluation.divergence import (
    Estimate as Estimate,
    Quality as Quality,
    Summary as Summary,
    quality as quality,
)
from diffkv_jax.evaluation.forcing import teacher_forced as teacher_forced
