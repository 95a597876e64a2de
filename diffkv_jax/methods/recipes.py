"""Compositions that the literature asks for, by name: each is one `CompressionPolicy`
(docs/methods/recipes.md).
"""

import dataclasses

from diffkv_jax.arguments import flag, integer, number
from diffkv_jax.methods.ada_kv import ada_kv
from diffkv_jax.methods.diffkv import diffkv
from diffkv_jax.methods.expected_attention import expected_attention
from diffkv_jax.methods.format_names import named_format, outliers_apart, tokens_of_group
from diffkv_jax.methods.key_norm import key_norm
from diffkv_jax.methods.kivi import kivi
from diffkv_jax.methods.kvzip import kvzip
from diffkv_jax.methods.snapkv import snapkv
from diffkv_jax.policy.keep import Amount
from diffkv_jax.policy.pairs import LayerPairs
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.transform import Hadamard, WithoutRope


def kvquant_with_cq_keys(
    channels: int = 4, bits: int = 4, outliers: float = 0.01
) -> CompressionPolicy:
    """Keys as Coupled Quantization has them, values as KVQuant has, outliers of both apart:
    learned, so it needs a calibration.
    """
    bits, channels = integer("bits", bits, least=0), integer("channels", channels, least=0)
    outliers = number("outliers", outliers, least=0)
    fmt = named_format(
        f"K8v{channels}V{bits}t{outliers_apart(outliers)}",
        channels=channels,
        bits=bits,
        outliers=outliers,
    )
    return CompressionPolicy("kvquant_with_cq_keys", tiers=(fmt,), transform=WithoutRope())


def key_norm_and_window(keep: Amount = 0.5, tier: str = "K8V4") -> CompressionPolicy:
    """L2-norm eviction beside the recent window, what stays at eight and four bits."""
    return key_norm(keep, tiers=(named_format(tier, tier=tier),))


def latent_snapkv(keep: Amount = 0.5, tier: str = "K4V4") -> CompressionPolicy:
    """For models with latent attention: SnapKV over all query heads, what stays as four-bit
    latents; rotary parts stay exact.
    """
    return snapkv(keep, tiers=(named_format(tier, tier=tier),))


def diffkv_rotated(
    alpha_high: float = 1.0, alpha_low: float = 0.02, levels: bool = True
) -> CompressionPolicy:
    """DiffKV's tiers with rotated codecs, by default the low one with the levels of a normal
    distribution (TurboQuant's).
    """
    tiers = ("K8V4", "K4nV2n" if flag("levels", levels) else "K4V2")
    return diffkv(alpha_high, alpha_low, tiers=tiers, transform=Hadamard())


def diffkv_minicache(
    alpha_high: float = 1.0, alpha_low: float = 0.02, start: float = 0.5
) -> CompressionPolicy:
    """DiffKV's tiers in the shallow layers; the deep ones, from the share `start` on, keep all
    tokens, merged in pairs (MiniCache).
    """
    policy = diffkv(alpha_high, alpha_low)
    return dataclasses.replace(policy, name="diffkv_minicache", pairs=LayerPairs(start=start))


def ada_kv_expected(keep: Amount = 0.5, tier: str = "K4V4") -> CompressionPolicy:
    """ExpectedAttention with budgets shared by a layer's heads, what stays at four bits."""
    return ada_kv(expected_attention(keep, tiers=(named_format(tier, tier=tier),)))


def snapkv_then_kivi(keep: Amount = 0.5, bits: int = 4, group: int = 32) -> CompressionPolicy:
    """SnapKV drops, KIVI encodes what stays: in that order, because KIVI's keys share scales over
    tokens.
    """
    group = tokens_of_group("group", group)
    tiers = kivi(bits, group=group, residual=group + 1).tiers
    return snapkv(keep, tiers=tiers, flush=group, group=group)


def kvzip_4bit(keep: Amount = 0.6, tier: str = "K4V4") -> CompressionPolicy:
    """KVzip, what stays at four bits; the prompt is stored so before it is gone over again."""
    return kvzip(keep, tiers=(named_format(tier, tier=tier),))


RECIPES = (
    kvquant_with_cq_keys,
    key_norm_and_window,
    latent_snapkv,
    diffkv_rotated,
    diffkv_minicache,
    ada_kv_expected,
    snapkv_then_kivi,
    kvzip_4bit,
)
