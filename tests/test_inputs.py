"""What `generate` takes for what is meant, and what it refuses, by name, before a given cache is
touched.
"""

import collections
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.batching import as_prompts
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.testing.tiny import prompt, tiny_model

TEXTS = [[5, 6, 7, 8], [9, 10]]
SIZES = {"max_len": 128, "max_new_tokens": 4}


def cases(values: dict) -> list:
    """One a value, numbered: their texts may hold addresses."""
    return [
        pytest.param(name, value, id=f"{name}-{i}")
        for name, some in values.items()
        for i, value in enumerate(some)
    ]


class Encoding(collections.UserDict):
    """As tokenizers return."""


@pytest.fixture(scope="module")
def generate():
    return partial(dkv.generate, *tiny_model(max_len=512))


@pytest.fixture(scope="module")
def plain(generate):
    return generate(TEXTS, **SIZES).tokens


LEFT = {"input_ids": [[5, 6, 7, 8], [0, 0, 9, 10]], "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1]]}
RIGHT = {"input_ids": [[5, 6, 7, 8], [9, 10, 0, 0]], "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]}
MEANT = {
    "arrays": [np.array(row) for row in TEXTS],
    "jax arrays": [jnp.array(row) for row in TEXTS],
    "encodings": [Encoding(input_ids=row, attention_mask=[1] * len(row)) for row in TEXTS],
    "encodings of arrays": [Encoding(input_ids=np.array([row])) for row in TEXTS],
    "left padded": Encoding(LEFT),
    "right padded": Encoding(RIGHT),
    "left padded arrays": Encoding({name: np.array(x) for name, x in LEFT.items()}),
    "tuples": tuple(map(tuple, TEXTS)),
}


@pytest.mark.parametrize("tokens", MEANT.values(), ids=MEANT)
def test_prompts_as_meant(tokens):
    found = as_prompts(tokens, None, None, 97)
    assert [row[:n].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)] == TEXTS
    assert found.tokens.dtype == found.lengths.dtype == np.int32 and not found.rests.any()


def test_one_encoding_is_one_request():
    for ids in ([5, 6, 7], np.array([5, 6, 7]), [[5, 6, 7]]):
        assert as_prompts(Encoding(input_ids=ids), None, None, 97).tokens.tolist() == [[5, 6, 7]]


def test_encodings_that_are_refused(generate):
    for ids in ([[1, 2], [3]], [[[1]]], "ab"):
        with pytest.raises((ValueError, TypeError), match="tokens.*prompt 0|prompt 0.*tokens"):
            generate([Encoding(input_ids=ids)])


@pytest.mark.daily(2)
@pytest.mark.parametrize(
    "mask",
    [
        LEFT["attention_mask"],
        np.array(LEFT["attention_mask"], bool),
        jnp.array(LEFT["attention_mask"]),
    ],
)
def test_a_mask_beside_left_padded_tokens(generate, plain, mask):
    np.testing.assert_array_equal(
        generate(np.array(LEFT["input_ids"]), attention_mask=mask, **SIZES).tokens, plain
    )
    padded = generate(np.array(LEFT["input_ids"]), **SIZES).tokens
    assert (padded != plain).any(), "padding that counts must show"


MASKS = {
    "a hole": ([[1, 0, 1, 1], [1, 1, 1, 1]], "prompt 0 leaves out tokens in the middle"),
    "other numbers": ([[1, 2, 1, 1], [1, 1, 1, 1]], "prompt 0 must be 0 or 1"),
    "another length": ([[1, 1, 1], [1, 1, 1]], "prompt 0 must be 0 or 1 for each of its 4 tokens"),
    "another number of rows": ([[1, 1, 1, 1]], "attention_mask has 1 rows, tokens have 2"),
    "all zeros": ([[0, 0, 0, 0], [1, 1, 1, 1]], "prompt 0 has length 0"),
    "a number": (1, "attention_mask=1 must be"),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(generate, case):
    mask, message = MASKS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        generate(LEFT["input_ids"], attention_mask=mask)
    with pytest.raises(ValueError, match="lengths= or attention_mask="):
        generate(LEFT["input_ids"], [4, 4], attention_mask=LEFT["attention_mask"])


@pytest.mark.parametrize(
    "policy", ["snapkv", dkv.snapkv, dkv.snapkv()], ids=["name", "function", "policy"]
)
def test_policies_as_meant(generate, policy):
    carried = generate(TEXTS, policy=policy, **SIZES).cache.policy
    assert carried.score == dkv.snapkv().score and carried.protect == dkv.snapkv().protect


def test_numbers_samplings_and_keys_as_meant(generate, plain):
    for number in (np.int64(4), np.uint8(4), jnp.int32(4)):
        np.testing.assert_array_equal(
            generate(TEXTS, max_len=128, max_new_tokens=number).tokens, plain
        )
    for greedy in ("greedy", dkv.Greedy, dkv.Greedy(), None, [None, "greedy"]):
        np.testing.assert_array_equal(generate(TEXTS, sampling=greedy, **SIZES).tokens, plain)
    drawn = generate(TEXTS, sampling=dkv.Sample(), key=jax.random.key(3), **SIZES).tokens
    for sampling, key in (
        ("sample", 3),
        (dkv.Sample, np.int64(3)),
        ({"temperature": 1}, jax.random.PRNGKey(3)),
    ):
        np.testing.assert_array_equal(
            generate(TEXTS, sampling=sampling, key=key, **SIZES).tokens, drawn
        )
    assert (drawn != plain).any()


def test_stop_ids_of_the_model(generate, plain):
    """The model's by default, `()` for none, one id without a list."""
    model, params = tiny_model(max_len=512)
    stop = int(plain[0, 1])

    class Stops:
        attention, apply, stop_token_ids = model.attention, model.apply, (stop,)

    run = partial(dkv.generate, Stops(), params, TEXTS, **SIZES)
    assert run().finish_reason[0] == "eos" and run().lengths[0] == list(plain[0]).index(stop) + 1
    np.testing.assert_array_equal(run(stop_token_ids=()).tokens, plain)
    for ids in (stop, [stop], {stop}, np.array([stop]), np.int32(stop)):
        assert generate(TEXTS, stop_token_ids=ids, **SIZES).finish_reason[0] == "eos"


REFUSED = {
    "max_new_tokens": [None, 2.0, "4", -1, True, [3], 2**31],
    "sampling": [1, "top", {"top_q": 1}, [dkv.Greedy()], dkv.snapkv, object()],
    "key": [
        "0",
        1.5,
        jnp.zeros(2),
        jnp.zeros(3, jnp.uint32),
        jax.random.split(jax.random.key(0), 3),
        object(),
    ],
    "stop_token_ids": [[2**40], [-1], [97], -5, ["</s>"], "ab", [None], [1.0], [[1]], object()],
    "max_len": ["128", 0, -3, 1.5, 10**9, 513],
    "prefill_chunk": [None, 48, 8, 0, "64", 16.0],
    "policy": ["snapkw", 5, dkv.ada_kv, object()],
    "memory_budget": [0, -5, "5 parsecs", 1.5, [], True],
    "cache_dtype": ["float8", 3, "int8", jnp.int8],
    "implementation": ["cuda", 5, "triton"],
    "interpret": ["yes", 1, None],
    "calibration": ["x", 5],
    "cache": ["x", 5, {}],
    "lengths": [5, [1], [1, 9], ["a", "b"], [1.0, 2.0], [-1, 2]],
}


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_what_is_refused_names_the_argument(generate, name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        generate(TEXTS, **SIZES | {name: value})


TOKENS = {
    "text": "abc",
    "texts": ["abc"],
    "None": None,
    "a number": 5,
    "nothing": [],
    "a set": {1},
    "a mapping": {"ids": [1]},
    "ints": [1, 2],
}


@pytest.mark.parametrize("case", TOKENS)
def test_tokens_that_are_refused(generate, case):
    with pytest.raises((ValueError, TypeError), match="tokens"):
        generate(TOKENS[case])


def test_model_and_parameters_are_told_apart():
    model, params = tiny_model(max_len=512)
    for call in (
        dkv.generate,
        partial(teacher_forced, context=1, policy=None),
        partial(dkv.calibrate, policy="kvquant"),
    ):
        with pytest.raises(TypeError, match="swap them"):
            call(params, model, [[1, 2, 3]])
        with pytest.raises(TypeError, match="model="):
            call(None, params, [[1, 2, 3]])
        for wrong in (None, {}, {"a": 1.0}, {"a": jax.ShapeDtypeStruct((2,), "float32")}):
            with pytest.raises(TypeError, match="params"):
                call(model, wrong, [[1, 2, 3]])
    with pytest.raises(TypeError, match="swap them"):
        dkv.make_cache(params, None, [4])


def test_inside_jit():
    """Each says what to call."""
    model, params = tiny_model(max_len=512)
    text = jnp.array([[1, 2, 3]])
    inside = {
        "jit": jax.jit,
        "vmap": partial(jax.vmap, in_axes=(None, 0)),
        "eval_shape": lambda f: partial(jax.eval_shape, f),
    }
    for transform in inside.values():
        for call in (
            lambda p, t: dkv.generate(model, p, t).tokens,
            lambda p, t: dkv.generate(model, params, t).tokens,
            lambda p, t: teacher_forced(model, params, t, 1, None)[0],
            lambda p, t: dkv.calibrate(model, params, t, "kvquant").tables,
        ):
            with pytest.raises(
                TypeError, match="inside jax.jit, vmap, grad or eval_shape.*decode_step"
            ):
                transform(call)(params, text[None])


def test_lengths_beyond_the_model(generate):
    """Both numbers and the bytes."""
    for call in (
        lambda n: generate(TEXTS, max_len=n),
        lambda n: dkv.make_cache(tiny_model(max_len=512)[0], None, [5], max_len=n),
    ):
        for length in (513, 10**9):
            with pytest.raises(
                ValueError,
                match=rf"max_len={length} is more than the model's "
                rf"context of 512 tokens.*would take .*B",
            ):
                call(length)
    with pytest.raises(
        ValueError,
        match=r"may come to 2147483650 tokens \(prompt and "
        r"max_new_tokens\).*context of 512",
    ):
        generate(TEXTS, max_new_tokens=2**31 - 1)
    with pytest.raises(ValueError, match="may come to 1000 tokens.*context of 512"):
        dkv.make_cache(tiny_model(max_len=512)[0], None, [1000])


def test_a_cache_that_the_memory_does_not_hold(monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(import_module("diffkv_jax.make_cache"), "_empty", exhausted)
    with pytest.raises(
        ValueError,
        match="2 requests of up to 512 tokens takes .*B, more than the "
        "device has free: give a memory_budget",
    ):
        dkv.make_cache(tiny_model(max_len=512)[0], None, [5, 7], max_len=512)


TEACHER = {
    "context": [None, 0, 3, 1.0, "1"],
    "policy": ["x", 5],
    "prefill_chunk": [48, None],
    "max_len": [2, 10**9],
    "cache_dtype": ["x", 5],
    "memory_budget": [0, None.__class__],
    "calibration": [5],
    "progress": [5],
    "tokens": [[[1], [2, 3]], [[1, None, 2]], [[1, 2, 97]], "abc"],
}


@pytest.mark.parametrize(("name", "value"), cases(TEACHER))
def test_teacher_forced_refuses(name, value):
    given = {"tokens": [[1, 2, 3]], "context": 2, "policy": dkv.diffkv()} | {name: value}
    with pytest.raises((ValueError, TypeError), match=name):
        teacher_forced(*tiny_model(max_len=512), **given)


CALIBRATE = {
    "policy": ["x", 5],
    "samples": [0, None, 1.5, "8"],
    "iterations": [0, None, -1, 2.0],
    "seed": [None, "a", 0.5, -1],
    "fisher": [None, 1, "yes"],
    "q_norm": [1, "no"],
    "progress": [None, "bar"],
    "tokens": [[[1]], [[1, 2], [3]], "ab", [["a", "b"]]],
}


@pytest.mark.parametrize(("name", "value"), cases(CALIBRATE))
def test_calibrate_refuses(name, value):
    given = {"tokens": [[1, 2, 3, 4]], "policy": dkv.coupled_quantization(4, 4)} | {name: value}
    with pytest.raises(
        (ValueError, TypeError),
        match="sequences" if name == "tokens" and value != "ab" and value != [["a", "b"]] else name,
    ):
        dkv.calibrate(*tiny_model(max_len=512), **given)


def test_a_refused_call_leaves_the_cache(generate, plain):
    """All refusals with a cache at hand, then it goes on as ever."""
    half = {"max_new_tokens": 2}
    first = generate(TEXTS, max_len=128, **half)
    for name, values in REFUSED.items():
        for value in values:
            if name != "cache":
                with pytest.raises((ValueError, TypeError)):
                    generate(
                        [[], []],
                        **half
                        | {"cache": first.cache, name: value if value is not None else object()},
                    )
    second = generate([[], []], cache=first.cache, **half)
    np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens], axis=1), plain)


def test_long_prompts_are_shown_shortened(generate):
    with pytest.raises(ValueError) as error:
        generate([prompt(500).astype(float)])
    assert len(str(error.value)) < 400
