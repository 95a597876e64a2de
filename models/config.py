"""`ModelConfig`: the numbers that define a model, named as in Hugging Face's config.json."""

import math
from dataclasses import dataclass, field
from typing import Any

from .deepseek_config import ExpertSizes, LatentSizes
from .rope import RopeScaling

LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
REALS = (
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model; hashable, so it can be a static argument of `jax.jit`.

    `config_from_hf` makes it of a checkpoint's config.json. Where a name needs more than its
    config.json meaning:

    Attributes:
        model_type: the family, a key of `diffkv_jax.models.registry.FAMILIES`.
        rope_theta: base of the rotary embedding (of the full_attention layers where there are two
            bases).
        rope_scaling: long-context stretch that goes with `rope_theta`; None = unscaled.
        rope_local_base_freq: base of the sliding_attention layers, unscaled; None = these use
            `rope_theta` too.
        attention_bias: biases on the q, k, v and o projections (Qwen2 has them on q, k, v whatever
            this says).
        sliding_window: tokens, the query's own included, that a sliding_attention layer sees.
        layer_types: one of LAYER_TYPES per layer; None = all sliding if `sliding_window` is given,
            else all full.
        query_pre_attn_scalar: attention scores are multiplied by its -1/2 power; None = head_dim.
        latent: sizes of latent attention, in which `head_dim` is that of the rotary part; None =
            grouped-query attention.
        experts: sizes of the mixture of experts; None = every layer has one MLP.
        attn_logit_softcapping, final_logit_softcapping: c in c * tanh(x / c) on scores and on
        logits; None = no cap.
        stop_token_ids: ids of the vocabulary at which generated text is over (config.json's
            eos_token_id), each once. No part of equality and hash: what is compiled for a model
            does not depend on when its text ends.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_local_base_freq: float | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    hidden_act: str = "silu"
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    latent: LatentSizes | None = None
    experts: ExpertSizes | None = None
    stop_token_ids: tuple[int, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_heads(self)
        _check_layers(self)
        _check_stop_tokens(self)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not supported; supported are "
                f"{', '.join(ACTIVATIONS)}."
            )

    @property
    def sliding_windows(self) -> tuple[int | None, ...]:
        """Per layer, the window in tokens, or None for full attention."""
        if self.layer_types is None:
            return (self.sliding_window,) * self.num_hidden_layers
        return tuple(
            self.sliding_window if kind == "sliding_attention" else None
            for kind in self.layer_types
        )


def check_size(name: str, value: Any) -> None:
    """Raise ValueError unless `value` can be the config field `name`, a count or size."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{name}={value!r} must be an integer of at least 1; correct it in config.json."
        )


def _check_numbers(config: ModelConfig) -> None:
    for name in COUNTS:
        value = getattr(config, name)
        if value is not None or name != "sliding_window":
            check_size(name, value)
    optional = (
        "rope_local_base_freq",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    )
    for name in REALS:
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not 0.0 < value < math.inf
        ):
            raise ValueError(
                f"{name}={value!r} must be a finite number above 0; correct it in config.json."
            )


def _check_heads(config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} must be a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}; correct them in config.json."
        )
    if config.latent is not None and config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads={config.num_key_value_heads} must equal "
            f"num_attention_heads={config.num_attention_heads} with latent attention, which makes "
            "keys and values for every head; correct them in config.json."
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim={config.head_dim} must be even; the rotary embedding pairs its channels."
        )


def _check_layers(config: ModelConfig) -> None:
    if config.layer_types is None:
        return
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types has {len(config.layer_types)} entries and must have one for each of "
            f"num_hidden_layers={config.num_hidden_layers}; correct config.json."
        )
    for kind in config.layer_types:
        if kind not in LAYER_TYPES:
            raise ValueError(
                f"layer_types entry {kind!r} is not supported; supported are "
                f"{', '.join(LAYER_TYPES)}."
            )
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ValueError(
            "sliding_window=None must be a number of tokens because layer_types names "
            "sliding_attention; give the window, or make these layers full_attention."
        )


def _check_stop_tokens(config: ModelConfig) -> None:
    ids = config.stop_token_ids
    if not isinstance(ids, tuple):
        raise TypeError(
            f"stop_token_ids={ids!r} must be a tuple, so that the config can be hashed; give "
            "tuple(...)."
        )
    for token in ids:
        whole = isinstance(token, int) and not isinstance(token, bool)
        if not whole or not 0 <= token < config.vocab_size or ids.count(token) > 1:
            raise ValueError(
                f"stop_token_ids={ids!r} must be ids of the vocabulary, each once: integers from 0 "
                f"to vocab_size - 1 = {config.vocab_size - 1}, found {token!r}; correct "
                "eos_token_id in generation_config.json or config.json (a GGUF file: "
                "tokenizer.ggml.eos_token_id, eot_ and eom_)."
            )
