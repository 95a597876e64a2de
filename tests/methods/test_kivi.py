"""KIVI on cached pages: its equations in NumPy, cadence, attention, and eviction before
encoding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.make_cache import make_cache
from diffkv_jax.methods.diffkv import MeanAttention
from diffkv_jax.methods.key_norm import KeyNorm
from diffkv_jax.pallas_kernels.codecs import KVFormat, Uniform
from diffkv_jax.pallas_kernels.codecs.uniform import nearest_divisor
from diffkv_jax.pallas_kernels.decode_attention import Heads, decode_attention
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.read_prompts import prefill
from diffkv_jax.testing.blocks import kivi_keys
from diffkv_jax.testing.quantiser import fake_quantise
from diffkv_jax.testing.readback import check_pool, held_tokens, page_ids_in_use
from diffkv_jax.testing.tiny import tiny_model

HEAD_DIM, LENGTH, GROUP = 32, 150, 32
TOKENS = np.random.default_rng(5).integers(0, 97, (1, 260))
KIVI = dkv.kivi(2, group=GROUP, residual=48)  # a window of 16
EXACT = dkv.CompressionPolicy.none(window=16)


def model_of():
    return tiny_model(q_heads=4, kv_heads=2, head_dim=HEAD_DIM)


def after_prompt(policy, length=LENGTH, chunk=256, tokens=TOKENS):
    """The cache after the first `length` tokens."""
    model, params = model_of()
    sizes = np.full(len(tokens), length)
    cache = make_cache(
        model,
        policy,
        sizes + 1,
        kernels=dkv.cache.kernels.kernels_for(policy, model.attention, "xla"),
    )
    return prefill(model, params, cache, tokens[:, :length], sizes, chunk)[1]


def exact(cache, layer, head, request=0):
    """K and V float32 [tokens, d] of a cache without loss, by position."""
    held = held_tokens(cache, layer, request, head)
    return tuple(np.stack([held[at][i] for at in sorted(held)]) for i in (1, 2))


def kivi(k, v, bits=2):
    """What KIVI makes of K and V `[n, d]`, n a multiple of the group."""
    keys = [kivi_keys(k[at : at + GROUP].T, bits).T for at in range(0, len(k), GROUP)]
    return np.concatenate(keys), fake_quantise(v, bits, HEAD_DIM // GROUP)


def same_tokens(held, order, k, v):
    """The tokens at positions `order` have keys `k` and values `v`."""
    for i, at in enumerate(order):
        np.testing.assert_allclose(held[at][1], k[i], atol=1e-5)
        np.testing.assert_allclose(held[at][2], v[i], atol=1e-5)


def test_pages_hold_kivi():
    """A prompt of one chunk is attended exactly, so the exact keys and values are those of the
    plain cache in every layer.
    """
    found, plain = after_prompt(KIVI), after_prompt(EXACT)
    check_pool(found.spec.layout, found.stored.page_table, found.stored.tier_len, found.stored.ring)
    assert found.stored.tier_len[..., 0].tolist() == [
        [[128, 128]]
    ] * 2 and found.counters.recent_len.tolist() == [22]
    for layer in range(2):
        for head in range(2):
            k, v = exact(plain, layer, head)
            held = held_tokens(found, layer, 0, head)
            assert sorted(held) == list(range(LENGTH))
            same_tokens(held, range(128), *kivi(k[:128], v[:128]))
            same_tokens(held, range(128, LENGTH), k[128:], v[128:])
            # groups begin where they begin
            assert np.abs(held[3][1] - kivi(k[1:129], v[1:129])[0][2]).max() > 1e-3


@pytest.mark.slow
def test_groups_stay_the_same_in_chunks_and_in_decode():
    """In the first layer keys and values depend on the tokens alone: a prompt in chunks of 64, then
    100 steps.
    """
    model, params = model_of()
    _, cache = teacher_forced(model, params, TOKENS, LENGTH, KIVI, prefill_chunk=64)
    k, v = exact(after_prompt(EXACT, 260, chunk=512), 0, 1)
    assert cache.counters.seq_len.tolist() == [260] and cache.counters.recent_len.tolist() == [
        260 - 224
    ]
    held = held_tokens(cache, 0, 0, 1)
    assert sorted(held) == list(range(260))
    same_tokens(held, range(224), *kivi(k[:224], v[:224]))
    same_tokens(held, range(224, 260), k[224:], v[224:])
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)


def test_attention_reads_what_is_stored():
    """Against float64 softmax over the decoded tokens, with rubbish in every page that nobody
    owns.
    """
    cache = after_prompt(KIVI)
    layout, rng = cache.spec.layout, np.random.default_rng(0)
    table, lengths = (
        np.asarray(cache.stored.page_table)[1, 0],
        np.asarray(cache.stored.tier_len)[1, 0],
    )
    lengths = lengths - [[32], [0]]  # the first head holds a block fewer: its lanes are dead
    used = page_ids_in_use(
        layout, cache.stored.page_table, cache.stored.tier_len, cache.spec.num_pages
    )
    dead = np.setdiff1d(np.arange(cache.spec.num_pages), used)
    pages = dataclasses.replace(
        cache.stored.pages,
        payload=cache.stored.pages.payload.at[dead].set(255),
        meta=cache.stored.pages.meta.at[dead].set(jnp.nan),
    )
    q = rng.normal(size=(2, 2, HEAD_DIM)).astype(np.float32)
    heads = Heads(
        table, lengths, cache.recent.k[:, 0], cache.recent.v[:, 0], np.array([22, 22]), jnp.int32(1)
    )
    out = jax.jit(
        lambda pages, q, heads: decode_attention(
            q, pages, layout, heads, max_len=cache.spec.max_len, sm_scale=0.3
        )[0]
    )(pages, q, heads)
    for head in range(2):
        held = held_tokens(cache, 1, 0, head)
        seen = [at for at in held if not lengths[head, 0] <= at < 128]
        k, v = (np.stack([held[at][i] for at in seen]).astype(np.float64) for i in (1, 2))
        logits = q[head].astype(np.float64) @ k.T * 0.3
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        wanted = p / p.sum(axis=-1, keepdims=True) @ v
        np.testing.assert_allclose(out[head], wanted, atol=2e-5)
        assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize(
    ("bits", "group", "head_dim"), [(2, 32, 64), (2, 64, 128), (4, 32, 128), (2, 128, 128)]
)
def test_bits_are_those_of_the_formula(bits, group, head_dim):
    """methods: b + 32 / g bits for each number, codes and metadata of the page's rows."""
    policy = dkv.kivi(bits, group=group, residual=256)
    layout = PageLayout.solve(
        policy.formats("bfloat16"), head_dim, tokens=policy.group, scored=False
    )
    assert layout.formats[0].token_bytes(head_dim) * 8 / (2 * head_dim) == bits + 32 / group
    assert layout.tokens_per_group == group


