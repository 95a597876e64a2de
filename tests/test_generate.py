"""`generate`: why a request ends, going on from a cache, what compiles, and that nothing is read on
the way.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax import (
    CompressionPolicy,
    GenerateOutput,
    Greedy,
    KVCache,
    Sample,
    diffkv,
    fastgen,
    generate,
    h2o,
    make_cache,
    pyramidkv,
    snapkv,
)
from diffkv_jax.decode_loop import Requests, advance, begin
from diffkv_jax.read_prompts import prefill
from diffkv_jax.sampling import rules
from diffkv_jax.steps.jitted import prefill_chunk
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.readback import page_ids_in_use
from diffkv_jax.testing.tiny import prompt, tiny_model

NEW, CHUNK, MAX_LEN = 16, 64, 512
POLICY = CompressionPolicy.none(flush=8)
PROMPTS = [prompt(40, 1), prompt(100, 2), prompt(330, 3)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def empty(model) -> KVCache:
    return make_cache(model[0], POLICY, [MAX_LEN] * len(PROMPTS))


def with_free_pages(cache: KVCache, count: int) -> KVCache:
    """The cache with only `count` free pages; the others are nobody's."""
    return with_part(cache, "stored.ring.count", jnp.int32(count))


def run(model, prompts=PROMPTS, **arguments) -> GenerateOutput:
    defaults = {"max_new_tokens": NEW, "prefill_chunk": CHUNK, "stop_token_ids": ()}
    arguments.setdefault("cache", None)
    cache = empty(model) if arguments["cache"] is None else arguments.pop("cache")
    return generate(*model, prompts, **(defaults | arguments | {"cache": cache}))


@pytest.fixture(scope="module")
def plain(model) -> GenerateOutput:
    """The greedy run without stop ids that others are compared with."""
    return run(model)


def cut_at(tokens: np.ndarray, stop: int) -> np.ndarray:
    """A row up to and including the first `stop`, then zeros."""
    hits = np.flatnonzero(tokens == stop)
    return np.where(np.arange(len(tokens)) <= (hits[0] if len(hits) else len(tokens)), tokens, 0)


def test_length(plain):
    assert plain.finish_reason == ("length",) * 3 and plain.tokens.shape == (3, NEW)
    np.testing.assert_array_equal(plain.lengths, NEW)
    np.testing.assert_array_equal(plain.cache.counters.seq_len, [len(p) + NEW - 1 for p in PROMPTS])
    np.testing.assert_array_equal(plain.cache.counters.pending, plain.tokens[:, -1])


def test_eos(model, plain):
    stop = int(plain.tokens[0, 5])
    out = run(model, stop_token_ids=(stop,))
    wanted = np.stack([cut_at(row, stop) for row in plain.tokens])
    np.testing.assert_array_equal(out.tokens, wanted)
    for row, length, reason, whole in zip(
        out.tokens, out.lengths, out.finish_reason, plain.tokens, strict=True
    ):
        if stop in whole:
            assert reason == "eos" and row[length - 1] == stop and not row[length:].any()
        else:
            assert reason == "length" and length == NEW
    assert out.lengths[0] <= 6 and (out.lengths > out.lengths[0]).any(), "another row must go on"
    np.testing.assert_array_equal(
        out.cache.counters.seq_len, [len(p) for p in PROMPTS] + out.lengths - 1
    )
    np.testing.assert_array_equal(
        out.cache.counters.pending, out.tokens[np.arange(3), out.lengths - 1]
    )


def test_eos_at_once_and_one_token(model, plain):
    out = run(model, stop_token_ids=(int(plain.tokens[1, 0]),))
    assert out.lengths[1] == 1 and out.finish_reason[1] == "eos"
    np.testing.assert_array_equal(out.cache.counters.seq_len[1], len(PROMPTS[1]))
    out = run(model, max_new_tokens=9)
    np.testing.assert_array_equal(out.tokens, plain.tokens[:, :9])
    assert out.tokens.shape == (3, 9) and out.finish_reason == ("length",) * 3


