"""PyramidKV (arXiv:2406.02069): SnapKV with budgets that shrink linearly with depth."""

import dataclasses
from typing import Unpack

from diffkv_jax.methods.evicting import Options
from diffkv_jax.methods.snapkv import snapkv
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy


def pyramidkv(
    keep: Amount = 0.5, *, kernel_size: int = 5, **options: Unpack[Options]
) -> CompressionPolicy:
    """PyramidKV: `keep` is the mean over the layers."""
    policy = snapkv(keep, kernel_size=kernel_size, **options)
    return dataclasses.replace(policy, name="pyramidkv", keep=Budget(keep=keep, layers="pyramid"))
