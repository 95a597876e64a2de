"""docs/your_own_method.md as it stands: each block runs, and does what the page says."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.decode_loop import advance, begin
from diffkv_jax.methods.h2o import AttentionSum
from diffkv_jax.pallas_kernels.codecs import formats
from diffkv_jax.pallas_kernels.dispatch import target_platform
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.steps.jitted import prefill_chunk
from diffkv_jax.testing.readback import held_tokens, slot_addresses

pytestmark = pytest.mark.slow  # quick: tests/steps/test_own_stages.py, tests/test_own_codec.py
PAGE = Path(__file__).parent.parent / "docs" / "your_own_method.md"
RUNS = ("near", "short", "like", "mass", "turned", "truncated")
SEEN = 300 + 19  # the last token generated is not fed


def programs() -> list[int]:
    return [f._cache_size() for f in (advance, begin, prefill_chunk)]


@pytest.fixture(scope="module")
def page():
    """The page's blocks as the module `my_methods`; `before_less` counts what was compiled before
    the block that is said to compile nothing.
    """
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    module = ModuleType("my_methods")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "my_methods", module)
        patch.setattr(formats, "KINDS", dict(formats.KINDS))
        for block in blocks:
            if "compiles nothing" in block:
                module.before_less = programs()
            exec(compile(block, PAGE.name, "exec"), module.__dict__)
            if "compiles nothing" in block:
                module.after_less = programs()
        yield module


def run(page, policy: dkv.CompressionPolicy, **options) -> dkv.GenerateOutput:
    given = {"max_new_tokens": 20, "implementation": "xla"} | options
    return dkv.generate(page.model, page.params, page.prompts, policy=policy, **given)


def stored(cache: dkv.KVCache, layer: int) -> dict[int, tuple]:
    """Position to what a layer's head holds outside of the recent window."""
    held = held_tokens(cache, layer, 0, 0)
    return {position: token for position, token in held.items() if token[0] != "recent"}


def whole(page, score: dkv.Score | None) -> dkv.GenerateOutput:
    """The prompt alone, ranked and kept whole."""
    keep = dkv.KeepAll() if score is None else dkv.Budget(keep=1.0)
    policy = dkv.CompressionPolicy("whole", score=score, keep=keep, schedule=page.window)
    return run(page, policy, max_new_tokens=0)


@pytest.mark.skipif(target_platform() != "cpu", reason="native kernels")
@pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("name", RUNS)
def test_native_kernels_and_plain_xla_agree(page, name: str):
    """The page ran on native kernels, but for its codec."""
    policy, out = getattr(page, name), getattr(page, f"{name}_out")
    used = "xla" if name == "truncated" else "cpu"
    assert out.cache.spec.kernels.implementation == used
    plain = run(page, policy) if used == "cpu" else out
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    for layer in (0, 1) if used == "cpu" else ():
        assert stored(out.cache, layer).keys() == stored(plain.cache, layer).keys()


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
def test_a_score_runs_on_every_implementation(page, implementation: str):
    """A prompt and an event in decode in Pallas' interpreters."""
    out = run(page, page.near, implementation=implementation, interpret=True, max_new_tokens=10)
    plain = run(page, page.near, max_new_tokens=10)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    for layer in (0, 1):
        assert sorted(stored(out.cache, layer)) == list(range(76, 125))


def test_the_tokens_nearest_position_100_stay(page):
    for layer in (0, 1):
        assert sorted(stored(page.near_out.cache, layer)) == list(range(76, 125))
    assert set(page.kept[0][0][0].tolist()) == {*range(76, 125), *range(SEEN - 19, SEEN)}


def test_another_centre_is_another_choice(page):
    score, keep = page.NearPosition(centre=50), dkv.Budget(keep=65)
    policy = dkv.CompressionPolicy("near 50", score=score, keep=keep, schedule=page.window)
    out = run(page, policy, max_new_tokens=0)
    assert sorted(stored(out.cache, 0)) == list(range(26, 75))


def test_short_keys_stay(page):
    """The shortest of the first layer's keys, the sinks aside, as the prompt left them."""
    out = run(page, page.short, max_new_tokens=0)
    keys = {p: np.linalg.norm(token[1]) for p, token in stored(whole(page, None).cache, 0).items()}
    kept = set(stored(out.cache, 0))
    assert {0, 1, 2, 3} < kept and len(kept) == 300 // 2 - 16
    shortest = sorted((p for p in keys if p > 3), key=keys.__getitem__)[: len(kept) - 4]
    assert kept == {0, 1, 2, 3, *shortest}


