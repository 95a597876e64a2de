"""KVzip: its scores, and the tokens that it keeps, against kvpress on torch; what is freed, and
what cannot work.
"""

import dataclasses
import re
from functools import lru_cache, partial
from importlib import import_module
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import LAYERS, LENGTH, PROMPT, kept, models

import diffkv_jax as dkv
from diffkv_jax.make_cache import make_cache
from diffkv_jax.methods.fastgen import HeadClasses
from diffkv_jax.methods.key_norm import KeyNorm
from diffkv_jax.methods.kvzip import ContextReconstruction
from diffkv_jax.methods.replay import FIRST, LATER
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native import build
from diffkv_jax.read_prompts import prefill
from diffkv_jax.steps.jitted import end_passes
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_model

torch = pytest.importorskip("torch")
choice = pytest.importorskip("oracles.kvpress_choice")
# in the ids of a tokenizer that the tiny model never had
WORDS = {FIRST: (11, 7, 90), LATER: (3, 55, 6, 41), "\n": (8,)}
REPLAY = dkv.Replay(WORDS[FIRST], WORDS[LATER], WORDS["\n"])
HEADS = [(layer, head) for layer in range(LAYERS) for head in range(2)]


class Tokenizer:
    """As much of one as KVzip asks for."""

    chat_template = None

    def encode(self, text, return_tensors=None, add_special_tokens=True):
        ids = WORDS.get(text, ())
        return torch.tensor([ids], dtype=torch.long) if return_tensors else list(ids)


@lru_cache
def of_kvpress(
    chunk: int, ratio: float = 0.5, layerwise: bool = False
) -> tuple[list[list[set[int]]], np.ndarray]:
    """What KVzipPress keeps of the prompt, the last token protected as in our window, and its
    scores [LAYERS, 2, N].
    """
    theirs, _, _ = models(2)
    theirs.set_attn_implementation("sdpa")
    choice.presses()
    module = __import__("kvpress.presses.kvzip_press", fromlist=["AutoTokenizer"])
    press, scores = (
        module.KVzipPress(compression_ratio=ratio, chunk_size=chunk, layerwise=layerwise),
        [],
    )
    compress = press.compress_post

    def protecting(model):
        scores.append(press.score_val[:, 0].numpy().copy())
        press.score_val[..., -1] = 1e9
        compress(model)

    press.compress_post = protecting
    tokenizer, module.AutoTokenizer = (
        module.AutoTokenizer,
        SimpleNamespace(from_pretrained=lambda _: Tokenizer()),
    )
    try:
        found = choice.kept_by_mask(press, theirs, PROMPT)
    finally:
        module.AutoTokenizer = tokenizer
    return found, scores[0]


def kvzip(
    keep: float = 0.5, chunk: int = 2048, window: int = 1, **changes
) -> dkv.CompressionPolicy:
    """`changes` of the budget and the tiers, others as `dkv.kvzip` takes them."""
    budget = {name: changes.pop(name) for name in ("share_layers", "keep_high") if name in changes}
    tiers = changes.pop("tiers", ("full",))
    replay = dataclasses.replace(REPLAY, chunk=chunk)
    policy = dkv.kvzip(keep, replay=replay, window=window, **changes)
    return dataclasses.replace(policy, tiers=tiers, keep=dataclasses.replace(policy.keep, **budget))


def scores(policy: dkv.CompressionPolicy, chunk: int = 512, kernels: str = "xla") -> np.ndarray:
    """The scores [LAYERS, 2, N] in our cache that keeps everything; nan for the sinks and what is
    in the window.
    """
    _, model, params = models(2)
    cache = make_cache(
        model,
        dataclasses.replace(policy, keep=dkv.Budget(keep=1.0)),
        [LENGTH],
        kernels=Kernels(kernels),
    )
    _, cache = prefill(model, params, cache, PROMPT[None], np.array([LENGTH]), chunk)
    found = np.full((LAYERS, 2, LENGTH), np.nan)
    for layer, head in HEADS:
        held = held_tokens(cache, layer, 0, head)
        assert set(held) == set(range(LENGTH))
        for at, (tier, _, _, score) in held.items():
            if tier != "recent" and at >= policy.protect.sinks:
                found[layer, head, at] = score
            assert at >= policy.protect.sinks or score == np.float32(1e30)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "window", "read"), [(2048, 1, 512), (100, 40, 128)])
