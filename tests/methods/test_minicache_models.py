"""MiniCache in whole models: memory, texts of rows and batches, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers_without_weights import MODEL, WINDOW, Layers, spec_of

import diffkv_jax as dkv
from diffkv_jax.cache.cache import with_counters
from diffkv_jax.make_cache import make_cache
from diffkv_jax.pallas_kernels.dispatch import XLA
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_model


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
    length = np.zeros(cache.stored.tier_len.shape, np.int32)
    length[..., 0] = tokens
    if spec.pairs is not None:
        retained = int(spec.pairs.retained(np.asarray(tokens)))
        length[spec.unmerged_layers :, ..., 0] = retained
        length[spec.unmerged_layers + 1 :: 2, ..., 1] = tokens - retained
    seen = jnp.asarray([tokens + policy.schedule.window])
    cache = with_counters(cache, seq_len=seen, recent_len=seen - tokens)
    return dkv.memory_report(with_part(cache, "stored.tier_len", jnp.asarray(length)))


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
    assert (np.asarray(retained.cache.stored.tier_len) == [56, 0]).all()


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
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)
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
        ({"transform": dkv.even_channels()}, "leave it out"),
        ({"tiers": ("K2cV2",)}, "tiers=.* share numbers over tokens"),
        ({"tiers": ("K8v4V8v4",)}, "or learn them"),
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
