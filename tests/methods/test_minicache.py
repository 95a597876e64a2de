"""MiniCache: what two layers' pages decode to, attention over it, and the pages themselves, against
the equations in NumPy.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import diffkv_jax as dkv
from diffkv_jax.cache.cache import empty_cache
from diffkv_jax.cache.pool_size import bound, with_pool
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.make_cache import make_cache
from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.codecs import Full, Shared, Uniform
from diffkv_jax.pallas_kernels.dispatch import XLA
from diffkv_jax.steps.attend import attend
from diffkv_jax.steps.jitted import decode_step, prefill_chunk
from diffkv_jax.testing import quantiser
from diffkv_jax.testing.readback import check_pool, held_tokens, page_ids_in_use
from diffkv_jax.testing.tiny import tiny_model
from oracles import minicache

LAYERS, REQUESTS, Q_HEADS, KV_HEADS, DIM, CHUNK, WINDOW, FLUSH = 5, 2, 4, 2, 16, 32, 8, 4
FIRST = 3  # of 5 layers the last 2 are merged: half of them, and an odd one out stays as it is


def spec_of(
    layers: int = LAYERS, windows: tuple[int | None, ...] | None = None, dim: int = DIM
) -> AttentionSpec:
    windows = windows or (None,) * layers
    return AttentionSpec(
        len(windows), Q_HEADS, KV_HEADS, dim, windows, dim**-0.5, None, 97, 4096, "float32"
    )


@dataclass(frozen=True)
class Layers:
    """A model without weights: its parameters are q, k, v of every layer and its logits are what
    attention gives.
    """

    attention: AttentionSpec

    def apply(self, variables, tokens, positions, cache, step, last_only=False):
        """Outputs [R, 1, L, T, H, d]."""

        def layer(cache, inputs):
            out, cache = attend(cache, *inputs, step)
            return cache, out

        cache, outs = lax.scan(
            layer, cache, (jnp.arange(self.attention.num_layers), *variables["params"])
        )
        return jnp.moveaxis(outs, 0, 1)[:, None], cache


MODEL = Layers(spec_of())
POLICY = dkv.minicache(window=WINDOW, flush=FLUSH)
decode = jax.jit(partial(decode_step, MODEL))
PROMPTS, STEPS, MORE, LAST_STEPS = ([11, 32, 32], [0, 8, 32]), 22, (20, 32), 5
NEAR = 5e-3  # where the norm of a vector rounds to another float16
TOTALS = [
    sum(prompt) + STEPS + more + LAST_STEPS for prompt, more in zip(PROMPTS, MORE, strict=True)
]


def empty(free: int | None = None) -> dkv.KVCache:
    """An empty cache with just the pages that its policy needs, or with only `free` of them."""
    build = partial(
        CacheSpec.build, num_requests=REQUESTS, max_len=160, num_pages=0, dtype="float32", tokens=16
    )
    spec = with_pool(build(MODEL.attention, POLICY), POLICY, TOTALS, TOTALS, None)
    cache = jax.jit(empty_cache, static_argnums=0)(spec, bound(spec, POLICY))
    count = jnp.int32(spec.num_pages if free is None else free)
    return dataclasses.replace(cache, ring=dataclasses.replace(cache.ring, count=count))


def draw(rng: np.random.Generator, tokens: int) -> list[np.ndarray]:
    """q, k, v float32 [L, R, tokens, heads, d]: neighbouring layers are alike, some tokens less
    than others, of different lengths.
    """

    def tensor(heads: int) -> np.ndarray:
        base, own = (
            rng.normal(size=(REQUESTS, tokens, heads, DIM)),
            rng.normal(size=(LAYERS, REQUESTS, tokens, heads, DIM)),
        )
        mix = rng.uniform(0.1, 1.2, size=(REQUESTS, tokens, heads, 1))
        return ((base + mix * own) * rng.uniform(0.5, 2.0, size=(LAYERS, 1, 1, heads, 1))).astype(
            np.float32
        )

    return [tensor(Q_HEADS), tensor(KV_HEADS), tensor(KV_HEADS)]


def follow(
    requests: list[minicache.Request], cache: dkv.KVCache, rng: np.random.Generator, lengths
) -> tuple[float, dkv.KVCache]:
    """One prompt chunk through the library and the reference: the largest difference of their
    outputs.
    """
    q, k, v = draw(rng, CHUNK)
    tokens = jnp.zeros((REQUESTS, CHUNK), jnp.int32)
    out, cache = prefill_chunk(
        MODEL, (q, k, v), cache, tokens, jnp.asarray(lengths), jnp.asarray(True)
    )
    worst = 0.0
    for row, (request, n) in enumerate(zip(requests, lengths, strict=True)):
        if n:
            request.append(k[:, row, -n:], v[:, row, -n:])
            worst = max(
                worst, np.abs(request.attend(q[:, row, -n:]) - np.asarray(out)[row][:, -n:]).max()
            )
            request.leave(WINDOW)
    return worst, cache


def follow_decode(
    requests, cache, rng, steps: int, active=(True,) * REQUESTS
) -> tuple[float, dkv.KVCache]:
    """Likewise some decode steps since a prompt; a compression event every FLUSH of them."""
    worst = 0.0
    for step in range(steps):
        q, k, v = draw(rng, 1)
        out, cache = decode((q, k, v), cache, jnp.zeros(REQUESTS, jnp.int32), jnp.asarray(active))
        for row, request in enumerate(requests):
            if active[row]:
                request.append(k[:, row], v[:, row])
                worst = max(worst, np.abs(request.attend(q[:, row]) - np.asarray(out)[row]).max())
                if (step + 1) % FLUSH == 0:
                    request.leave(WINDOW)
    return worst, cache


def references(**changes) -> list[minicache.Request]:
    return [minicache.Request(LAYERS, KV_HEADS, DIM, FIRST, **changes) for _ in range(REQUESTS)]


@lru_cache
def whole_run() -> tuple[dkv.KVCache, dict[str, list[minicache.Request]], dict[str, float]]:
    """Prompts of several lengths in chunks, decode, a second turn: the cache, references, and how
    far their outputs are from its.
    """
    variants = {
        "": {},
        "t": {"t": 0.4},
        "norms": {"swap_norms": True},
        "similar": {"retain": lambda angle: -angle},
        "unmerged": {"retention": 1.0},
    }
    everything, worst = {}, {}
    for name, changes in variants.items():
        rng, requests, cache, found = np.random.default_rng(1), references(**changes), empty(), []
        for lengths in zip(*PROMPTS, strict=True):
            far, cache = follow(requests, cache, rng, lengths)
            found.append(far)
        far, cache = follow_decode(requests, cache, rng, STEPS)
        found.append(far)
        far, cache = follow(requests, cache, rng, MORE)
        found.append(far)
        far, cache = follow_decode(requests, cache, rng, LAST_STEPS)
        everything[name], worst[name] = requests, max(*found, far)
    return cache, everything, worst


def distance(cache: dkv.KVCache, requests: list[minicache.Request]) -> float:
    """Largest difference between what the cache's pages and windows decode to and what the
    references hold.
    """
    worst = 0.0
    for row, request in enumerate(requests):
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                held = held_tokens(cache, layer, row, head)
                assert sorted(held) == list(range(request.seen))
                if not held:
                    continue
                for tensor in (0, 1):
                    found = np.stack([held[at][1 + tensor] for at in range(request.seen)])
                    worst = max(worst, np.abs(found - request.held[tensor, layer, :, head]).max())
    return worst


@pytest.mark.slow
def test_both_layers_decode_to_the_equations():
    cache, requests, _ = whole_run()
    assert distance(cache, requests[""]) < NEAR
    for wrong in ("t", "norms", "similar", "unmerged"):
        assert distance(cache, requests[wrong]) > 0.3, wrong


@pytest.mark.slow
def test_attention_reads_what_was_restored():
    _, _, worst = whole_run()
    assert worst[""] < 2e-3
    for wrong in ("t", "norms", "similar", "unmerged"):
        assert worst[wrong] > 0.05, wrong


def test_the_most_different_tokens_stay_unmerged_in_both_layers():
    cache, requests, _ = whole_run()
    for row, request in enumerate(requests[""]):
        for head in range(KV_HEADS):
            layers = [held_tokens(cache, layer, row, head) for layer in (FIRST, FIRST + 1)]
            exact, shared = (
                [{at for at, token in held.items() if token[0] == tier} for held in layers]
                for tier in ("high", "low")
            )
            assert exact[0] == exact[1] and shared[0] == shared[1]
            assert shared[0] == set(np.flatnonzero(request.shared[FIRST, :, head]))
            assert (
                len(exact[0]) == np.ceil(0.05 * request.stored)
                and len(exact[0]) + len(shared[0]) == request.stored
            )
            assert not any(
                token[0] == "low" for token in held_tokens(cache, FIRST - 1, row, head).values()
            )


def test_a_shared_page_is_owned_once():
    cache, requests, _ = whole_run()
    layout = cache.spec.layout
    check_pool(layout, cache.page_table, cache.tier_len, cache.ring)
    tier_len = np.asarray(cache.tier_len)
    assert (
        not tier_len[:FIRST, ..., 1].any()
        and not tier_len[FIRST, ..., 1].any()
        and tier_len[FIRST + 1, ..., 1].all()
    )
    report = dkv.memory_report(cache)
    assert report.pages.sum() == len(
        page_ids_in_use(layout, cache.page_table, cache.tier_len, cache.spec.num_pages)
    )
    assert not report.dropped.any()
    np.testing.assert_array_equal(report.tokens[FIRST], report.tokens[FIRST + 1])


def test_the_pool_is_just_large_enough():
    cache, requests, _ = whole_run()
    assert [request.seen for request in requests[""]] == TOTALS and not np.asarray(
        cache.overflow
    ).any()
    # what the tokens in the windows may still take
    assert int(cache.ring.count) < LAYERS * REQUESTS * KV_HEADS
    plain = dkv.CompressionPolicy.none(window=WINDOW, flush=FLUSH)
    build = partial(
        CacheSpec.build,
        MODEL.attention,
        num_requests=REQUESTS,
        max_len=160,
        num_pages=0,
        dtype="float32",
        tokens=16,
    )
    assert cache.spec.num_pages < with_pool(build(plain), plain, TOTALS, TOTALS, None).num_pages
    with pytest.raises(ValueError, match="smallest budget"):
        with_pool(build(POLICY), POLICY, TOTALS, TOTALS, 1000)


def check_free(cache: dkv.KVCache) -> None:
    """No page is owned twice or owned and free."""
    ids, start, count = np.asarray(cache.ring.ids), int(cache.ring.start), int(cache.ring.count)
    used = page_ids_in_use(
        cache.spec.layout, cache.page_table, cache.tier_len, cache.spec.num_pages
    )
    free = [int(ids[(start + i) % len(ids)]) for i in range(count)]
    assert len(set(used + free)) == len(used) + len(free)


def test_a_prompt_without_pages_leaves_no_trace():
    """The last page that two requests of 24 tokens outside their windows need is one of the merged
    layers: without it one gives up.
    """
    _, cache = follow(references(), empty(), np.random.default_rng(3), (32, 32))
    needed = cache.spec.num_pages - int(cache.ring.count)
    requests = references()
    _, cache = follow(requests, empty(needed - 1), np.random.default_rng(3), (32, 32))
    assert np.asarray(cache.overflow).tolist() == [False, True]
    assert int(cache.seq_len[1]) == 0 and int(cache.ring.count) == needed - 1 - needed // 2
    check_free(cache)
    assert distance(cache, [requests[0], *references()[1:]]) < NEAR


def test_decode_without_pages_leaves_a_request_as_it_was():
    rng, requests = np.random.default_rng(4), references()
    _, cache = follow(requests, empty(), rng, (32, 32))
    _, cache = follow_decode(requests, cache, rng, 3 * FLUSH - 1)
    before = jax.tree.map(np.asarray, (cache.page_table, cache.tier_len))
    pages, none = cache.ring, dataclasses.replace(cache.ring, count=jnp.int32(0))
    # an event, and a third page for every head
    _, cache = follow_decode(requests, dataclasses.replace(cache, ring=none), rng, 1)
    assert (
        np.asarray(cache.overflow).all()
        and np.asarray(cache.recent_len).tolist() == [WINDOW + FLUSH] * REQUESTS
    )
    for old, new in zip(before, (cache.page_table, cache.tier_len), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))
    assert distance(cache, requests) < NEAR
    cache = dataclasses.replace(cache, ring=pages, overflow=jnp.zeros(REQUESTS, bool))
    worst, cache = follow(requests, cache, rng, (32, 16))  # it goes on once there are pages
    assert worst < 2e-3 and distance(cache, requests) < NEAR
    check_free(cache)


ARROW = np.array([3.0, 4.0, 0, 0])  # length 5


@pytest.mark.parametrize(
    ("y", "direction"),
    [
        (2 * ARROW, [0.6, 0.8, 0, 0]),  # parallel: restored exactly
        (-2 * ARROW, [-0.6, -0.8, 0, 0]),  # opposite: the line ends nearer to the second
        (
            [-8.0, 6.0, 0, 0],
            np.cos(0.3 * np.pi) * np.array([0.6, 0.8, 0, 0])
            + np.sin(0.3 * np.pi) * np.array([-0.8, 0.6, 0, 0]),
        ),
    ],
    ids=["parallel", "opposite", "orthogonal"],
)
def test_directions_between(y, direction):
    block = jnp.asarray(np.concatenate([ARROW, y])[:, None], jnp.float32)
    codec = Shared(Full("float32"), 0.6)
    payload, meta = codec.encode(block)
    for which, norm in enumerate((5, 10)):
        found = dataclasses.replace(codec, reads=which).decode(payload, meta)[:, 0]
        np.testing.assert_allclose(found, norm * np.asarray(direction), atol=1e-5)


def test_a_vector_of_zeros():
    codec = Shared(Full("float32"), 0.6, reads=1)
    for halfway in (codec, dataclasses.replace(codec, t=0.5)):
        payload, meta = halfway.encode(
            jnp.asarray(np.concatenate([np.zeros(4), ARROW])[:, None], jnp.float32)
        )
        np.testing.assert_allclose(halfway.decode(payload, meta)[:, 0], ARROW, atol=1e-5)
        np.testing.assert_array_equal(
            dataclasses.replace(halfway, reads=0).decode(payload, meta), 0
        )


@pytest.mark.slow
def test_directions_in_four_bits():
    """What is stored, and what attention makes of it, against the equations and the reference
    quantiser.
    """
    rng = np.random.default_rng(0)
    x, y, q = (rng.normal(size=(n, 32)).astype(np.float32) for n in (7, 7, 3))
    codec = Shared(Uniform(4, 2), 0.6)
    payload, meta = codec.encode(jnp.concatenate([x.T, y.T]))
    assert payload.shape == (codec.rows(32), 7) and meta.shape == (codec.meta_rows, 7) == (6, 7)
    direction = quantiser.fake_quantise(minicache.common_direction(x, y, 0.6), 4, 2)
    for which, layer in enumerate((x, y)):
        reader, expected = (
            dataclasses.replace(codec, reads=which),
            np.linalg.norm(layer, axis=1, keepdims=True) * direction,
        )
        np.testing.assert_allclose(reader.decode(payload, meta).T, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(reader.key_logits(q, payload, meta), q @ expected.T, atol=2e-2)
        weights = rng.uniform(size=(3, 7)).astype(np.float32)
        valid = np.arange(7) < 5
        mixed = reader.value_mix(
            weights * valid, payload, meta.at[:, 5:].set(jnp.nan), jnp.asarray(valid)
        )
        np.testing.assert_allclose(mixed, (weights * valid) @ expected, atol=2e-2)
        assert np.abs(expected - layer).max() > 0.5


def shared_layers(
    policy: dkv.CompressionPolicy, layers: int, tokens: int, dim: int = 64
) -> dkv.MemoryReport:
    """The report of a cache whose heads each hold `tokens` outside the window; only its counters
    are filled in.
    """
    model = Layers(
        dataclasses.replace(spec_of(layers, dim=dim), max_position_embeddings=2 * tokens)
    )
    cache = make_cache(
        model, policy, [policy.schedule.window], cache_dtype="bfloat16", max_len=2 * tokens
    )
    spec = cache.spec
    length = np.zeros(cache.tier_len.shape, np.int32)
    length[..., 0] = tokens
    if spec.pairs is not None:
        retained = int(spec.pairs.retained(np.asarray(tokens)))
        length[spec.unmerged_layers :, ..., 0] = retained
        length[spec.unmerged_layers + 1 :: 2, ..., 1] = tokens - retained
    seen = jnp.asarray([tokens + policy.schedule.window])
    return dkv.memory_report(
        dataclasses.replace(
            cache, tier_len=jnp.asarray(length), seq_len=seen, recent_len=seen - tokens
        )
    )


def test_memory_is_that_of_the_formula():
    """Merged layers take 0.5 + 1/d + gamma of plain ones at most: norms take 1/d, and gamma counts
    retained tokens twice.
    """
    tokens, dim, gamma = 6400, 64, 0.05
    merged, plain = (
        shared_layers(policy, 4, tokens)
        for policy in (dkv.minicache(window=WINDOW), dkv.CompressionPolicy.none(window=WINDOW))
    )
    for kind in ("logical_bytes", "allocated_bytes"):
        both = [
            getattr(report, kind)[2:, ..., :-1].sum() / getattr(plain, kind)[2:, ..., :-1].sum()
            for report in (merged, plain)
        ]
        share = gamma + (1 - gamma) * (0.5 + 1 / dim)
        assert both[1] == 1 and share - 0.01 < both[0] < 0.5 + 1 / dim + gamma
        untouched = (
            getattr(merged, kind)[:2, ..., :-1].sum() / getattr(plain, kind)[:2, ..., :-1].sum()
        )
        assert 1 <= untouched < 1.04  # a page has rows for norms that exact tokens leave empty
    assert 1.25 < plain.logical / merged.logical < 1.32  # half of the layers: 1.28
    four_bits = shared_layers(dkv.minicache(inner="K4V4", window=WINDOW), 4, tokens)
    assert 3.9 < plain.logical / four_bits.logical < 5.02


def test_no_layer_merged_is_the_plain_cache():
    plain = make_cache(MODEL, dkv.CompressionPolicy.none(), [50], kernels=XLA)
    merged = make_cache(MODEL, dkv.minicache(start=1.0), [50], kernels=XLA)
    assert plain.spec == merged.spec  # the same programs run
    assert jax.tree.structure(plain) == jax.tree.structure(merged)
    assert make_cache(MODEL, dkv.minicache(), [50]).spec != plain.spec


@pytest.mark.slow
@pytest.mark.long
def test_everything_retained_gives_the_same_text():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32, layers=4)
    prompts = np.random.default_rng(5).integers(0, 97, (2, 60))
    plain, retained = (
        dkv.generate(model, params, prompts, policy=policy, max_new_tokens=16, implementation="xla")
        for policy in (
            dkv.CompressionPolicy.none(window=16, flush=4),
            dkv.minicache(retention=1.0, window=16, flush=4),
        )
    )
    np.testing.assert_array_equal(plain.tokens, retained.tokens)
    assert (np.asarray(retained.cache.tier_len) == [56, 0]).all()


@pytest.mark.slow
@pytest.mark.long
def test_a_row_is_as_the_request_alone():
    """Prompts of several lengths in chunks of 64, decode events, and a second turn."""
    model, params = tiny_model(
        q_heads=4, kv_heads=2, head_dim=32, layers=4, windows=(None, 24, None, None)
    )
    policy, run = (
        dkv.minicache(window=16, flush=4, inner="K4V4"),
        {"max_new_tokens": 11, "prefill_chunk": 64},
    )
    batch = [np.random.default_rng(n).integers(0, 97, n) for n in (150, 70, 100)]

    def turns(prompts: list[np.ndarray]) -> tuple[np.ndarray, dkv.KVCache]:
        first = dkv.generate(model, params, prompts, policy=policy, max_len=256, **run)
        second = dkv.generate(
            model, params, [prompt[:30] for prompt in prompts], cache=first.cache, **run
        )
        return np.concatenate([first.tokens, second.tokens], axis=1), second.cache

    tokens, cache = turns(batch)
    check_pool(cache.spec.layout, cache.page_table, cache.tier_len, cache.ring)
    for row, prompt in enumerate(batch):
        alone, its_cache = turns([prompt])
        np.testing.assert_array_equal(tokens[row], alone[0])
        for layer in (0, 1, 2):
            mine, its = held_tokens(cache, layer, row, 1), held_tokens(its_cache, layer, 0, 1)
            assert {at: token[0] for at, token in mine.items()} == {
                at: token[0] for at, token in its.items()
            }


def test_a_policy_is_data():
    policy = dkv.minicache(0.25, 0.5, 0.1, inner="K4V4", transform=dkv.Hadamard())
    assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy
    assert dkv.load_policy("minicache") == dkv.minicache()
    assert make_cache(MODEL, dkv.minicache(0.0), [50]).spec.num_pairs == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": {"type": "LayerPairs", "t": 1.5}}, r"pairs.t=1.5 must be a number from 0 to 1"),
        ({"pairs": {"type": "LayerPairs", "retention": "few"}}, "pairs.retention='few'"),
        ({"pairs": {"type": "LayerPairs", "gamma": 0.1}}, "LayerPairs has fields .*, not .*gamma"),
        ({"transform": dkv.WithoutRope()}, "leave it out"),
        ({"tiers": ("K2cV2",)}, "shares numbers over tokens"),
        ({"tiers": ("K8v4V8v4",)}, "learns them"),
    ],
)
def test_choices_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        dkv.CompressionPolicy(**{"name": "x", "pairs": dkv.LayerPairs()} | changes)


@pytest.mark.parametrize(
    ("layers", "windows", "start", "message"),
    [
        (1, None, 0.5, "no two of 1 layers"),
        (4, None, 0.9, "no two of 4 layers"),
        (
            4,
            (None, None, 8, None),
            0.5,
            "merges layers 2 to 3 in pairs, and some of them have a sliding window",
        ),
    ],
)
def test_models_that_cannot_be_merged(layers, windows, start, message):
    with pytest.raises(ValueError, match=message):
        make_cache(Layers(spec_of(layers, windows)), dkv.minicache(start), [50])


def test_a_latent_is_not_merged():
    latent = dataclasses.replace(spec_of(), num_kv_heads=1, latent=8)
    with pytest.raises(ValueError, match="one latent for both"):
        make_cache(Layers(latent), dkv.minicache(), [50])


def test_only_plain_xla_runs_it():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32, layers=4)
    with pytest.raises(ValueError, match="plain XLA only"):
        dkv.generate(
            model, params, np.ones((1, 9), int), policy=dkv.minicache(), implementation="cpu"
        )