def test_scores_are_those_of_kvpress(chunk, window, read):
    """Of one pass and of three, the last of which goes over the window too; the prompt read in one
    chunk and in three.
    """
    found = scores(kvzip(chunk=chunk, window=window), read)[..., 4:-window]
    expected = of_kvpress(chunk)[1][..., 4:-window]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)
    other = of_kvpress(2048 if chunk == 100 else 100)[1][..., 4:-window]
    assert not np.allclose(found, other, rtol=0.05)  # the softmax over another part of the prompt
    assert not np.allclose(found, expected[:, ::-1], rtol=0.05) and np.ptp(expected) > 0.02


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        pytest.param(kvzip(0.5), (2048,), id="one pass"),
        pytest.param(kvzip(0.3, 100), (100, 0.7), id="three passes", marks=pytest.mark.slow),
        pytest.param(
            kvzip(0.5, share_layers=False),
            (2048, 0.5, True),
            id="layer by layer",
            marks=(pytest.mark.slow, pytest.mark.long),
        ),
    ],
)
def test_the_tokens_that_kvpress_keeps(policy, options):
    found, (expected, scored) = kept(policy), of_kvpress(*options)
    assert found == expected
    total = sum(len(found[layer][head]) for layer, head in HEADS)
    assert total == round(policy.keep.keep * LENGTH * len(HEADS))
    layers = {sum(map(len, layer)) for layer in found}
    assert any(len(first) != len(second) for first, second in found)
    if not policy.keep.share_layers:
        assert layers == {LENGTH}
        return
    assert max(layers) - min(layers) > 20  # layers trade too
    held = np.array(
        [[[at in head for at in range(4, LENGTH - 1)] for head in layer] for layer in found]
    )
    assert scored[..., 4:-1][held].min() >= scored[..., 4:-1][~held].max() > 0  # one threshold


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("transform", [dkv.Hadamard(), dkv.WithoutRope(), None], ids=str)
def test_transforms_change_no_score_and_words_do(transform):
    policy = kvzip(window=8)
    if transform is None:
        policy = dataclasses.replace(policy, score=ContextReconstruction())
    else:
        policy = dataclasses.replace(policy, transform=transform)
    found = scores(policy)
    assert np.allclose(found[..., 4:-8], of_kvpress(2048)[1][..., 4:-8], rtol=2e-3, atol=1e-6) == (
        transform is not None
    )


@pytest.mark.slow
@pytest.mark.long
def test_numbers_of_tokens_and_a_floor():
    counts = [
        [len(head) for layer in kept(policy) for head in layer]
        for policy in (kvzip(90), dkv.ada_kv(kvzip(0.5), floor=0.45))
    ]
    assert sum(counts[0]) == 90 * len(HEADS) and min(counts[0]) < 40
    assert sum(counts[1]) == LENGTH // 2 * len(HEADS) and min(counts[1]) == 67


@pytest.mark.slow
def test_keeping_everything_changes_nothing():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policies = dkv.CompressionPolicy.none(window=16, flush=4), kvzip(1.0, 32, 16, flush=4)
    outs = [
        dkv.generate(model, params, PROMPT[None, :80], policy=policy, max_new_tokens=6)
        for policy in policies
    ]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    plain, method = (
        {
            at: (k.tobytes(), v.tobytes())
            for at, (_, k, v, _) in held_tokens(out.cache, 1, 0, 1).items()
        }
        for out in outs
    )
    assert plain == method
    assert outs[0].cache.pages.significance is None


