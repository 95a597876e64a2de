"""A codec defined outside of the library: named in tiers, stored in pages, run in plain XLA."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import diffkv_jax as dkv
from diffkv_jax.cache.kernels import kernels_for
from diffkv_jax.pallas_kernels.codecs import KVFormat, formats, without_meta
from diffkv_jax.pallas_kernels.dispatch import XLA
from diffkv_jax.testing.tiny import prompt, tiny_model


@dataclass(frozen=True)
class Truncated(dkv.Codec):
    """The upper `kept` bits of each channel in bfloat16, zeros below: no scale, no metadata."""

    kept: int

    def rows(self, head_dim: int) -> int:
        return 2 * head_dim

    def encode(self, x: Array) -> tuple[Array, Array]:
        bits = x.astype(jnp.bfloat16).view(jnp.uint16) & (0xFFFF << (16 - self.kept) & 0xFFFF)
        planes = (bits & 255).astype(jnp.uint8), (bits >> 8).astype(jnp.uint8)
        return jnp.concatenate(planes, axis=-2), without_meta(x)

    def decode(self, payload: Array, meta: Array) -> Array:
        low, high = jnp.split(payload.astype(jnp.uint16), 2, axis=-2)
        return (low | high << 8).view(jnp.bfloat16).astype(jnp.float32)


@pytest.fixture
def letter(monkeypatch: pytest.MonkeyPatch) -> str:
    """ "x", which stands for the codec until the test ends."""
    monkeypatch.setattr(formats, "KINDS", dict(formats.KINDS))
    dkv.register_codec("x", Truncated)
    return "x"


def generate(tier: str, **options) -> dkv.GenerateOutput:
    policy = dkv.quantized(tier, window=16, flush=8)
    model, params = tiny_model(q_heads=4, kv_heads=2)
    return dkv.generate(model, params, [prompt(90, 1)], policy=policy, max_new_tokens=20, **options)


def test_a_name_stands_for_it(letter: str):
    fmt = KVFormat.parse(f"K16{letter}V8")
    assert fmt.key == Truncated(16) and fmt.value == KVFormat.parse("K8V8").value
    with pytest.raises(ValueError, match="no format|must be 'full'"):
        KVFormat.parse("K16yV8")


def test_all_bits_give_the_tokens_of_bfloat16(letter: str):
    got, wanted = (
        generate(tier, implementation="xla", cache_dtype="bfloat16")
        for tier in (f"K16{letter}V16{letter}", "full")
    )
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_allclose(got.cache.recent.k, wanted.cache.recent.k, rtol=1e-2, atol=1e-2)
    assert int(np.asarray(got.cache.stored.tier_len).sum()) > 0


@pytest.mark.slow
def test_fewer_bits_give_other_keys(letter: str):
    """What a codec that is never called would not do."""
    few, many = (generate(f"K{n}{letter}V8", implementation="xla") for n in (8, 16))
    difference = np.asarray(few.cache.recent.k, np.float32) - np.asarray(many.cache.recent.k)
    assert np.abs(difference).max() > 1e-3


def test_demotion_to_and_from_it(letter: str):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 32)), jnp.float32)
    own, eight = KVFormat.parse(f"K16{letter}V16{letter}"), KVFormat.parse("K8V8")
    for high, low in ((own, eight), (eight, own)):
        block = high.encode(x, x)
        again = low.decode(high.demote(low, block))
        for k, exact in zip(again, high.decode(block), strict=True):
            np.testing.assert_allclose(k, exact, atol=0.05)


def test_kernels_leave_it_to_plain_xla(letter: str):
    attention = tiny_model(q_heads=4, kv_heads=2)[0].attention
    policy = dkv.CompressionPolicy("own", tiers=(f"K8{letter}V8",))
    assert kernels_for(policy, attention) == XLA
    with pytest.raises(ValueError, match="plain XLA only"):
        generate(f"K8{letter}V8", implementation="cpu")


@pytest.mark.parametrize("taken", ["", "g", "n", "X", "xy", "1", 3])
def test_letters_that_are_taken_or_none(taken):
    with pytest.raises(ValueError, match="one of a to z"):
        dkv.register_codec(taken, Truncated)
    with pytest.raises(ValueError, match="takes="):
        dkv.register_codec("x", Truncated, takes="bits")


def test_it_is_part_of_what_is_compiled():
    """Equal codecs share programs, others do not."""
    assert Truncated(8) == Truncated(8) and hash(Truncated(8)) == hash(Truncated(8))
    assert Truncated(8) != Truncated(9) == replace(Truncated(8), kept=9)
