"""What policies, their parts and the small functions take for an argument, as what they keep it,
and what they say of the rest.
"""

import dataclasses
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax import AttentionSpec, CacheSpec, CompressionPolicy
from diffkv_jax.methods.recipes import kvzip_4bit
from diffkv_jax.units import parse_bytes

SPEC = AttentionSpec(4, 4, 2, 32, (None,) * 4, 0.2, None, 97, 512, "float32", (0.5,) * 16)
SAME = {
    "window": (lambda: dkv.snapkv(window=np.int64(32)), lambda: dkv.snapkv(window=32)),
    "window of JAX": (lambda: dkv.h2o(window=jnp.int32(32)), lambda: dkv.h2o(window=32)),
    "share": (lambda: dkv.h2o(np.float64(0.5)), lambda: dkv.h2o(0.5)),
    "float32 share": (lambda: dkv.h2o(jnp.float32(0.5)), lambda: dkv.h2o(0.5)),
    "number": (lambda: dkv.h2o(np.int16(100)), lambda: dkv.h2o(100)),
    "shares by head": (lambda: dkv.h2o(np.array([0.5, 1])), lambda: dkv.h2o([0.5, 1])),
    "alphas": (lambda: dkv.diffkv(np.array([[1], [2]])), lambda: dkv.diffkv([[1.0], (2,)])),
    "no sign": (lambda: dkv.diffkv(1.0, -0.0), lambda: dkv.diffkv(1.0, 0.0)),
    "flag": (
        lambda: dkv.pyramidinfer(nested=np.bool_(True)),
        lambda: dkv.pyramidinfer(nested=True),
    ),
    "ids": (lambda: dkv.h2o(protect=np.array([3, 5])), lambda: dkv.h2o(protect=[3, 5])),
    "layers": (
        lambda: dkv.key_norm(whole_layers=range(2)),
        lambda: dkv.key_norm(whole_layers=(0, 1)),
    ),
    "bits": (lambda: dkv.kivi(np.int64(4), group=np.int8(32)), lambda: dkv.kivi(4)),
    "outliers": (lambda: dkv.gear(outliers=np.float32(0.5)), lambda: dkv.gear(outliers=0.5)),
    "merge": (lambda: dkv.minicache(np.float64(0.5)), lambda: dkv.minicache(0.5)),
    "replay": (
        lambda: dkv.kvzip(replay=dkv.Replay([np.int32(1)])),
        lambda: dkv.kvzip(replay=dkv.Replay((1,))),
    ),
    "format": (lambda: dkv.quantized(np.str_("K8V4")), lambda: dkv.quantized("K8V4")),
}


@pytest.mark.parametrize("case", SAME)
def test_equal_for_equal_meaning(case):
    given, plain = (make() for make in SAME[case])
    assert given == plain and hash(given) == hash(plain) and repr(given) == repr(plain)
    assert CompressionPolicy.from_json(given.to_json()) == plain
    assert CacheSpec.build(SPEC, given, **BUILD) == CacheSpec.build(SPEC, plain, **BUILD)


