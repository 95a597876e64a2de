"""Which kernels run a policy on a model."""

import logging
from typing import Literal

from diffkv_jax.cache.layout import layout_of
from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.apply_event import APPLY_EVENT
from diffkv_jax.pallas_kernels.decode_attention import DECODE_ATTENTION
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.policy.policy import CompressionPolicy


def kernels_for(
    policy: CompressionPolicy,
    attention: AttentionSpec,
    implementation: str | None = None,
    *,
    interpret: bool | Literal["checked"] = False,
) -> Kernels:
    """The kernels asked for, or those of the platform; plain XLA where only it can do what policy
    and model ask for.

    The log says so, and also where of the kernels only decode attention can.

    Raises:
        ValueError: the kernels asked for cannot run here, or do not know what policy and model ask
            for.
    """
    kernels = Kernels.resolve(implementation, interpret=interpret)
    if kernels.implementation == "xla":
        return kernels
    sizes = {"max_len": 1, "dtype": attention.dtype, "tokens": None, "kernels": kernels}
    try:
        _, layout = layout_of(attention, policy, **sizes)
    except ValueError:  # `CacheSpec.build` says it
        return kernels
    log, reason = logging.getLogger(__name__), unsupported(policy, layout, kernels)
    if reason is None and APPLY_EVENT.supports(kernels.implementation, layout):
        log.info(
            "policy %r: decode attention runs on %r, prefill attention and events in plain XLA",
            policy.name,
            kernels.implementation,
        )
    if reason is None:
        return kernels
    if implementation is not None:
        raise ValueError(
            f"policy {policy.name!r} runs in plain XLA only: leave "
            f"implementation={implementation!r} out or take 'xla'"
        )
    log.info("policy %r runs in plain XLA: %s", policy.name, reason)
    return XLA


def unsupported(policy: CompressionPolicy, layout: PageLayout, kernels: Kernels) -> str | None:
    """Why no operation of the kernels can work on a policy's pages; None where decode attention can
    at least.
    """
    if policy.group is not None:
        return f"group={policy.group} is no size of page that the kernels choose"
    return DECODE_ATTENTION.supports(kernels.implementation, layout)
