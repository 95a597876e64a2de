"""Every family against `transformers` (torch, eager attention, float32), through the real
checkpoint converter.
"""

import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.models import build_model, load_pretrained
from diffkv_jax.models.rope import RopeScaling
from helpers_model import randomize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the reference's range; float32 rounding stays below 2e-6
LENGTH = 24

LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
)
QUARTER = dict(num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {**SIZES, **QUARTER, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama_biases": ("Llama", {**SIZES, **QUARTER, "attention_bias": True, "mlp_bias": True}),
    "llama_linear_rope": (
        "Llama",
        {
            **SIZES,
            **QUARTER,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "llama3_rope": ("Llama", {**SIZES, **QUARTER, "head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "llama_yarn": ("Llama", {**SIZES, **QUARTER, "head_dim": 16, "rope_parameters": YARN}),
    "smollm2": (
        "Llama",
        {
            **SIZES,
            **QUARTER,
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", {**SIZES, **QUARTER, "sliding_window": 7}),
    "mistral_wide_heads": ("Mistral", {**SIZES, **QUARTER, "sliding_window": None, "head_dim": 20}),
    "qwen2": (
        "Qwen2",
        {
            **SIZES,
            **QUARTER,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {**SIZES, **QUARTER, "head_dim": 16}),
    "gemma3": (
        "Gemma3Text",
        {
            **SIZES,
            **QUARTER,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA_ROPE,
            "final_logit_softcapping": 20.0,
        },
    ),
}
TORCH_MODEL = {"Gemma3Text": "Gemma3ForCausalLM"}


class Pair(NamedTuple):
    """Our model and parameters, and the reference's answers on the same tokens [B, T]."""

    model: Any
    params: Any
    tokens: jax.Array
    logits: np.ndarray
    hidden: list[np.ndarray]


@pytest.fixture(autouse=True)
def _exact_matrix_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Any:
    """A function from a case's name to its `Pair`, each built once."""
    built: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in built:
            built[name] = _build(name, tmp_path_factory.mktemp(name))
        return built[name]

    return get


def _build(name: str, folder: Path) -> Pair:
    family, fields = CASES[name]
    config = getattr(transformers, f"{family}Config")(**fields)
    config._attn_implementation = "eager"
    reference = (
        getattr(transformers, TORCH_MODEL.get(family, f"{family}ForCausalLM"))(config)
        .float()
        .eval()
    )
    randomize(reference, seed=sum(map(ord, name)))
    reference.save_pretrained(folder)
    tokens = np.random.default_rng(3).integers(0, fields["vocab_size"], (2, LENGTH))
    logits, hidden = _run_reference(reference, tokens)
    model, params = load_pretrained(folder)[:2]
    return Pair(model, params, jnp.asarray(tokens, jnp.int32), logits, hidden)


def _run_reference(reference: Any, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits, and the residual stream before the first layer and after each."""
    hidden: list[np.ndarray] = []
    layers = reference.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0].numpy()))]
    for layer in layers:
        hooks.append(
            layer.register_forward_hook(
                lambda _, __, out: hidden.append(
                    (out[0] if isinstance(out, tuple) else out).numpy()
                )
            )
        )
    with torch.no_grad():
        logits = reference(torch.as_tensor(tokens), use_cache=False).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, hidden


def _positions(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


def _relative_error(got: Any, wanted: np.ndarray) -> float:
    """Largest absolute difference over the reference's range."""
    assert np.asarray(got).shape == wanted.shape
    return float(np.max(np.abs(np.asarray(got) - wanted)) / (wanted.max() - wanted.min()))


@cache
def _compiled(model: Any, method: str = "__call__") -> Any:
    return jax.jit(partial(model.apply, method=method))


def _logits_error(pair: Pair, model: Any = None, params: Any = None) -> float:
    model, params = (
        pair.model if model is None else model,
        pair.params if params is None else params,
    )
    logits, _ = _compiled(model)({"params": params}, pair.tokens, _positions(pair.tokens))
    assert logits.dtype == jnp.float32
    return _relative_error(logits, pair.logits)


def _with_config(pair: Pair, **changes: Any) -> Any:
    return build_model(dataclasses.replace(pair.model.config, **changes))


def _with_attention(pair: Pair, **changes: Any) -> Any:
    """The parameters with parts of self_attn replaced."""
    layers = pair.params["layers"]
    return {**pair.params, "layers": {**layers, "self_attn": {**layers["self_attn"], **changes}}}


@pytest.mark.daily(5)
@pytest.mark.parametrize("name", CASES)
def test_each_layer_and_the_logits_equal_the_reference(pairs, name):
    pair = pairs(name)
    hidden = _compiled(pair.model, method="hidden_states")(
        {"params": pair.params}, pair.tokens, _positions(pair.tokens)
    )
    assert len(pair.hidden) == len(hidden) == pair.model.config.num_hidden_layers + 1
    errors = [
        _relative_error(ours, theirs) for ours, theirs in zip(hidden, pair.hidden, strict=True)
    ]
    assert max(errors) <= TOLERANCE, (
        f"relative error of the embeddings and after each layer: {errors}"
    )
    assert _logits_error(pair) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_swapped_k_and_v_are_rejected(pairs, name):
    pair = pairs(name)
    attention = pair.params["layers"]["self_attn"]
    swapped = _with_attention(pair, k_proj=attention["v_proj"], v_proj=attention["k_proj"])
    assert _logits_error(pair, params=swapped) > TOLERANCE


@pytest.mark.daily(6)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_rope_base_is_rejected(pairs, name):
    pair = pairs(name)
    wrong = _with_config(pair, rope_theta=2.0 * pair.model.config.rope_theta)
    assert _logits_error(pair, model=wrong) > TOLERANCE


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_a_dropped_bias_is_rejected(pairs, projection):
    pair = pairs("qwen2")
    given = pair.params["layers"]["self_attn"][projection]
    dropped = _with_attention(
        pair, **{projection: {**given, "bias": jnp.zeros_like(given["bias"])}}
    )
    assert _logits_error(pair, params=dropped) > TOLERANCE


@pytest.mark.daily(4)
@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma3"])
@pytest.mark.parametrize("change", ["all_full", "all_sliding", "off_by_one"])
def test_a_wrong_window_is_rejected(pairs, name, change):
    pair = pairs(name)
    config = pair.model.config
    changes = {
        "all_full": dict(layer_types=("full_attention",) * config.num_hidden_layers),
        "all_sliding": dict(layer_types=("sliding_attention",) * config.num_hidden_layers),
        "off_by_one": dict(sliding_window=config.sliding_window + 1),
    }[change]
    if name == "mistral" and change == "all_sliding":
        # this is what Mistral is
        assert _logits_error(pair, model=_with_config(pair, **changes)) <= TOLERANCE
    else:
        assert _logits_error(pair, model=_with_config(pair, **changes)) > TOLERANCE


@pytest.mark.daily(5)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3_rope", dict(rope_scaling=None)),
        ("llama_linear_rope", dict(rope_scaling=None)),
        (
            "llama_yarn",
            dict(
                rope_scaling=RopeScaling(
                    "yarn", 4.0, original_max_position_embeddings=64, beta_fast=8.0
                )
            ),
        ),
        ("gemma3", dict(rope_local_base_freq=None)),
        ("gemma3", dict(rope_scaling=None)),
        ("gemma3", dict(query_pre_attn_scalar=None)),
        ("gemma3", dict(final_logit_softcapping=None)),
        ("gemma3", dict(hidden_act="gelu")),
        ("llama2", dict(rms_norm_eps=1e-2)),
        ("llama2", dict(hidden_act="gelu")),
    ],
)
def test_a_wrong_setting_is_rejected(pairs, name, changes):
    pair = pairs(name)
    assert _logits_error(pair, model=_with_config(pair, **changes)) > TOLERANCE


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_neutral_qk_norm_weight_is_rejected(pairs, name, norm):
    pair = pairs(name)
    given = pair.params["layers"]["self_attn"][norm]["weight"]
    neutral = jnp.zeros_like(given) if name == "gemma3" else jnp.ones_like(given)
    assert (
        _logits_error(pair, params=_with_attention(pair, **{norm: {"weight": neutral}})) > TOLERANCE
    )
