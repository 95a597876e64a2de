"""The pages of a policy's tiers on a model."""

from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.codecs import KVFormat, LatentFormat, shared_format
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.policy.pairs import LayerPairs
from diffkv_jax.policy.policy import CompressionPolicy


def layout_of(
    attention: AttentionSpec,
    policy: CompressionPolicy,
    *,
    max_len: int,
    dtype: str,
    tokens: int | None,
    kernels: Kernels,
) -> tuple[LayerPairs | None, PageLayout]:
    """Which layers are merged, None: no pair is, and the pages. The arguments are those of
    `CacheSpec.build`.

    Raises:
        ValueError: the tiers do not fit the model or one page shape, or the model lacks what the
            policy asks for.
    """
    policy.transform.check_model(attention)
    pairs, formats = policy.pairs, _formats_of(attention, policy, dtype)
    if pairs is not None and pairs.count(attention) == 0:
        pairs = None
    if pairs is not None:
        formats = (*formats, shared_format(formats[0], pairs.t))
    return pairs, PageLayout.solve(
        formats,
        attention.head_dim,
        tokens=policy.group or tokens or kernels.tokens_per_block,
        max_len=max_len,
        scored=policy.score is not None,
        group="max" if policy.score is None else policy.score.reduce,
        meta_dtype=kernels.meta_dtype,
        rope=policy.transform.rope(attention),
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