@pytest.mark.slow
def test_pages_are_freed_and_later_tokens_stay():
    """Eight bits; a batch of two lengths, decode, and a second turn of which nothing is dropped."""
    model, params = tiny_model(
        q_heads=4, kv_heads=2, head_dim=32, windows=(None, 24, None), layers=3
    )
    prompts, run = [PROMPT, PROMPT[:170]], {"max_new_tokens": 11, "prefill_chunk": 64}

    def turns(prompts, keep):
        policy = kvzip(keep, 128, 16, tiers=("K8V4",), flush=8)
        first = dkv.generate(model, params, prompts, policy=policy, max_len=384, **run)
        report = dkv.memory_report(first.cache)
        second = dkv.generate(
            model, params, [prompt[:30] for prompt in prompts], cache=first.cache, **run
        )
        check_pool(
            second.cache.spec.layout,
            second.cache.page_table,
            second.cache.tier_len,
            second.cache.ring,
        )
        return np.concatenate([first.tokens, second.tokens], axis=1), second.cache, report

    tokens, cache, report = turns(prompts, 0.25)
    assert report.pages.sum() < 0.45 * turns(prompts, 1.0)[2].pages.sum()
    alone, its_cache, _ = turns(prompts[1:], 0.25)
    np.testing.assert_array_equal(tokens[1], alone[0])
    for row, length in enumerate((LENGTH, 170)):
        held = [
            set(held_tokens(cache, layer, row, head)) for layer in range(2) for head in range(2)
        ]
        assert all(
            {0, 1, 2, 3, *range(length - 16, length + 51)} <= positions for positions in held
        )
        assert sum(map(len, held)) == 4 * (length // 4 + 51)
    assert [
        set(held_tokens(its_cache, layer, 0, head)) for layer in range(2) for head in range(2)
    ] == held


@pytest.mark.slow
def test_what_is_scored_are_the_keys_that_attention_reads():
    """The recipe with four bits, on native kernels where they can be built: nearly the choice that
    exact keys make, in as many tokens.
    """
    policy = dataclasses.replace(dkv.load_policy("kvzip_4bit"), replay=REPLAY, window=1)
    found = kept(policy, kernels=Kernels("xla" if build.why_unavailable() else "cpu"))
    exact = kept(dataclasses.replace(policy, tiers=("full",)))
    both = sum(len(found[layer][head] & exact[layer][head]) for layer, head in HEADS)
    total = sum(len(found[layer][head]) for layer, head in HEADS)
    assert total == round(0.6 * LENGTH) * len(HEADS) and found != exact and both > 0.95 * total


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                bool(build.why_unavailable()), reason="native kernels cannot be built here"
            ),
        ),
    ],
)
def test_two_tiers(implementation):
    """The best stay at eight bits, the next at four; a tier's line is one for all heads."""
    policy = kvzip(0.5, tiers=("K8V4", "K4V2"), keep_high=0.2)
    _, model, params = models(2)
    cache = make_cache(model, policy, [LENGTH], kernels=Kernels(implementation))
    _, cache = prefill(model, params, cache, PROMPT[None], np.array([LENGTH]), 128)
    check_pool(cache.spec.layout, cache.page_table, cache.tier_len, cache.ring)
    tiers = {"high": [], "low": [], "recent": []}
    for layer, head in HEADS:
        for tier, _, _, score in held_tokens(cache, layer, 0, head).values():
            tiers[tier].append(score)
    assert [len(tiers[name]) for name in tiers] == [59 * 8, 90 * 8, 8]
    assert min(tiers["high"]) >= max(tiers["low"])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("tiers", [("K8V4",), ("K8V4", "K4V2")], ids=str)
