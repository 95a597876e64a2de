"""With native kernels a row of a batch has the very numbers of the request alone: tokens and
logits, bit for bit.
"""

from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax import CompressionPolicy, diffkv, make_cache, quantized
from diffkv_jax.batching import as_batch, chunk_size
from diffkv_jax.evaluation.forcing import _log_softmax
from diffkv_jax.models import build_model, config_from_hf, load_pretrained
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.read_prompts import prefill
from diffkv_jax.sampling import Sample, _allowed, rules
from diffkv_jax.steps.jitted import decode_step
from diffkv_jax.testing.tiny import prompt
from helpers_model import smollm2_gguf_path

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")
# Layers with a sliding window attend in plain XLA: in float32 a Gemma 3 row is the same within
# rounding only.
FAMILIES = [("qwen2", "bfloat16"), ("qwen3", "bfloat16"), ("gemma3_text", "bfloat16")]
FAMILIES += [
    pytest.param(family, "float32", marks=pytest.mark.long) for family in ("qwen2", "qwen3")
]
LENGTHS = (3, 40, 17, 100)  # in a chunk of 16 alone, of 64 or 128 beside longer ones
WINDOW = {"window": 16, "flush": 8}
POLICIES = {
    "none": CompressionPolicy.none(**WINDOW),
    "K8V4": quantized("K8V4", **WINDOW),
    "DiffKV": diffkv(1.0, 0.0, **WINDOW),
    "DiffKV, drops": diffkv(1.0, 0.5, **WINDOW),
}


@cache
def tiny(dtype: str, model_type: str = "llama", head_dim: int = 64):
    """(model, params) whose sizes are no multiple of a vector; weights are large, so that a last
    bit does not get lost.
    """
    sizes = dict(
        vocab_size=160,
        hidden_size=52,
        intermediate_size=70,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    raw = (
        dict(
            model_type=model_type,
            head_dim=head_dim,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
        )
        | sizes
    )
    if model_type == "gemma3_text":
        raw |= dict(
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
            rope_local_base_freq=1e4,
        )
        raw |= dict(query_pre_attn_scalar=head_dim, hidden_activation="gelu_pytorch_tanh")
    model = build_model(config_from_hf(raw | {"tie_word_embeddings": True}), dtype)
    one = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), one, one)["params"]
    noise = np.random.default_rng(1)
    return model, jax.tree.map(
        lambda x: jnp.asarray(x + 0.2 * noise.normal(size=x.shape), dtype), params
    )


@partial(jax.jit, static_argnames=("model", "steps"))
def _go_on(model, params, cache, logits: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Greedy tokens [steps, R] and the logits behind them [steps, R, vocab]."""

    def step(carry, _):
        cache, logits = carry
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits, cache = decode_step(model, params, cache, token, jnp.ones(token.shape, bool))
        return (cache, logits), (token, logits)

    return jax.lax.scan(step, (cache, logits), None, length=steps)[1]


def run(
    model, params, prompts: Sequence, policy: CompressionPolicy, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [R, steps], and logits [R, steps + 1, vocab] from the prompt's last token
    on.
    """
    batch, sizes = as_batch(prompts, model.attention.vocab_size)
    cache = make_cache(model, policy, [256] * len(sizes), max_len=256)
    assert cache.spec.kernels.implementation == "cpu"
    first, cache = prefill(model, params, cache, batch, sizes, chunk_size(int(sizes.max()), 64, 64))
    tokens, logits = _go_on(model, params, cache, first, steps)
    return np.asarray(tokens).T, np.moveaxis(np.concatenate([first[None], logits]), 0, 1)


def check(
    model,
    params,
    prompts: Sequence,
    policy: CompressionPolicy,
    counts: Sequence[int],
    steps: int = 20,
) -> None:
    """Batches of `counts` requests, the prompts over and over, against each prompt alone."""
    alone = [run(model, params, [p], policy, steps) for p in prompts]
    assert (alone[0][1] != alone[1][1]).any(), "the comparison sees another prompt"
    for count in counts:
        tokens, logits = run(
            model, params, [prompts[i % len(prompts)] for i in range(count)], policy, steps
        )
        for row in range(count):
            one = alone[row % len(prompts)]
            np.testing.assert_array_equal(
                logits[row], one[1][0], err_msg=f"logits of row {row} of {count}"
            )
            np.testing.assert_array_equal(
                tokens[row], one[0][0], err_msg=f"tokens of row {row} of {count}"
            )


def prompts(vocab: int = 160) -> list[np.ndarray]:
    return [prompt(n, seed=n, vocab=vocab) for n in LENGTHS]


def test_bfloat16():
    check(*tiny("bfloat16"), prompts()[:2], POLICIES["none"], [33])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_policies(policy: CompressionPolicy, dtype: str, head_dim: int):
    check(*tiny(dtype, head_dim=head_dim), prompts(), policy, [2, 8, 33])


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "dtype"), FAMILIES)
def test_families(model_type: str, dtype: str):
    """Biases, norms of q and k, norms around each part, a sliding window; 24 channels a head."""
    check(*tiny(dtype, model_type, head_dim=24), prompts(), POLICIES["none"], [8, 33])


def test_log_probabilities(key):
    logits = 3 * jax.random.normal(key, (33, 160))
    together = _log_softmax(logits, Kernels("cpu"))
    np.testing.assert_allclose(together, jax.nn.log_softmax(logits), rtol=1e-5, atol=1e-5)
    for rows in (1, 2, 8):
        np.testing.assert_array_equal(
            _log_softmax(logits[5 : 5 + rows], Kernels("cpu")), together[5 : 5 + rows]
        )


@pytest.mark.parametrize("vocab", [160, 1000])  # softmax of these differs with the number of rows
def test_top_p(key, vocab: int):
    """What sampling lets through, on any kernels."""
    logits = 3 * jax.random.normal(key, (33, vocab))
    allowed = jax.jit(_allowed)
    some = [Sample(top_p=p) for p in np.linspace(0.1, 0.9, 5)]
    for sampling in some:
        together = allowed(rules([sampling] * 33), logits)
        np.testing.assert_array_equal(
            jnp.concatenate([allowed(rules([sampling]), logits[i : i + 1]) for i in range(33)]),
            together,
        )
        weights = np.sort(np.exp(np.asarray(logits, np.float64)))[:, ::-1]
        wanted = weights / weights.sum(axis=-1, keepdims=True)
        kept = ((wanted.cumsum(axis=-1) - wanted) < sampling.top_p).sum(axis=-1)
        np.testing.assert_array_equal(jnp.isfinite(together).sum(axis=-1), kept)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    "policy",
    [
        CompressionPolicy.none(),
        pytest.param(quantized("K8V4"), marks=pytest.mark.long),
        diffkv(1.0, 0.0),
    ],
    ids=["none", "K8V4", "DiffKV"],
)
def test_smollm2(policy: CompressionPolicy):
    model, params, tokenizer = load_pretrained(smollm2_gguf_path(), dtype="bfloat16")
    assert tokenizer is not None
    texts = [
        "The cache is",
        "Once upon a time there was a little girl",
        "def fibonacci(n):\n    ",
        "Water boils at",
        "Paris, Rome, Berlin and " * 9,
    ]
    assert tokenizer is not None
    check(
        model, params, [tokenizer(text).input_ids for text in texts], policy, [5, 8, 33], steps=90
    )