def test_the_mean_query_ranks(page):
    """State and choice after the prompt, beside NumPy on the whole prompt's keys."""
    count, total = page.like_out.cache.state.score
    np.testing.assert_array_equal(count, 300)
    for layer in (0, 1):
        mean = np.asarray(total)[layer, 0, 0] / 300
        keys = stored(whole(page, None).cache, layer)
        score = {p: token[1] @ mean for p, token in keys.items()}
        best = sorted(score, key=score.__getitem__)[-(300 * 2 // 5 - 16) :]
        held = set(stored(page.like_out.cache, layer))
        assert {p for p in held if p < 284} == set(best)
        assert {p for p in held if p >= 284} == set(range(284, 300))  # none leaves in decode


def test_chunks_add_to_the_state(page):
    out = run(page, page.like, prefill_chunk=64, max_new_tokens=0)
    states = (x.cache.state.score for x in (out, page.like_out))
    for chunked, whole_prompt in zip(*states, strict=True):
        np.testing.assert_allclose(chunked[0], whole_prompt[0], rtol=1e-4, atol=1e-3)


def test_the_fewest_tokens_that_hold_a_share(page):
    out = run(page, page.mass, max_new_tokens=0)
    everything, kept_of = whole(page, dkv.Score(queries=64)), {}
    for layer in (0, 1):
        score = {p: token[3] for p, token in stored(everything.cache, layer).items()}
        kept = set(stored(out.cache, layer))
        held = sum(score[p] for p in kept) / sum(score.values())
        without_last = held - min(score[p] for p in kept) / sum(score.values())
        assert without_last < 0.9 <= held + 1e-5
        assert min(score[p] for p in kept) > max(score[p] for p in score if p not in kept)
        kept_of[layer] = len(kept)
    assert kept_of[0] != kept_of[1]


def test_another_share_compiles_nothing_and_keeps_less(page):
    assert page.after_less == page.before_less
    held = [dkv.memory_report(out.cache).tokens.sum() for out in (page.less_out, page.mass_out)]
    assert held[0] < held[1]


def test_sums_and_differences_are_stored_and_undone(page):
    """With exact tokens they change nothing but rounding, and what is stored."""
    schedule = {"schedule": page.window}
    exact, policy = (
        run(page, dkv.CompressionPolicy("exact", transform=transform, **schedule))
        for transform in (dkv.Exact(), page.SumsAndDifferences())
    )
    np.testing.assert_array_equal(exact.tokens, policy.tokens)
    plain, turned = (stored(out.cache, 0) for out in (exact, policy))
    for place in (1, 2):
        for position, token in plain.items():
            wanted = page.sums_and_differences(token[place])
            np.testing.assert_allclose(turned[position][place], wanted, atol=1e-5)
    four = stored(page.turned_out.cache, 0)
    worst = max(np.abs(four[p][1] - turned[p][1]).max() for p in four)
    assert 1e-3 < worst < 1  # four bits of the turned keys


def own_keys(page) -> dict[int, np.ndarray]:
    """Position to key of what the page's codec has stored of the first layer, read by `decode`."""
    cache, codec = page.truncated_out.cache, page.Truncated(12)
    layout, rows = cache.spec.layout, codec.rows(64)
    assert layout.formats[0].key == codec
    at = slot_addresses(
        layout, np.asarray(cache.stored.page_table)[0, 0, 0], 0, cache.stored.tier_len[0, 0, 0, 0]
    )
    payload, position = (
        np.asarray(cache.stored.pages.payload),
        np.asarray(cache.stored.pages.position),
    )
    found = {}
    for page_id, block, lane in zip(*at, strict=True):
        part = payload[page_id, block * rows : (block + 1) * rows, lane, None]
        found[int(position[page_id, block, lane])] = codec.decode(part, part[:0])[:, 0]
    return found


def test_the_codec_stores_what_it_says_and_kernels_refuse_it(page):
    """Of the first layer, whose keys are those of the whole cache: 12 bits are a sign, eight of the
    exponent and three of the fraction.
    """
    full = stored(run(page, dkv.CompressionPolicy("full", schedule=page.window)).cache, 0)
    own = own_keys(page)
    assert set(range(284)) <= set(own)
    for position in range(284):
        key, exact = own[position], full[position][1]
        np.testing.assert_allclose(key, exact, rtol=2**-3 + 2**-7, atol=1e-30)
        assert (np.abs(key) <= np.abs(exact) * (1 + 2**-7)).all() and (key != exact).any()
    with pytest.raises(ValueError, match="plain XLA only"):
        run(page, page.truncated, implementation="cpu")


def test_json_names_the_module(page):
    assert '"my_methods:NearPosition"' in page.text
    assert page.again == page.near and isinstance(page.again.score, page.NearPosition)
    unknown = page.text.replace("my_methods:", "elsewhere:")
    with pytest.raises(ValueError, match="import the module that defines it first"):
        dkv.CompressionPolicy.from_json(unknown)


def test_a_score_by_attention_is_that_of_h2o(page):
    """`Score(queries=64)` is said to need no class of its own."""
    ours, theirs = (whole(page, kind(queries=64)) for kind in (dkv.Score, AttentionSum))
    np.testing.assert_array_equal(
        ours.cache.stored.pages.significance, theirs.cache.stored.pages.significance
    )