def test_the_smallest_budget_is_enough(tiers):
    """It holds the whole prompts; what they leave takes a second turn in, which their own tokens
    would have no room for beside it.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policy = kvzip(0.3, 128, 16, tiers=tiers, keep_high=0.1 if len(tiers) == 2 else None, flush=8)
    run = partial(
        dkv.generate,
        model,
        params,
        [PROMPT, PROMPT[:170]],
        policy=policy,
        max_new_tokens=9,
        prefill_chunk=64,
        max_len=600,
    )
    with pytest.raises(ValueError, match="the smallest budget") as told:
        run(memory_budget="100kB")
    out, free = run(memory_budget=int(re.findall(r"is (\d+) bytes", str(told.value))[0])), run()
    np.testing.assert_array_equal(out.tokens, free.tokens)
    assert (
        out.cache.spec.num_pages < 0.6 * free.cache.spec.num_pages
        and out.finish_reason == ("length",) * 2
    )
    more = dkv.generate(
        model,
        params,
        [PROMPT[:120], PROMPT[:60]],
        cache=out.cache,
        max_new_tokens=9,
        prefill_chunk=64,
    )
    assert more.finish_reason == ("length",) * 2
    check_pool(more.cache.spec.layout, more.cache.page_table, more.cache.tier_len, more.cache.ring)


@pytest.mark.slow
def test_a_request_for_which_there_is_no_page_is_emptied(monkeypatch):
    """Full pages of one tier become parts of pages of two."""
    _, model, params = models(2)
    policy = kvzip(1.0, tiers=("K8V4", "K4V2"), keep_high=0.9, window=16)
    monkeypatch.setattr(
        import_module("diffkv_jax.read_prompts"), "end_passes", lambda cache, _: cache
    )
    cache = make_cache(model, policy, [16 + 64], max_len=80)
    assert cache.spec.layout.pages_for(0, 64) * cache.spec.layout.tokens_per_page(0) == 64
    _, cache = prefill(model, params, cache, PROMPT[None, :80], np.array([80]), 128)
    due, starved = np.array([True]), jax.tree.map(jnp.copy, cache)
    starved = dataclasses.replace(
        starved, ring=dataclasses.replace(starved.ring, count=jnp.int32(0))
    )
    starved, cache = end_passes(starved, due), end_passes(cache, due)
    assert not cache.overflow.any() and np.asarray(cache.tier_len[..., 1]).max() > 0
    check_pool(cache.spec.layout, cache.page_table, cache.tier_len, cache.ring)
    assert starved.overflow.all() and not np.asarray(starved.tier_len).any()


def test_its_words():
    class Chat(Tokenizer):
        chat_template = "a template"

        def apply_chat_template(self, messages, **_):
            return f"<user>{messages[0]['content']}</user><answer>"

        def encode(self, text, return_tensors=None, add_special_tokens=True):
            return [5, 6] if text == "</user><answer>" else super().encode(text)

    assert dkv.replay_words(Tokenizer()) == REPLAY
    assert dkv.replay_words(Chat(), chunk=64) == dataclasses.replace(
        REPLAY, suffix=(5, 6), chunk=64
    )
    replay = dataclasses.replace(REPLAY, chunk=12, overlap=3)
    (first, _, at), (second, real, then) = ContextReconstruction(replay=replay).passes(
        np.arange(100, 140).reshape(2, 20), np.array([20, 9])
    )
    assert (
        (at, then) == (0, 12)
        and first.shape == second.shape == (2, 16)
        and real.tolist() == [4 + 3 + 1 + 8, 0]
    )
    assert first[0].tolist() == [11, 7, 90, 8, *range(100, 112)] and first[1].tolist() == [
        0,
        0,
        0,
        11,
        7,
        90,
        8,
        *range(120, 129),
    ]
    assert second[0].tolist() == [3, 55, 6, 41, 109, 110, 111, 8, *range(112, 120)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": dkv.KeepAll()}, "needs keep=Budget"),
        ({"score": KeyNorm()}, "needs the scores of all layers"),
        ({"keep": dkv.Budget(keep="1MiB")}, "decides once a prompt"),
        ({"tiers": ("K2cV2",)}, "not separable"),
        ({"pairs": dkv.LayerPairs(), "keep": dkv.Budget()}, "keeps all tokens of merged layers"),
        ({"keep": HeadClasses()}, "measures attention by"),
    ],
    ids=str,
)
def test_choices_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(dkv.kvzip(0.5), **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextReconstruction(queries=64), "looks at no queries' attention"),
        (lambda: dkv.Budget(share_layers=True), "give share_heads= too"),
        (
            lambda: dkv.Budget(share_layers=True, share_heads=0.0, whole_layers=(0,)),
            "leave one out",
        ),
        (lambda: dkv.Replay(chunk=0), "replay.chunk=0 must be"),
        (lambda: dkv.Replay(first="say it"), "replay.first='say it' must be token ids"),
        (
            lambda: ContextReconstruction(replay={"words": (1,)}),
            "replay.type=None must be a Replay",
        ),
    ],
)
def test_stages_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_prompts_that_cannot_be_gone_over():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    run = partial(dkv.generate, model, params, max_new_tokens=1)
    with pytest.raises(
        ValueError, match="come to 4248 tokens, and the model's context is 4096; shorten"
    ):
        run(np.zeros((1, 2200), int), policy=dkv.kvzip())
    with pytest.raises(ValueError, match="token id 90, outside the vocabulary"):
        dkv.Replay((90,)).check_prompts(
            dataclasses.replace(model.attention, vocab_size=80), np.array([5])
        )
    # half of the prompt would fit, and the whole one comes first
    with pytest.raises(ValueError, match="cannot hold"):
        run(np.tile(PROMPT, 4)[None], policy=dkv.kvzip(0.2), memory_budget="700kB")
    policy = kvzip(0.25, 64)
    assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy
