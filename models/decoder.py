"""The decoder stack that all families share: embed, one loop over stacked layers, norm, logits."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffkv_jax.calibration.sample_text import SampleText
from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.steps.attend import kernels_of

from .config import ModelConfig
from .experts import MixtureOfExperts
from .latent_attention import LatentAttention
from .layers import Embedding, GatedMLP, LogitsHead, RMSNorm
from .plain_attention import NO_WINDOW
from .rope import inverse_frequencies, rope_tables
from .self_attention import LayerData, SelfAttention, SharedData, score_scale
from .switches import Switches


class DecoderLayer(nn.Module):
    """One layer as a scan body: residual attention, then residual MLP.

    Attributes:
        keep_hidden: also give the layer's output as the scan's stacked result.
    """

    config: ModelConfig
    switches: Switches
    dtype: str
    param_dtype: str
    keep_hidden: bool

    def _norm(
        self, name: str, data: LayerData, kernels: Kernels
    ) -> Callable[[jax.Array], jax.Array]:
        config = self.config
        norm = RMSNorm(
            config.rms_norm_eps,
            self.switches.norm_adds_one,
            self.param_dtype,
            config.num_hidden_layers,
            name=name,
        )
        return partial(norm, layer=data.layer, kernels=kernels)

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Any], data: LayerData, shared: SharedData
    ) -> tuple[tuple[jax.Array, Any], Any]:
        hidden, cache = carry
        config, switches = self.config, self.switches
        types, kernels = (self.dtype, self.param_dtype), kernels_of(cache)
        norm = partial(self._norm, data=data, kernels=kernels)
        attention = SelfAttention if config.latent is None else LatentAttention
        self_attn = attention(config, switches, *types, name="self_attn")
        choices = (config.hidden_act, switches.mlp_bias, *types)
        if config.experts is None:
            mlp = GatedMLP(config.num_hidden_layers, config.intermediate_size, *choices, name="mlp")
        else:
            mlp = MixtureOfExperts(config.num_hidden_layers, config.experts, *choices, name="mlp")
        mlp = partial(mlp, layer=data.layer, kernels=kernels)
        attended, cache = self_attn(norm("input_layernorm")(hidden), cache, data, shared)
        if switches.sandwich_norms:  # here post_attention_layernorm follows attention
            hidden = hidden + norm("post_attention_layernorm")(attended)
            transformed = mlp(norm("pre_feedforward_layernorm")(hidden))
            hidden = hidden + norm("post_feedforward_layernorm")(transformed)
        else:
            hidden = hidden + attended
            hidden = hidden + mlp(norm("post_attention_layernorm")(hidden))
        return (hidden, cache), hidden if self.keep_hidden else None


class Decoder(nn.Module):
    """A causal language model; satisfies `diffkv_jax.model.CausalLM`. Made by `build_model`.

    Parameters follow Hugging Face's names, with the layers stacked:
    `model.layers.{i}.mlp.up_proj.weight` [out, in] is params["layers"]["mlp"]["up_proj"]["kernel"]
    [num_layers, in, out].

    Attributes:
        config, switches: sizes, and the family's choices.
        dtype: of activations and matrix products; norms, softmax, rotary embedding and logits are
            float32.
        param_dtype: of the parameters that `init` makes.
        text: what `calibrate` reads when it is given no tokens; None: nothing. Models that differ
            in it alone are equal, and share compiled programs.
    """

    config: ModelConfig
    switches: Switches
    dtype: str = "float32"
    param_dtype: str = "float32"
    text: SampleText | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def attention(self) -> AttentionSpec:
        """The attention geometry that a cache is built from."""
        config, latent = self.config, self.config.latent
        return AttentionSpec(
            num_layers=config.num_hidden_layers,
            num_q_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads if latent is None else 1,
            head_dim=config.head_dim
            if latent is None
            else latent.kv_lora_rank + latent.qk_rope_head_dim,
            latent=None if latent is None else latent.kv_lora_rank,
            sliding_windows=config.sliding_windows,
            sm_scale=score_scale(config),
            logits_soft_cap=config.attn_logit_softcapping,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            dtype=self.dtype,
            rope=None
            if latent
            else tuple(
                inverse_frequencies(
                    config.head_dim, config.rope_theta, config.rope_scaling
                ).tolist()
            ),
        )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Token ids at which generated text is over, as the checkpoint names them; () = none."""
        return self.config.stop_token_ids

    @in_32_bits
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any = None,
        step: Any = None,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B rows vocab_size"], Any]:
        """See `CausalLM.apply`: int32 [B, T] twice -> float32 logits [B, T or 1, vocab], the cache.

        Tokens at position -1 are padding: their ids are not looked at and their logits mean nothing
        (but are finite).
        """
        logits, cache, _ = self._forward(
            tokens, positions, cache, step, last_only=last_only, keep_hidden=False
        )
        return logits, cache

    def hidden_states(
        self, tokens: jax.Array, positions: jax.Array
    ) -> Float[Array, "states B T hidden_size"]:
        """Residual stream, dtype [num_layers + 1, B, T, hidden_size]: embeddings, then each layer.

        Call it as `model.apply({"params": params}, tokens, positions, method="hidden_states")`.
        """
        return self._forward(tokens, positions, None, None, last_only=True, keep_hidden=True)[2]

    @nn.compact
    def _forward(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any,
        step: Any,
        *,
        last_only: bool,
        keep_hidden: bool,
    ) -> tuple[jax.Array, Any, Any]:
        """Logits, cache, and the residual stream if `keep_hidden`, else None."""
        _check_inputs(tokens, positions)
        config, types = self.config, (self.dtype, self.param_dtype)
        embed = Embedding(config.vocab_size, config.hidden_size, *types, name="embed_tokens")
        embedded = embed(jnp.where(positions < 0, 0, tokens))
        if self.switches.scale_embeddings:
            embedded = embedded * jnp.asarray(config.hidden_size**0.5, embedded.dtype)
        shared, hidden, states = _shared_data(config, positions, step), embedded, [embedded[None]]
        for name, first, part in _stacks(config):
            stack = nn.scan(
                DecoderLayer,
                variable_broadcast="params",  # stacked: every layer picks its own
                split_rngs={"params": False},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  # Flax takes a tuple and annotates an int
                length=part.num_hidden_layers,
                # Flax takes a kernel's effects for a dependency of the parameters, which only
                # `init` makes here
                check_constancy_invariants=self.is_initializing(),
            )(part, self.switches, *types, keep_hidden, name=name)
            (hidden, cache), outputs = stack((hidden, cache), _layer_data(part, first), shared)
            states.append(outputs)
        if last_only:
            hidden = hidden[:, -1:]
        kernels = kernels_of(cache)
        hidden = RMSNorm(
            config.rms_norm_eps, self.switches.norm_adds_one, self.param_dtype, name="norm"
        )(hidden, kernels=kernels)
        head = embed.logits
        if not config.tie_word_embeddings:
            head = LogitsHead(config.vocab_size, *types, name="lm_head")
        logits, cap = head(hidden, kernels), config.final_logit_softcapping
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits, cache, jnp.concatenate(states) if keep_hidden else None