@pytest.mark.slow
@pytest.mark.long
def test_a_row_is_the_request_alone():
    model, params = model_of()
    prompts = [TOKENS[0, :150], TOKENS[0, 30:70], TOKENS[0, 100:251]]
    run = {"policy": KIVI, "max_new_tokens": 40, "prefill_chunk": 64, "max_len": 384}
    together = dkv.generate(model, params, prompts, **run)
    alone = dkv.generate(model, params, prompts[2:], **run)
    np.testing.assert_array_equal(together.tokens[2], alone.tokens[0])
    first, second = (
        held_tokens(cache, 1, row, 0) for cache, row in ((together.cache, 2), (alone.cache, 0))
    )
    assert {at: tier for at, (tier, *_) in first.items()} == {
        at: tier for at, (tier, *_) in second.items()
    }
    second_turn = dkv.generate(
        model, params, prompts, cache=together.cache, max_new_tokens=1, prefill_chunk=64
    )
    check_pool(
        second_turn.cache.spec.layout,
        second_turn.cache.stored.page_table,
        second_turn.cache.stored.tier_len,
        second_turn.cache.stored.ring,
    )
    # prompt, answer, prompt
    assert sorted(held_tokens(second_turn.cache, 1, 1, 0)) == list(range(40 + 40 + 40))


@pytest.mark.slow
def test_evicted_before_encoded():
    """SnapKV, then KIVI: the chosen tokens of each head and the next best fill blocks, whose groups
    are of those tokens alone.
    """
    options = {"keep": 0.5, "window": 16, "flush": 32, "sinks": 2}
    found, apart = (
        after_prompt(dkv.snapkv(tiers=tiers, **options)) for tiers in (("K4cV4:1,1",), ("K4V4",))
    )
    plain = after_prompt(EXACT)
    differs = False
    for layer in range(2):
        for head in range(2):
            held, chosen = held_tokens(found, layer, 0, head), held_tokens(apart, layer, 0, head)
            stored = [at for at in held if held[at][0] != "recent"]
            # 75 less the 22 in the window are 53
            assert stored == sorted(stored) and len(stored) == 64
            recent = set(range(128, LENGTH))
            best = [
                at
                for at in sorted(chosen, key=lambda at: chosen[at][3])
                if chosen[at][0] != "recent" and at not in recent
            ]
            assert set(best[-53:]) <= set(stored)
            k, v = exact(plain, layer, head)
            encoded = [kivi_keys(k[stored[at : at + 32]].T, 4).T for at in (0, 32)]
            same_tokens(held, stored, np.concatenate(encoded), fake_quantise(v[stored], 4))
            # encoding before evicting would have given other keys, but for a separable codec
            before = np.concatenate([kivi_keys(k[at : at + 32].T, 4).T for at in range(0, 128, 32)])
            differs |= (
                np.abs(before[stored] - np.stack([held[at][1] for at in stored])).max() > 1e-2
            )
            same_tokens(chosen, best, fake_quantise(k, 4)[best], fake_quantise(v, 4)[best])
    assert differs


@pytest.mark.slow
@pytest.mark.parametrize("method", [dkv.expected_attention, dkv.pyramidinfer])
def test_other_scores_that_decide_once_a_prompt(method):
    """Whole blocks of exact tokens in every layer, also where deeper ones see fewer tokens."""
    found = after_prompt(method(0.5, tiers=("K4cV4",), window=16, flush=32))
    lengths = np.asarray(found.stored.tier_len)
    assert (lengths % 32 == 0).all() and (lengths > 0).all() and lengths.min() < 128
    k, _ = exact(after_prompt(EXACT), 0, 0)
    held = held_tokens(found, 0, 0, 0)
    stored = [at for at in held if held[at][0] != "recent"]
    wanted = np.concatenate(
        [kivi_keys(k[stored[at : at + 32]].T, 4).T for at in range(0, len(stored), 32)]
    )
    np.testing.assert_allclose(np.stack([held[at][1] for at in stored]), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_snapkv_goes_on_in_decode():
    model, params = model_of()
    policy = dkv.snapkv(0.5, tiers=("K4cV4",), window=16, flush=32)
    out = dkv.generate(model, params, TOKENS[:, :LENGTH], policy=policy, max_new_tokens=61)
    check_pool(
        out.cache.spec.layout,
        out.cache.stored.page_table,
        out.cache.stored.tier_len,
        out.cache.stored.ring,
    )
    # 64 of the prompt, and 128 to 191
    assert out.cache.stored.tier_len[..., 0].tolist() == [[[128, 128]]] * 2
    assert set(range(128, 210)) <= set(held_tokens(out.cache, 1, 0, 1))
    with pytest.raises(ValueError, match="holds a prompt already"):
        dkv.generate(model, params, TOKENS[:, :20], cache=out.cache, max_new_tokens=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": {"type": "Schedule", "flush": 16}}, "flush=16 must be at least group=32"),
        ({"schedule": {"type": "Schedule", "group": 48}}, "group=48 must be a multiple of 32"),
        ({"schedule": {"type": "Schedule", "group": 512}}, "group=512"),
        (
            {"tiers": ("K8cV8", "K4V4"), "score": MeanAttention(queries=64)},
            "not separable, a token cannot move",
        ),
        ({"score": KeyNorm(), "keep": dkv.Budget()}, "not separable: its tokens share numbers"),
        (
            {
                "score": MeanAttention(queries="all"),
                "keep": dkv.Thresholds(alpha_low=0.1, alpha_high=0.1),
            },
            "score=MeanAttention.* drops stored tokens",
        ),
    ],
)
def test_what_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        dkv.CompressionPolicy(**{"name": "x", "tiers": ("K4cV4",)} | changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "value_group", "channels"), [(80, None, 20), (100, None, 25), (80, 40, 40)]
)
def test_head_dims_that_the_group_does_not_divide(head_dim, value_group, channels):
    """Tokens of a block and channels of a value's group are two numbers: the second is the nearest
    divisor unless it is given.
    """
    model, params = tiny_model(q_heads=2, kv_heads=1, head_dim=head_dim, layers=1)
    policy = dkv.kivi(2, group=GROUP, value_group=value_group, residual=48)
    assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy
    caches = []
    for one in (policy, EXACT):
        cache = make_cache(model, one, [81], kernels=Kernels("xla"))
        caches.append(prefill(model, params, cache, TOKENS[:, :80], np.array([80]), 128)[1])
    k, v = exact(caches[1], 0, 0)
    keys = np.concatenate([kivi_keys(k[at : at + GROUP].T, 2).T for at in (0, 32)])
    same_tokens(
        held_tokens(caches[0], 0, 0, 0), range(64), keys, fake_quantise(v, 2, head_dim // channels)
    )
    assert np.abs(fake_quantise(v, 2, head_dim // channels) - fake_quantise(v, 2, 1)).max() > 0.01


@pytest.mark.parametrize(
    ("head_dim", "channels", "nearest"),
    [
        (64, 32, 32),
        (96, 32, 32),
        (112, 32, 28),
        (120, 32, 30),
        (80, 64, 40),
        (100, 64, 50),
        (48, 64, 48),
        (74, 32, 37),
        (94, 32, 47),
    ],
)
def test_nearest_divisors(head_dim, channels, nearest):
    assert nearest_divisor(head_dim, channels) == nearest
    value = KVFormat.parse(f"K2cV2g{channels}").value
    assert value.for_block(head_dim, channels) == Uniform(2, head_dim // nearest)
    if head_dim % min(channels, head_dim):
        with pytest.raises(
            ValueError,
            match=f"head_dim={head_dim} must be a multiple .* groups of {nearest} would do",
        ):
            value.for_block(head_dim, 256)  # a number of its own


def test_bad_input():
    model, params = model_of()
    with pytest.raises(ValueError, match="residual=32 must be larger than group=32"):
        dkv.kivi(group=32, residual=32)
    with pytest.raises(ValueError, match="value_group=0 must be an integer of at least 1"):
        dkv.kivi(value_group=0)
    with pytest.raises(
        ValueError, match="head_dim=32 must be a multiple of the groups' channels=24"
    ):
        dkv.generate(model, params, TOKENS, policy=dkv.kivi(value_group=24))
    with pytest.raises(ValueError, match="raise prefill_chunk"):
        dkv.generate(model, params, TOKENS, policy=dkv.snapkv(tiers=("K4cV4",)), prefill_chunk=128)
    with pytest.raises(ValueError, match="plain XLA only"):
        dkv.generate(model, params, TOKENS, policy=KIVI, implementation="cpu")
    assert dkv.CompressionPolicy.from_json(KIVI.to_json()) == KIVI
    assert dkv.load_policy("kivi") == dkv.kivi() and dkv.quantized("K4cV4").group == 32
