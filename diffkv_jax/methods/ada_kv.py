"""Ada-KV (arXiv:2407.11550): the KV heads of a layer share their budgets."""

import dataclasses

from diffkv_jax.arguments import instance, number
from diffkv_jax.policy.keep import Budget
from diffkv_jax.policy.policy import CompressionPolicy


def ada_kv(policy: CompressionPolicy, floor: float = 0.2) -> CompressionPolicy:
    """Ada-KV over a policy with budgets: each head keeps at least `floor` of its own, the rest goes
    to the best tokens of all.

    Raises:
        TypeError: it is no policy.
        ValueError: the policy has thresholds instead.
    """
    instance("policy", policy, CompressionPolicy, "diffkv_jax.load_policy makes one of a name")
    floor = number("floor", floor, least=0, most=1)
    if not isinstance(policy.keep, Budget):
        raise ValueError(
            f"ada_kv needs a policy with keep=Budget(...), given {policy.name!r} with "
            f"{policy.keep}, which is adaptive already"
        )
    keep = dataclasses.replace(policy.keep, share_heads=floor)
    return dataclasses.replace(policy, name=f"ada_kv({policy.name})", keep=keep)
