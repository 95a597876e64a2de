"""What the cache and `generate` ask of a model: its attention geometry and one pure call."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax

from diffkv_jax.arguments import integer, number, shown, text, tuple_of


@dataclass(frozen=True)
class AttentionSpec:
    """Static facts about a model's attention, enough to size a cache and to attend over it.

    Attributes:
        num_layers: decoder layers.
        num_q_heads: query heads a layer, a multiple of `num_kv_heads`.
        num_kv_heads: key/value heads a layer; query head n reads KV head n // (num_q_heads //
            num_kv_heads).
        head_dim: channels a head.
        sliding_windows: per layer, how many most recent tokens (the token itself included) a query
            sees; None = all.
        sm_scale: the factor on q . k before the softmax.
        logits_soft_cap: c in c * tanh(score / c), applied after `sm_scale`; None = no cap.
        vocab_size: width of the logits.
        max_position_embeddings: longest context, in tokens, that the model was made for.
        dtype: the name of the dtype that q, k, v and activations are computed in, such as
            "float32".
        rope: radians a token of each channel pair (head_dim / 2) in layers without a sliding
            window, in the half-rotation layout (`diffkv_jax.pallas_kernels.rope`); None = not told,
            and what needs keys without their rotary embedding is refused.
        latent: with multi-head latent attention (arXiv:2405.04434), how many first channels of the
            one key that all query heads share are its value too (the latent c; the others carry the
            rotary embedding); None = values of their own.

    Raises:
        TypeError, ValueError: a field is not what it must be, or two do not go together; the
            message names them.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_windows: tuple[int | None, ...]
    sm_scale: float
    logits_soft_cap: float | None
    vocab_size: int
    max_position_embeddings: int
    dtype: str
    rope: tuple[float, ...] | None = field(default=None, repr=False)
    latent: int | None = None

    def __post_init__(self) -> None:
        for name, convert in _FIELDS.items():
            object.__setattr__(self, name, convert(name, getattr(self, name)))
        if len(self.sliding_windows) != self.num_layers:
            raise ValueError(
                f"sliding_windows={self.sliding_windows} must hold one entry for each of "
                f"num_layers={self.num_layers}, given {len(self.sliding_windows)}; use None for a "
                "layer with global attention."
            )
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}; each KV head serves the same number of query "
                "heads."
            )
        if self.rope is not None and len(self.rope) != self.head_dim // 2:
            raise ValueError(
                f"rope={shown(self.rope)} must hold a number for each pair of "
                f"head_dim={self.head_dim} channels, given {len(self.rope)}"
            )
        plain = self.num_kv_heads == 1 and not any(self.sliding_windows)
        if self.latent is not None and not (plain and 0 < self.latent < self.head_dim):
            raise ValueError(
                f"latent={self.latent} must be between 0 and head_dim={self.head_dim}, with "
                f"num_kv_heads=1 (given {self.num_kv_heads}) and no sliding windows: all query "
                "heads share one key, whose first channels are its value."
            )


_count = partial(integer, least=1)
_size = partial(integer, least=1, most=2**16)
_FIELDS = {
    "num_layers": _size,
    "num_q_heads": _size,
    "num_kv_heads": _size,
    "head_dim": _size,
    "sliding_windows": partial(
        tuple_of,
        each=partial(_count, optional=True),
        rule="a tuple with a number of tokens or None for each layer",
    ),
    "sm_scale": number,
    "logits_soft_cap": partial(number, above=0, optional=True),
    "vocab_size": _count,
    "max_position_embeddings": _count,
    "dtype": partial(text, rule="the name of a dtype such as 'float32'"),
    "rope": partial(
        tuple_of, each=number, rule="a tuple of radians a token, or None", optional=True
    ),
    "latent": partial(integer, optional=True),
}


@runtime_checkable
class CausalLM(Protocol):
    """A causal language model as `generate` sees it; those of `diffkv_jax.models` satisfy it.

    `apply` is pure: the same inputs give the same outputs, and the cache goes in and comes out as a
    value.

    Arguments of `apply`:
        variables: {"params": the parameter tree}.
        tokens: int32 [B, T] token ids.
        positions: int32 [B, T] place of each token in its sequence, from 0; -1 marks a padded row.
        cache: None for plain attention over the T given tokens, else a cache that
        `diffkv_jax.steps.attend.attend` understands. step: what `attend` needs to know about this
        step (any pytree); unused when `cache` is None. last_only: give logits for row T - 1 only.
    Returns:
        logits float32 [B, T, vocab_size] ([B, 1, vocab_size] with `last_only`), and the updated
        cache (None if none).
    """

    @property
    def attention(self) -> AttentionSpec:
        """The attention geometry, known before any parameter is loaded."""
        ...

    def apply(
        self,
        variables: Mapping[str, Any],
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any = None,
        step: Any = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Run the model over T tokens of B sequences."""
        ...
