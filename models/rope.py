"""Rotary embedding: unscaled, linear, llama3 and YaRN frequencies, half-rotation layout.

Source: Su et al., arXiv:2104.09864; channel c is paired with channel c + head_dim/2, as checkpoints
on the Hugging Face hub expect. Linear scaling divides every frequency; llama3 scaling is the
piecewise rule of Llama 3.1; YaRN (arXiv:2309.00071) divides the slow ones, leaves the fast ones,
and scales the logits.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffkv_jax.pallas_kernels.rope import turn_pairs

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies are stretched for long contexts; field names are those of config.json.

    All use `factor`. "llama3": wavelengths shorter than original_max_position_embeddings /
    high_freq_factor stay, those longer than original_max_position_embeddings / low_freq_factor are
    multiplied by `factor`, in between they are blended. "yarn": pairs that turn more than
    `beta_fast` times in the original context stay, those that turn less than `beta_slow` times are
    slowed by `factor`, in between they are blended; cosines and sines are multiplied by
    `attention_factor`, and the logits of latent attention, which has channels without the
    embedding, by the square of 1 + 0.1 mscale_all_dim ln(factor).
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES[1:]:
            raise ValueError(
                f"rope_type={self.rope_type!r} is not supported; supported are "
                f"{', '.join(ROPE_TYPES)}. Use a checkpoint with one of these (leave the scaling "
                "out for 'default')."
            )
        if self.factor < 1.0:
            raise ValueError(
                f"rope factor={self.factor} must be at least 1.0; it is the context length's "
                "multiple."
            )
        if not 0.0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}; check rope_scaling in config.json."
            )
        if not (0.0 < self.beta_slow < self.beta_fast and self.attention_factor > 0.0):
            raise ValueError(
                f"beta_slow={self.beta_slow} must be positive and below "
                f"beta_fast={self.beta_fast}, and attention_factor={self.attention_factor} "
                "positive; check rope_scaling in config.json."
            )
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings={self.original_max_position_embeddings} must be "
                "at least 1; it is the context length before scaling."
            )

    @property
    def latent_scale(self) -> float:
        """The factor on the logits of latent attention."""
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """1 + 0.1 weight ln(factor): how much larger logits must be in a context that is `factor` times
    as long (YaRN, section 3.4).
    """
    return 1.0 + 0.1 * weight * math.log(factor)


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, "pairs"]:
    """Radians a token for each channel pair, float32 [head_dim / 2]."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequency.astype(np.float32)
    if scaling.rope_type == "linear":
        return (frequency / scaling.factor).astype(np.float32)
    if scaling.rope_type == "yarn":
        return _yarn(frequency, theta, scaling).astype(np.float32)
    # within the original context
    turns = scaling.original_max_position_embeddings * frequency / (2.0 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)  # 1: a short wavelength, left alone; 0: a long one, stretched
    return (frequency * (keep + (1.0 - keep) / scaling.factor)).astype(np.float32)


def _yarn(frequency: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """YaRN's blend goes linearly over the pairs between those that turn `beta_fast` and `beta_slow`
    times, whole ones.
    """
    pairs = len(frequency)

    def pair(turns: float) -> float:
        """Which one turns so many times in the original context."""
        return (
            pairs
            * math.log(scaling.original_max_position_embeddings / (turns * 2.0 * math.pi))
            / math.log(theta)
        )

    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), 2 * pairs - 1)
    slowed = np.clip((np.arange(pairs) - first) / max(last - first, 0.001), 0.0, 1.0)
    return frequency * (1.0 - slowed + slowed / scaling.factor)


def rope_tables(
    positions: Int[Array, "B T"], inv_freq: Float[np.ndarray, "R pairs"]
) -> tuple[Float[Array, "R B T pairs"], Float[Array, "R B T pairs"]]:
    """Cosines and sines, each float32 [R, B, T, head_dim / 2].

    Args:
        positions: int32 [B, T]; padded rows (-1) are treated as position 0.
        inv_freq: float32 [R, head_dim / 2], one row for each rope base in use.
    """
    place = jnp.maximum(positions, 0).astype(jnp.float32)
    angle = place[None, :, :, None] * jnp.asarray(inv_freq)[:, None, None, :]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "B T heads head_dim"],
    cos: Float[Array, "B T pairs"],
    sin: Float[Array, "B T pairs"],
) -> Float[Array, "B T heads head_dim"]:
    """Rotate x [B, T, heads, head_dim] by [B, T, head_dim / 2] in float32, in x's dtype."""
    return turn_pairs(x, cos[:, :, None, :], sin[:, :, None, :])