def param_shapes(model: Decoder) -> dict[str, Any]:
    """The parameter tree's shapes and dtypes as `jax.ShapeDtypeStruct`; nothing is allocated."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), one, one)["params"]


def _check_inputs(tokens: jax.Array, positions: jax.Array) -> None:
    if tokens.ndim != 2 or tokens.shape != positions.shape:
        raise ValueError(
            f"tokens of shape {tokens.shape} and positions of shape {positions.shape} must both be "
            "[batch, length]; for one sequence add a leading axis of 1."
        )


def _stacks(config: ModelConfig) -> list[tuple[str, int, ModelConfig]]:
    """(name in the parameter tree, first layer, config) of the runs of layers alike: those before
    the first with experts, and the rest.
    """
    if config.experts is None:
        return [("layers", 0, config)]
    count = config.num_hidden_layers
    dense = min(config.experts.first_k_dense_replace, config.num_hidden_layers)
    plain = dataclasses.replace(_part(config, 0, dense), experts=None) if dense else None
    before = [] if plain is None else [("dense_layers", 0, plain)]
    return before if dense == count else [*before, ("layers", dense, _part(config, dense, count))]


def _part(config: ModelConfig, first: int, last: int) -> ModelConfig:
    """The config of layers `first` to `last - 1`."""
    kinds = None if config.layer_types is None else config.layer_types[first:last]
    return dataclasses.replace(config, num_hidden_layers=last - first, layer_types=kinds)


def _layer_data(config: ModelConfig, first: int) -> LayerData:
    """What sets a stack's layers apart, int32 [num_layers] each; `first`: its first's index."""
    local = [
        window is not None and config.rope_local_base_freq is not None
        for window in config.sliding_windows
    ]
    windows = [NO_WINDOW if window is None else window for window in config.sliding_windows]
    return LayerData(
        layer=jnp.arange(config.num_hidden_layers, dtype=jnp.int32),
        number=first + jnp.arange(config.num_hidden_layers, dtype=jnp.int32),
        window=jnp.asarray(windows, jnp.int32),
        rope=jnp.asarray(local, jnp.int32),
    )


def _shared_data(config: ModelConfig, positions: jax.Array, step: Any) -> SharedData:
    """One rope table for all layers, or a global one and a local one."""
    frequencies = [inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)]
    if config.rope_local_base_freq is not None:
        frequencies.append(inverse_frequencies(config.head_dim, config.rope_local_base_freq, None))
    cos, sin = rope_tables(positions, np.stack(frequencies))
    if config.rope_scaling is not None and config.rope_scaling.attention_factor != 1.0:
        factors = jnp.array([config.rope_scaling.attention_factor, 1.0])[
            : len(frequencies), None, None, None
        ]
        cos, sin = cos * factors, sin * factors
    return SharedData(positions, cos, sin, step)