def test_cache_full_in_the_prompt(model, plain):
    """Pages for requests 0 and 1 only: request 2 ends without a token and its pages go back; the
    others are as ever.
    """
    spec = plain.cache.spec
    heads = len(spec.paged_layers) * spec.attention.num_kv_heads
    few = heads * (spec.layout.pages_for(0, len(PROMPTS[1])) + 2)
    out = run(model, cache=with_free_pages(empty(model), few))
    assert out.finish_reason == ("length", "length", "cache_full") and out.lengths.tolist() == [
        NEW,
        NEW,
        0,
    ]
    np.testing.assert_array_equal(out.tokens[:2], plain.tokens[:2])
    assert (
        not out.tokens[2].any()
        and int(out.cache.counters.pending[2]) == -1
        and int(out.cache.counters.seq_len[2]) == 0
    )
    assert not out.cache.stored.tier_len[:, 2].any()
    used = page_ids_in_use(
        spec.layout, out.cache.stored.page_table, out.cache.stored.tier_len, spec.num_pages
    )
    assert len(used) + int(out.cache.stored.ring.count) == few
    again = run(model, [p[:33] for p in PROMPTS], cache=out.cache)
    assert again.finish_reason[2] == "length", "an emptied request starts again"
    alone = run(model, [p[:33] for p in PROMPTS])
    np.testing.assert_array_equal(again.tokens[2], alone.tokens[2])


def starving_lengths(per_page: int) -> list[int]:
    """Request 1 fills its last page exactly with its prompt; 0 and 2 have room for NEW tokens
    more.
    """
    return [40, 64 + 2 * per_page, 64 + 3 * per_page + 1]


@pytest.fixture(scope="module")
def starved_in_decode(model) -> tuple[GenerateOutput, GenerateOutput]:
    """No page is left after the prompts, so that request 1 finds none at its first event; and the
    same with enough pages.
    """
    lengths = starving_lengths(empty(model).spec.layout.tokens_per_page(0))
    prompts = [np.resize(p, n) for p, n in zip(PROMPTS, lengths, strict=True)]
    batch = np.stack([np.resize(p, max(lengths)) for p in prompts])
    first = prefill(*model, empty(model), batch, np.array(lengths), CHUNK)[1]
    taken = int(first.spec.num_pages - first.stored.ring.count)
    return run(model, prompts, cache=with_free_pages(empty(model), taken)), run(model, prompts)


def test_cache_full_in_decode(starved_in_decode):
    out, ample = starved_in_decode
    assert (
        out.finish_reason == ("length", "cache_full", "length")
        and ample.finish_reason == ("length",) * 3
    )
    np.testing.assert_array_equal(out.tokens[[0, 2]], ample.tokens[[0, 2]])
    assert (
        out.lengths[1] == POLICY.schedule.flush and not out.tokens[1, POLICY.schedule.flush :].any()
    )
    np.testing.assert_array_equal(
        out.tokens[1, : POLICY.schedule.flush], ample.tokens[1, : POLICY.schedule.flush]
    )


def test_going_on_after_cache_full_in_decode(starved_in_decode):
    """The token that was being fed when the pages ran out is in the window: it must not be fed
    twice.
    """
    out, _ = starved_in_decode
    lengths = starving_lengths(out.cache.spec.layout.tokens_per_page(0))
    seen = int(out.cache.counters.seq_len[1]) + (int(out.cache.counters.pending[1]) >= 0)
    assert seen == lengths[1] + out.lengths[1], "tokens seen and pending = prompt and generated"


def test_second_turn_equals_one_run(model, plain):
    """Rows that ended early by a stop id or by length; then a second prompt. Greedy over the whole
    text gives the same.
    """
    stop = int(plain.tokens[0, 5])
    first = run(model, stop_token_ids=(stop,))
    more = [prompt(n, 50 + n) for n in (40, 35, 90)]
    texts = [
        np.concatenate([p, row[:n], q])
        for p, row, n, q in zip(PROMPTS, first.tokens, first.lengths, more, strict=True)
    ]
    second = run(model, more, cache=first.cache)
    whole = run(model, texts)
    np.testing.assert_array_equal(second.tokens, whole.tokens)
    np.testing.assert_array_equal(second.cache.counters.seq_len, whole.cache.counters.seq_len)


def test_cache_is_taken(model):
    out = run(model)
    run(model, [p[:40] for p in PROMPTS], cache=out.cache)
    with pytest.raises(ValueError, match="given to an earlier call"):
        run(model, [p[:40] for p in PROMPTS], cache=out.cache)


