"""A cache has no array without elements: checkpoints cannot hold them, and every policy has arrays
that it does without.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import diffkv_jax as dkv
from diffkv_jax.cache.cache import complete, empty_cache, without_empty
from diffkv_jax.cache.pool_size import bound
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.methods.registry import NAMED
from diffkv_jax.steps.jitted import decode_step, end_passes, prefill_chunk, score_pass
from diffkv_jax.testing.tiny import prompt, tiny_latent_model, tiny_model

REQUESTS, MAX_LEN = 2, 64
MODELS = {
    "plain": partial(tiny_model),
    "windows and global": partial(tiny_model, windows=(16, None)),
    "windows only": partial(tiny_model, windows=(16, 16)),
    "latent": tiny_latent_model,
}


def policy_of(name: str) -> dkv.CompressionPolicy:
    return dkv.CompressionPolicy.none() if name == "none" else NAMED[name]()


def built(policy: dkv.CompressionPolicy, model):
    """The cache's shapes; None where the library refuses the policy for this model."""
    attention = model.attention
    try:
        spec = CacheSpec.build(
            attention, policy, num_requests=REQUESTS, max_len=MAX_LEN, num_pages=8, dtype="float32"
        )
        carried = bound(spec, policy)
    except ValueError:
        return None
    return jax.eval_shape(partial(empty_cache, spec), carried)


@pytest.mark.parametrize("kind", MODELS)
def test_no_policy_has_an_empty_array(kind: str):
    model, _ = MODELS[kind]()
    seen = 0
    for name, policy in {"none": dkv.CompressionPolicy.none, **NAMED}.items():
        if (cache := built(policy(), model)) is None:
            continue
        seen += 1
        assert {x.size > 0 for x in jax.tree.leaves(cache)} == {True}, name
        whole = jax.eval_shape(complete, cache)
        assert any(x.size == 0 for x in jax.tree.leaves(whole)), (
            "nothing was left out: the test would see nothing"
        )
        assert jax.eval_shape(lambda cache: without_empty(complete(cache)), cache) == cache, name
    assert seen >= 10


STEPPED = {
    "plain": [
        "none",
        "kvzip",
        "fastgen",
        "pyramidinfer",
        "expected_attention",
        "coupled_quantization",
    ],
    "windows and global": ["diffkv", "kivi"],
    "windows only": ["diffkv"],
    "latent": ["none", "snapkv"],
}


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in STEPPED.items() for name in names]
)
def test_every_call_returns_the_cache_it_was_given(kind: str, name: str):
    """Traced, not run: the same arrays come out of each compiled call, absent ones too."""
    model, params = MODELS[kind]()
    cache = built(policy_of(name), model)
    assert cache is not None
    tokens, length = (
        jax.ShapeDtypeStruct((REQUESTS, 16), jnp.int32),
        jax.ShapeDtypeStruct((REQUESTS,), jnp.int32),
    )
    flag, flags = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((REQUESTS,), bool)
    after = {
        "prompt": jax.eval_shape(
            partial(prefill_chunk, model), params, cache, tokens, length, flag
        )[1],
        "decode": jax.eval_shape(partial(decode_step, model), params, cache, length, flags)[1],
    }
    if name == "kvzip":
        first = jax.ShapeDtypeStruct((), jnp.int32)
        after["replay"] = jax.eval_shape(
            partial(score_pass, model), params, cache, tokens, length, first
        )
        after["its end"] = jax.eval_shape(end_passes, cache, flags)
    for call, changed in after.items():
        assert changed == cache, call


@pytest.mark.daily(2)
@pytest.mark.parametrize(("kind", "name"), [("plain", "snapkv"), ("latent", "streaming_llm")])
def test_a_cache_is_saved_and_goes_on(kind: str, name: str, tmp_path: Path):
    (model, params), policy = MODELS[kind](), policy_of(name)
    prompts, more = [prompt(40, 1), prompt(23, 2)], [prompt(7, 3), prompt(9, 4)]
    run = partial(dkv.generate, model, params, prefill_chunk=64)
    first, other = (
        run(x, policy=policy, max_new_tokens=4, max_len=128)
        for x in (prompts, [x[::-1] for x in prompts])
    )
    shapes = jax.eval_shape(lambda cache: cache, first.cache)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", first.cache)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "cache", shapes)
    for kept, back in zip(jax.tree.leaves(first.cache), jax.tree.leaves(restored), strict=True):
        assert (kept.dtype, kept.shape) == (back.dtype, back.shape)
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(back))
    wanted, got, wrong = (
        run(more, cache=cache, max_new_tokens=4) for cache in (first.cache, restored, other.cache)
    )
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    assert (wrong.tokens != wanted.tokens).any(), "any cache would do"


@pytest.mark.slow
def test_windows_alone_generate_and_are_counted():
    model, params = MODELS["windows only"]()
    out = dkv.generate(
        model, params, [prompt(40, 1)], max_new_tokens=3, max_len=64, prefill_chunk=64
    )
    report = dkv.memory_report(out.cache)
    # K and V of 16 tokens in two layers, two bytes each
    assert report.bf16 == 2 * 2 * 16 * model.attention.head_dim * 2
    assert report.tokens.shape == (0, 1, 1, 2) and 0 < report.logical <= report.pool
    more = dkv.generate(
        model, params, [prompt(5, 2)], cache=out.cache, max_new_tokens=2, prefill_chunk=64
    )
    whole = np.concatenate([prompt(40, 1), out.tokens[0], prompt(5, 2)])
    np.testing.assert_array_equal(
        dkv.generate(model, params, [whole], max_new_tokens=2, prefill_chunk=64).tokens, more.tokens
    )
