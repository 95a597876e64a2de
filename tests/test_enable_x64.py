"""`jax_enable_x64` changes nothing: a process that needs 64 bits elsewhere gets the same tokens
from the same programs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.steps.jitted import decode_step
from diffkv_jax.testing.tiny import prompt, tiny_model
from test_end_to_end import INTERPRETED, NATIVE

POLICIES = {
    "none": dkv.CompressionPolicy.none(),
    "diffkv": dkv.diffkv(3.0, 0.5, window=8, flush=4),
    "snapkv": dkv.snapkv(20, window=8),
    "kivi": dkv.kivi(residual=33),
    "streaming": dkv.streaming_llm(20, window=8),
}


def tokens_of(policy: str, implementation: str, sampling=None) -> np.ndarray:
    model, params = tiny_model()
    run = {
        "implementation": implementation,
        "interpret": implementation in INTERPRETED,
        "max_len": 64,
        "max_new_tokens": 6,
    }
    key = None if sampling is None else jax.random.key(3)
    out = dkv.generate(
        model, params, [prompt(50, 3)], policy=POLICIES[policy], sampling=sampling, key=key, **run
    )
    assert {x.dtype.itemsize <= 4 for x in jax.tree.leaves(out.cache)} == {True}
    return out.tokens


def both(function) -> tuple:
    """What a function returns without and with 64 bits."""
    without = function()
    with jax.enable_x64(True):
        assert jnp.arange(2).dtype == jnp.int64
        return without, function()


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    "policy",
    [
        "none",
        "diffkv",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("snapkv", "kivi", "streaming")),
    ],
)
def test_generate_gives_the_same_tokens(policy: str):
    np.testing.assert_array_equal(*both(partial(tokens_of, policy, "xla")))


@pytest.mark.parametrize(
    "implementation",
    [
        NATIVE,
        pytest.param("triton", marks=pytest.mark.slow),
        pytest.param("mosaic_tpu", marks=(pytest.mark.slow, pytest.mark.long)),
    ],
)
def test_kernels_give_the_same_tokens(implementation: str):
    np.testing.assert_array_equal(*both(partial(tokens_of, "diffkv", implementation)))


@pytest.mark.slow
def test_sampling_draws_the_same_tokens():
    np.testing.assert_array_equal(
        *both(partial(tokens_of, "diffkv", "xla", dkv.Sample(temperature=0.7, top_p=0.9)))
    )


@pytest.mark.parametrize("kind", [jnp.int32, jnp.int64])
def test_a_step_in_a_program_of_64_bits(kind):
    """The caller's program goes on in 64 bits; the step within it is that of 32."""
    model, params = tiny_model()
    cache = dkv.make_cache(model, POLICIES["diffkv"], [40], max_len=64)

    @jax.jit
    def steps(params, cache, token):
        def step(state, _):
            cache, token, total = state
            logits, cache = decode_step(model, params, cache, token, token >= 0)
            return (
                cache,
                logits.argmax(axis=-1).astype(token.dtype),
                total + logits.sum(dtype=total.dtype),
            ), logits[0, 0]

        total = jnp.zeros((), jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32)
        (_, token, total), seen = jax.lax.scan(step, (cache, token, total), length=14)
        return seen, total

    wanted, _ = steps(params, cache, jnp.asarray([5], jnp.int32))
    with jax.enable_x64(True):
        got, total = steps(params, cache, jnp.asarray([5], kind))
        assert total.dtype == jnp.float64 and got.dtype == jnp.float32
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
def test_a_model_and_the_quality_of_a_cache():
    model, params = tiny_model()
    tokens = np.stack([prompt(40, 4)])

    def logits():
        at = jnp.arange(tokens.shape[1])[None]  # int64 where that is on, as a user would write it
        plain = model.apply({"params": params}, jnp.asarray(tokens, at.dtype), at)[0]
        assert plain.dtype == jnp.float32
        return np.concatenate(
            [
                np.ravel(plain),
                np.ravel(teacher_forced(model, params, tokens, 32, POLICIES["diffkv"])[0]),
            ]
        )

    np.testing.assert_array_equal(*both(logits))


@pytest.mark.slow
def test_learned_tables_and_the_model_that_they_belong_to():
    model, params = tiny_model()
    text = np.stack([prompt(40, 4), prompt(40, 5)])
    policy = dkv.coupled_quantization(4, 4)
    without, with_64 = both(lambda: dkv.calibrate(model, params, text, policy, iterations=2))
    assert without.fingerprint == with_64.fingerprint
    for a, b in zip(jax.tree.leaves(without.tables), jax.tree.leaves(with_64.tables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parameters_of_64_bits_are_narrowed():
    model, params = tiny_model()
    run = partial(
        dkv.generate,
        model,
        tokens=[prompt(50, 3)],
        policy=POLICIES["none"],
        max_new_tokens=6,
        max_len=64,
        implementation="xla",
    )
    wanted = run(params).tokens
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            run(jax.tree.map(lambda x: x.astype(jnp.float64), params)).tokens, wanted
        )
        with pytest.raises(ValueError, match="outside the vocabulary"):
            run(params, tokens=jnp.asarray([[5, 2**32 + 5]]))


def test_whole_numbers_beyond_32_bits_become_the_ends():
    with jax.enable_x64(True):
        given = {
            "n": jnp.asarray([-(2**40), 7, 2**32 + 7]),
            "x": jnp.asarray(0.1, jnp.float64),
            "key": jax.random.key(1),
            "name": "a",
        }
        seen = in_32_bits(lambda **arrays: (arrays, jnp.arange(2).dtype))(**given)
    arrays, counted = seen
    assert (
        counted == jnp.int32 and arrays["n"].dtype == jnp.int32 and arrays["x"].dtype == jnp.float32
    )
    assert arrays["n"].tolist() == [-(2**31), 7, 2**31 - 1] and float(arrays["x"]) == np.float32(
        0.1
    )
    assert arrays["key"] is given["key"] and arrays["name"] == "a"