BUILD = {"num_requests": 1, "max_len": 64, "num_pages": 4, "dtype": "float32"}
REFUSED = {
    "window": (lambda: dkv.snapkv(window=2.0), r"window=2\.0 must be an integer"),
    "window True": (lambda: CompressionPolicy.none(window=True), "window=True must be an integer"),
    "window None": (lambda: dkv.h2o(window=None), "window=None must be an integer"),
    "window of any size": (
        lambda: dkv.h2o(window=10**30),
        "window=1000.* must be an integer from 1 to 16777216",
    ),
    "forgets text": (lambda: dkv.diffkv(forgets="no"), "forgets='no' must be True or False"),
    "alpha None": (lambda: dkv.diffkv(None), "alpha_high=None must be finite"),
    "alpha text": (lambda: dkv.diffkv("1.0"), "alpha_high='1.0' must be finite"),
    "alphas of two shapes": (
        lambda: dkv.diffkv([[1.0], [1.0, 2.0]]),
        "alpha_high=.* nested lists of equal shapes",
    ),
    "no alphas": (lambda: dkv.diffkv(()), r"alpha_high=\(\) must be one value or nested"),
    "alphas that do not meet": (
        lambda: dkv.diffkv((1.0, 1.0), (0.0,) * 3),
        "alpha_high=.* and alpha_low=.* must broadcast together",
    ),
    "budgets that do not meet": (
        lambda: dkv.Budget(keep=(0.5,) * 3, keep_high=(0.1, 0.1)),
        "keep_high=.* and keep=.* must broadcast together",
    ),
    "keep of any size": (lambda: dkv.h2o(2**63), "keep=9223372036854775808 must be a share"),
    "keep True": (lambda: dkv.h2o(True), "keep=True must be a share"),
    "keep an object": (lambda: dkv.h2o(np.array([0.5, None])), "keep=.* must be a share"),
    "keep no float32": (lambda: dkv.h2o(1e-320), "keep=1e-320 must be a share"),
    "keep_high text": (
        lambda: dkv.Budget(keep_high="1MiB"),
        "keep_high='1MiB' must be",
    ),
    "flag 1": (lambda: dkv.pyramidinfer(nested=1), "nested=1 must be True or False"),
    "no transform": (
        lambda: dkv.diffkv(transform=True),
        "transform=True must be a Transform: one of .*Hadamard",
    ),
    "a class": (
        lambda: dkv.diffkv(transform=dkv.Hadamard),
        "transform=<class .* must be a Transform: .*call it",
    ),
    "flag text": (lambda: dkv.pyramidinfer(nested="no"), "nested='no' must be True or False"),
    "ids beyond int32": (
        lambda: dkv.h2o(protect=[2**31]),
        "protect=.* must be token ids.*it holds 2147483648",
    ),
    "name None": (lambda: CompressionPolicy(None), "name=None must be"),
    "tiers None": (
        lambda: CompressionPolicy("x", tiers=(None,)),
        r"tiers=\(None,\) must be a list of "
        r"format names",
    ),
    "tiers text": (lambda: dkv.h2o(tiers="K8V4"), "tiers='K8V4' must be a list of format names"),
    "tiers unknown": (lambda: dkv.h2o(tiers=("fp8",)), r"tiers=\('fp8',\): format 'fp8' must be"),
    "score a list": (
        lambda: CompressionPolicy("x", tiers=("full",), score=["window"]),
        r"score=\['window'\] must be a Score: one of .*WindowAttention",
    ),
    "epsilon None": (lambda: dkv.expected_attention(epsilon=None), "epsilon=None must be"),
    "pooled NaN": (
        lambda: dkv.ada_kv(dkv.h2o(), float("nan")),
        "floor=nan must be a number from 0 to 1",
    ),
    "no policy": (lambda: dkv.ada_kv("h2o"), "policy='h2o' must be a CompressionPolicy"),
    "no format": (lambda: dkv.quantized(None), "fmt=None must be the name of a format"),
    "format": (lambda: dkv.quantized("K4V0g4"), "fmt='K4V0g4': bits=0 must be one of"),
    "group of format": (lambda: dkv.quantized("K4V4g0"), "fmt='K4V4g0': channels=0"),
    "rank of format": (lambda: dkv.quantized("K4V4+r0"), "fmt='K4V4\\+r0': rank=0"),
    "bits": (lambda: dkv.kivi(None), "bits=None must be an integer"),
    "bits unknown": (lambda: dkv.kvquant(5), "bits=5, outliers=.*: bits=5"),
    "group": (lambda: dkv.kivi(group=33), "group=33 must be a multiple of 32"),
    "group of GEAR": (lambda: dkv.gear(group="64"), "group='64' must be"),
    "residual": (lambda: dkv.kivi(residual=None), "residual=None must be"),
    "outliers": (lambda: dkv.kvquant(outliers=None), "outliers=None must be"),
    "many outliers": (lambda: dkv.kvquant(outliers=1.0), "outliers=1.0: share=1.0"),
    "rank": (lambda: dkv.gear(rank=-1), "rank=-1 must be an integer of at least 0"),
    "channels": (lambda: dkv.coupled_quantization(0), "channels=0: channels=0"),
    "inner": (lambda: dkv.minicache(inner="half"), "inner='half': format"),
    "tier": (lambda: kvzip_4bit(tier=4), "tier=4 must be the name of a format"),
    "pairs": (lambda: dkv.LayerPairs(t=True), "pairs.t=True must be a number from 0 to 1"),
    "replay": (lambda: dkv.Replay(chunk=2**31), "replay.chunk=2147483648 must be"),
    "replay ids": (lambda: dkv.Replay(first=[True]), r"replay.first=\[True\] must be token ids"),
    "classes": (lambda: dkv.TokenClasses(None, ()), "special=None must be a list of token ids"),
    "tokenizer": (
        lambda: dkv.token_classes("gpt2"),
        "tokenizer='gpt2' must be a Hugging Face tokenizer",
    ),
    "tokenizer's name": (
        lambda: dkv.replay_words("gpt2"),
        "tokenizer='gpt2' must be a Hugging Face tokenizer",
    ),
    "no cache": (lambda: dkv.memory_report(None), "cache=None must be a KVCache"),
    "heads": (
        lambda: dataclasses.replace(SPEC, num_kv_heads=2.0),
        r"num_kv_heads=2\.0 must be an "
        r"integer",
    ),
    "layers of windows": (
        lambda: dataclasses.replace(SPEC, sliding_windows=(None, None, None, 0)),
        "sliding_windows=.*it holds 0",
    ),
    "rope": (lambda: dataclasses.replace(SPEC, rope=(1.0,)), "rope=.* each pair of head_dim=32"),
    "build without a policy": (
        lambda: CacheSpec.build(SPEC, "none", **BUILD),
        "policy='none' must be a CompressionPolicy",
    ),
    "build of a model": (
        lambda: CacheSpec.build(None, CompressionPolicy.none(), **BUILD),
        "attention=None must be an AttentionSpec",
    ),
    "build of floats": (
        lambda: CacheSpec.build(SPEC, CompressionPolicy.none(), **BUILD | {"max_len": 64.0}),
        "max_len=64.0 must be",
    ),
    "no dtype": (
        lambda: CacheSpec.build(SPEC, CompressionPolicy.none(), **BUILD | {"dtype": None}),
        "dtype=None must be",
    ),
    "amount None": (lambda: parse_bytes(None), "memory_budget=None must be a number of bytes"),
    "amount True": (lambda: parse_bytes(True), "memory_budget=True must be a number of bytes"),
    "amount NaN": (
        lambda: parse_bytes(float("nan")),
        "memory_budget=nan must be a number of bytes",
    ),
    "amount of many digits": (
        lambda: parse_bytes("9" * 400 + "GiB"),
        "memory_budget=.* must be a number of bytes",
    ),
    "no path": (lambda: dkv.Calibration.load(None), "path=None must be the path"),
    "null in the path": (lambda: dkv.Calibration.load("a\0"), "path=.* must be the path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_given(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


STRETCHES = {
    "window": lambda n: dkv.h2o(window=n),
    "flush": lambda n: dkv.h2o(flush=n),
    "sinks": lambda n: dkv.h2o(sinks=n),
    "kernel_size": lambda n: dkv.snapkv(kernel_size=n),
    "future": lambda n: dkv.expected_attention(future=n),
}


@pytest.mark.parametrize("field", STRETCHES)
def test_stretches_longer_than_the_context(field):
    CacheSpec.build(SPEC, STRETCHES[field](1024), **BUILD)
    with pytest.raises(
        ValueError,
        match=f"{field}=1025 of policy .* context of 512 tokens: lower it to at most 1024",
    ):
        CacheSpec.build(SPEC, STRETCHES[field](1025), **BUILD)


def test_what_does_not_broadcast_is_named():
    for policy, field in (
        (dkv.diffkv(1.0, (0.1, 0.2, 0.3)), "alpha_low"),
        (dkv.h2o((0.1, 0.2, 0.3)), "keep"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"policy .*: {field}=\(0.1, 0.2, 0.3\) must broadcast to .* = \(2, 1, 2\)",
        ):
            policy.bind(2, 1, 2)


def test_amounts():
    assert (
        parse_bytes(10**30) == 10**30
        and parse_bytes(np.int64(2**40)) == 2**40
        and parse_bytes(1.5e9) == 1_500_000_000
    )
    assert (
        parse_bytes(" 1.5 kib ") == 1536
        and parse_bytes("1.KB") == 1000
        and parse_bytes(".5KB") == 500
    )
    with pytest.raises(TypeError, match="keep=Fraction"):
        parse_bytes(Fraction(5), "keep")
