"""Numbers that are not finite end their request, and say where that began."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.tiny import prompt, tiny_model

POISON = 5  # a token that no text has


def with_embedding(value: float):
    """A model in which one token's embedding is `value`."""
    model, params = tiny_model()
    params = jax.tree.map(jnp.asarray, params)
    embedding = params["embed_tokens"]["embedding"]
    return model, params | {"embed_tokens": {"embedding": embedding.at[POISON].set(value)}}


TEXTS = [np.where(text == POISON, POISON + 1, text) for text in (prompt(40, 1), prompt(30, 2))]
POISONED = [TEXTS[0], np.concatenate([TEXTS[1][:-3], [POISON, 1, 2]])]


def test_one_row_ends_and_the_other_goes_on():
    model, params = with_embedding(np.nan)
    plain = dkv.generate(model, params, TEXTS, max_new_tokens=6, max_len=128)
    with pytest.warns(
        RuntimeWarning,
        match=r"request 1 .*'error'.*keys and values of layer 0; so "
        r"were the activations.*float32",
    ):
        out = dkv.generate(model, params, POISONED, max_new_tokens=6, max_len=128)
    assert out.finish_reason == ("length", "error") and out.lengths.tolist() == [6, 0]
    np.testing.assert_array_equal(out.tokens[0], plain.tokens[0])
    assert not out.tokens[1].any() and int(out.cache.counters.pending[1]) == -1


def test_the_warning_is_the_callers():
    """It names the caller's line. A token at the prompt's beginning has left the window: of the
    last ones layer 1's are the first.
    """
    model, params = with_embedding(np.nan)
    text = np.concatenate([[POISON], TEXTS[0]])
    with pytest.warns(
        RuntimeWarning, match="first numbers of its recent tokens .* of layer 1"
    ) as found:
        dkv.generate(model, params, [text], max_new_tokens=1, policy=dkv.diffkv(window=16, flush=8))
    assert [warning.filename for warning in found] == [__file__]


@pytest.mark.filterwarnings("error")
def test_where_warnings_are_errors_nothing_is_lost():
    with pytest.raises(RuntimeWarning, match="request 1") as error:
        dkv.generate(*with_embedding(np.nan), POISONED, max_new_tokens=6, max_len=128)
    out = error.value.output
    assert out.finish_reason == ("length", "error") and not out.cache.counters.seq_len.is_deleted()


def test_in_decode():
    """The token that poisons comes after two good ones; those stay."""
    model, params = with_embedding(np.inf)
    first = dkv.generate(model, params, TEXTS, max_new_tokens=3, max_len=128)
    cache = first.cache
    poisoned = with_part(cache, "counters.pending", cache.counters.pending.at[0].set(POISON))
    with pytest.warns(RuntimeWarning, match="request 0"):
        out = dkv.generate(model, params, [[], []], max_new_tokens=4, cache=poisoned)
    assert out.finish_reason == ("error", "length") and out.lengths.tolist() == [0, 4]


@pytest.mark.parametrize(("part", "kind"), [("k_proj", "keys"), ("v_proj", "values")])
def test_the_layer_and_kind(part, kind):
    """Keys or values of the second layer alone."""
    model, params = tiny_model()
    params = jax.tree.map(jnp.asarray, params)
    layers = params["layers"]
    kernel = layers["self_attn"][part]["kernel"].at[1, 0].set(np.inf)
    layers = layers | {"self_attn": layers["self_attn"] | {part: {"kernel": kernel}}}
    with pytest.warns(RuntimeWarning, match=rf"first .* not finite are the {kind} of layer 1\."):
        out = dkv.generate(model, params | {"layers": layers}, TEXTS[:1], max_new_tokens=3)
    assert out.finish_reason == ("error",)


def test_only_the_logits():
    model, params = tiny_model()
    head = params["lm_head"]["kernel"] * np.float32(np.inf)
    with pytest.warns(RuntimeWarning, match="keys and values of its recent tokens are all finite"):
        out = dkv.generate(
            model, params | {"lm_head": {"kernel": head}}, TEXTS[:1], max_new_tokens=3
        )
    assert out.finish_reason == ("error",)


@pytest.mark.slow
def test_a_window_layer():
    model, params = tiny_model(windows=(16, None))
    embedding = jnp.asarray(params["embed_tokens"]["embedding"]).at[POISON].set(np.nan)
    with pytest.warns(RuntimeWarning, match="of layer 0"):
        out = dkv.generate(
            model, params | {"embed_tokens": {"embedding": embedding}}, POISONED, max_new_tokens=3
        )
    assert out.finish_reason == ("length", "error")


def test_teacher_forced_warns():
    with pytest.warns(RuntimeWarning, match="request 1"):
        teacher_forced(
            *with_embedding(np.nan),
            np.stack([TEXTS[0][:30], POISONED[1]]),
            28,
            dkv.CompressionPolicy.none(),
        )


def test_calibrate_refuses():
    policy = dkv.coupled_quantization(4, 4)
    with pytest.raises(ValueError, match="keys of layer 0 are not finite.*float32"):
        dkv.calibrate(
            *with_embedding(np.nan),
            POISONED[1][None],
            policy,
            fisher=False,
            iterations=1,
            progress=False,
        )


def test_minus_infinity_is_a_choice_not_made():
    """A model may forbid tokens by -inf; the rest is finite."""
    from diffkv_jax.decode_loop import Requests, begin
    from diffkv_jax.sampling import Greedy, rules

    cache = dkv.make_cache(tiny_model()[0], None, [64, 64])
    asked = Requests(
        rules([Greedy()] * 2), jax.random.split(jax.random.key(0), 2), jnp.int32(1), jnp.full(8, -1)
    )
    logits = jnp.full((2, 97), -jnp.inf).at[0, 7].set(1.0)
    state, _ = begin(cache, logits, jnp.full(2, True), jnp.full(2, False), asked, 1)
    assert state.tokens[0].tolist() == [7] and state.lengths.tolist() == [1, 0]