def test_what_does_not_compile_again(model, plain):
    run(model)  # compiled here: a test before may have dropped compiled programs
    before = [f._cache_size() for f in (advance, begin, prefill_chunk)]
    run(model, max_new_tokens=11)
    run(model, stop_token_ids=(3,))
    for sampling in (
        Sample(temperature=0.7),
        Sample(top_p=0.9, min_p=0.1),
        [Greedy(), Sample(top_k=3), Sample(1.2)],
    ):
        run(model, sampling=sampling, key=4)
    run(model, [p[:35] for p in PROMPTS])
    run(model, cache=with_free_pages(empty(model), 10))
    assert [f._cache_size() for f in (advance, begin, prefill_chunk)] == before


def test_progress(model, capsys):
    """Shown when asked for, not when standard error is a file; the tokens are the same."""
    found = [run(model, progress=progress).tokens for progress in (True, False, None)]
    said = capsys.readouterr().err
    assert "reading" in said and "generating" in said and "tokens a request" in said
    run(model, progress=False)
    run(model)
    assert capsys.readouterr().err == ""
    assert all((tokens == found[0]).all() for tokens in found)
    with pytest.raises(TypeError, match="progress='yes' must be True or False"):
        run(model, progress="yes")


ALIKE = {
    "thresholds": (diffkv(1.0, 0.1), diffkv([[[3.0]], [[2.0]]], 0.0)),
    "shares": (h2o(0.5), dataclasses.replace(h2o([[[0.3]], [[0.4]]]), name="another name")),
    "numbers": (snapkv(100), pyramidkv(120)),
    "attention to recover": (fastgen(0.9), fastgen(0.5)),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_another_budget_compiles_nothing(model, kind):
    """What programs are compiled by: the structure of the cache and the types of its arrays."""
    caches = [make_cache(model[0], policy, [99], max_len=128) for policy in ALIKE[kind]]
    assert jax.tree.structure(caches[0]) == jax.tree.structure(caches[1])
    for one, other in zip(*map(jax.tree.leaves, caches), strict=True):
        assert jax.typeof(one) == jax.typeof(other)
    others = (h2o(0.5, sinks=5), h2o(0.5, flush=16), snapkv(0.5), snapkv(0.5, kernel_size=7))
    structures = {jax.tree.structure(make_cache(model[0], p, [99], max_len=128)) for p in others}
    assert len(structures) == len(others), "but another choice does"


@pytest.mark.slow
def test_long_prompts_share_one_prefill_program(model):
    before = prefill_chunk._cache_size()
    for length in (1000, 3000):
        cache = make_cache(model[0], POLICY, [4096])
        out = generate(*model, [prompt(length)], cache=cache, max_new_tokens=1, prefill_chunk=256)
        assert out.finish_reason == ("length",) and int(out.cache.counters.seq_len[0]) == length
    assert prefill_chunk._cache_size() == before + 1


def test_prompt_lengths_share_a_spec_when_max_len_is_given(model):
    specs = [make_cache(model[0], POLICY, [n], max_len=4096).spec for n in (1000, 3000)]
    assert specs[0] == specs[1]


def test_no_transfer_while_decoding(model, plain):
    batch = np.zeros((3, 330), np.int32)
    for i, p in enumerate(PROMPTS):
        batch[i, : len(p)] = p
    logits, cache = prefill(*model, empty(model), batch, np.array([len(p) for p in PROMPTS]), CHUNK)
    params = jax.tree.map(jnp.asarray, model[1])
    asked = Requests(
        rules([Greedy()] * 3),
        jax.random.split(jax.random.key(0), 3),
        jnp.int32(NEW),
        jnp.full(8, -1),
    )
    state, cache = begin(cache, logits, jnp.full(3, True), jnp.full(3, False), asked, NEW)
    arguments, most = (model[0], params, cache, state, asked), jnp.int32(100)
    text = advance.lower(*arguments, most).as_text()
    assert not [word for word in ("callback", "infeed", "outfeed", "send", "recv") if word in text]
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="[Dd]isallowed"):  # the guard does see a transfer
            advance(*arguments, np.int32(100))
        state, cache = jax.block_until_ready(advance(*arguments, most))
    np.testing.assert_array_equal(state.tokens, plain.tokens)
