"""Which kernels run a policy on a model."""

import logging
from typing import Literal

from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.policy.policy import CompressionPolicy


def kernels_for(
    policy: CompressionPolicy,
    attention: AttentionSpec,
    implementation: str | None = None,
    *,
    interpret: bool = False,
) -> Kernels:
    """The kernels asked for, or those of the platform; plain XLA where only it can do what policy
    and model ask for.

    The log says so, and also where of the kernels only decode attention can
    (`CacheSpec.page_kernels`).

    Raises:
        ValueError: the kernels asked for cannot run here, or do not know what policy and model ask
            for.
    """
    kernels = Kernels.resolve(implementation, interpret=interpret)
    known, log = known_operations(policy, attention), logging.getLogger(__name__)
    if kernels.implementation == "xla" or known == "all":
        return kernels
    if known == "decode attention":
        log.info(
            "policy %r: decode attention runs on %r, prefill attention and events in plain XLA",
            policy.name,
            kernels.implementation,
        )
        return kernels
    if implementation is not None:
        raise ValueError(
            f"policy {policy.name!r} runs in plain XLA only: leave "
            f"implementation={implementation!r} out or take 'xla'"
        )
    reason = "its codecs or transforms, or the model's latent, are not in the platform's kernels"
    log.info("policy %r runs in plain XLA: %s", policy.name, reason)
    return XLA


def known_operations(
    policy: CompressionPolicy, attention: AttentionSpec
) -> Literal["all", "decode attention", "nothing"]:
    """Which of the kernels' operations know what policy and model ask of the pages."""
    if attention.latent is not None or policy.group is not None or policy.pairs is not None:
        return "nothing"
    formats = [KVFormat.parse(tier) for tier in policy.tiers]
    if not policy.transform.position_free and all(fmt.in_kernels for fmt in formats):
        return "all"
    return "decode attention" if all(fmt.in_decode_kernels for fmt in formats) else "nothing"
