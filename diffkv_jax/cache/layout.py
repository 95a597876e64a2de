"""The pages of a policy's tiers on a model."""

from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.codecs import KVFormat, LatentFormat, shared_format
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.policy.pairs import Merge
from diffkv_jax.policy.policy import CompressionPolicy


def layout_of(
    attention: AttentionSpec,
    policy: CompressionPolicy,
    *,
    max_len: int,
    dtype: str,
    tokens: int | None,
    kernels: Kernels,
) -> tuple[Merge | None, PageLayout]:
    """Which layers are merged, None: no pair is, and the pages. The arguments are those of
    `CacheSpec.build`.

    Raises:
        ValueError: the tiers do not fit the model or one page shape, or the model lacks what the
            policy asks for.
    """
    merge, formats = policy.merge, _formats_of(attention, policy, dtype)
    if merge is not None and merge.pairs(attention) == 0:
        merge = None
    if merge is not None:
        formats = (*formats, shared_format(formats[0], merge.t))
    return merge, PageLayout.solve(
        formats,
        attention.head_dim,
        tokens=policy.block or tokens or kernels.tokens_per_block,
        max_len=max_len,
        scored=policy.selection.score is not None,
        group=policy.selection.group,
        meta_dtype=kernels.meta_dtype,
        rope=_rope_of(attention, policy),
    )


def _formats_of(
    attention: AttentionSpec, policy: CompressionPolicy, dtype: str
) -> tuple[KVFormat, ...]:
    """The codecs of the stored tiers, of a model with a latent for that and the rotary part."""
    formats = policy.formats(dtype)
    return (
        formats
        if attention.latent is None
        else tuple(LatentFormat.of(fmt, attention.latent, dtype) for fmt in formats)
    )


def _rope_of(attention: AttentionSpec, policy: CompressionPolicy) -> tuple[float, ...] | None:
    """What keys are freed of before they are stored: None = nothing."""
    if not policy.un_rope:
        return None
    if attention.latent is not None:
        raise ValueError(
            "un_rope=True, and a latent carries no rotary embedding anyway: leave it out"
        )
    if attention.rope is None:
        raise ValueError(
            "un_rope=True, and the model does not tell its rotary embedding (AttentionSpec.rope)"
        )
    return attention.rope
