"""Published eviction methods: the tokens that they keep against kvpress on torch, and what holds
for all of them.
"""

import ast
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import LENGTH, PROMPT, half, kept, models

import diffkv_jax as dkv
from diffkv_jax.methods.diffkv import MeanAttention
from diffkv_jax.methods.h2o import AttentionSum
from diffkv_jax.methods.key_norm import KeyNorm
from diffkv_jax.methods.pyramidinfer import PivotalContext
from diffkv_jax.methods.snapkv import WindowAttention
from diffkv_jax.methods.tova import LastQuery
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native import build
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_model

OBSERVED = dkv.CompressionPolicy(
    "observed",
    score=MeanAttention(queries="all", reduce="mean"),
    keep=dkv.Budget(keep=0.5),
    schedule=dkv.Schedule(window=1),
)
SCORED = {
    "key norm": ("KnormPress", {}, dkv.key_norm(0.5, sinks=0, whole_layers=(), window=1), 2),
    "KeyDiff": ("KeyDiffPress", {}, dkv.key_difference(0.5, sinks=0, window=1), 2),
    "StreamingLLM": ("StreamingLLMPress", {}, dkv.streaming_llm(0.5, sinks=4, window=1), 2),
    "SnapKV": ("SnapKVPress", {}, dkv.snapkv(0.5, sinks=0), 2),
    # over all heads there, a KV head here: one KV head
    "TOVA": ("TOVAPress", {}, dkv.tova(0.5, sinks=0), 1),
    "observed attention": ("ObservedAttentionPress", {}, OBSERVED, 2),
}


@pytest.mark.daily(3)
@pytest.mark.parametrize("name", SCORED)
def test_the_tokens_that_kvpress_keeps(name):
    choice = pytest.importorskip("oracles.kvpress_choice")
    press, options, policy, kv_heads = SCORED[name]
    theirs, _, _ = models(kv_heads, "eager" if name == "observed attention" else "sdpa")
    scores = choice.scores(
        getattr(choice.presses(), press)(compression_ratio=0.5, **options), theirs, PROMPT
    )
    expected = choice.kept_by_best(scores, half, policy.schedule.window)
    found = kept(policy, kv_heads)
    assert found == expected
    reversed_scores = choice.kept_by_best([-s for s in scores], half, policy.schedule.window)
    assert found != reversed_scores  # the comparison can fail


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [dkv.snapkv(0.5), dkv.h2o(0.3), dkv.key_norm(90), dkv.tova(0.5)], ids=lambda p: p.name
)
def test_chunks_of_a_prompt_choose_as_one(policy):
    assert kept(policy, chunk=128) == kept(policy)


SELDOM = (
    "key_norm",
    "streaming_llm",
    "pyramidkv",
    "pyramidinfer",
    "expected_attention",
    "random_eviction",
    "ada_kv",
)


@lru_cache
def after_80_tokens(name: str, cache_dtype: str):
    """Tokens, and what every head holds."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    make = {
        "none": lambda _, **options: dkv.CompressionPolicy.none(**options),
        "ada_kv": lambda *a, **o: dkv.ada_kv(dkv.snapkv(*a, **o)),
    }
    policy = (make.get(name) or getattr(dkv, name))(1.0, window=16, flush=4)
    out = dkv.generate(
        model, params, PROMPT[None, :80], policy=policy, max_new_tokens=6, cache_dtype=cache_dtype
    )
    heads = [held_tokens(out.cache, layer, 0, head) for layer in range(2) for head in range(2)]
    return out.tokens.tolist(), [
        {at: (k.tobytes(), v.tobytes()) for at, (_, k, v, _) in head.items()} for head in heads
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "h2o",
        "tova",
        "snapkv",
        "key_difference",
        *(pytest.param(x, marks=pytest.mark.slow) for x in SELDOM),
    ],
)
def test_keeping_everything_changes_nothing(name):
    dtype = "bfloat16" if name in ("snapkv", "ada_kv") else "float32"
    assert after_80_tokens(name, dtype) == after_80_tokens("none", dtype)


def scores_of(policy: dkv.CompressionPolicy, new: int) -> np.ndarray:
    """Sums of the scores of all that each head holds, one layer after the other."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    cache = dkv.generate(model, params, PROMPT[None, :100], policy=policy, max_new_tokens=new).cache
    return np.array(
        [
            sum(score for *_, score in held_tokens(cache, layer, 0, head).values())
            for layer in range(2)
            for head in range(2)
        ]
    )


@pytest.mark.slow
def test_scores_in_decode_are_the_attention_of_the_queries():
    """While nothing is dropped, the attention of each query sums to 1: over all queries (H2O), or
    those since the last event (TOVA).
    """
    options = {"sinks": 0, "window": 16, "flush": 8}
    np.testing.assert_allclose(scores_of(dkv.h2o(1.0, **options), 21), 120, rtol=1e-4)
    # 16 steps: the last decided
    np.testing.assert_allclose(scores_of(dkv.tova(1.0, **options), 17), 1, rtol=1e-4)
    np.testing.assert_allclose(scores_of(dkv.tova(1.0, **options), 20), 4, rtol=1e-4)


BATCH = [PROMPT[:250], PROMPT[40:110], PROMPT[100:250]]
ROWS = {
    "key_norm": dkv.key_norm(0.5, whole_layers=(), window=16, flush=8),
    "ada_kv": dkv.ada_kv(dkv.snapkv(0.5, window=16, flush=8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["key_norm", pytest.param("ada_kv", marks=pytest.mark.slow)])
def test_a_row_chooses_as_the_request_alone(name):
    """Prompts of several lengths in chunks of 64, decode events, and a second turn."""
    model, params = tiny_model(
        q_heads=4, kv_heads=2, head_dim=32, windows=(None, 24, None), layers=3
    )
    run = {"max_new_tokens": 11, "prefill_chunk": 64}

    def turns(prompts: list[np.ndarray]):
        first = dkv.generate(model, params, prompts, policy=ROWS[name], max_len=320, **run)
        tokens = first.tokens
        second = dkv.generate(
            model, params, [prompt[:30] for prompt in prompts], cache=first.cache, **run
        )
        return np.concatenate([tokens, second.tokens], axis=1), second.cache

    tokens, cache = turns(BATCH)
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)
    for row, prompt in enumerate(BATCH):
        alone, its_cache = turns([prompt])
        np.testing.assert_array_equal(tokens[row], alone[0])
        for layer in range(2):
            for head in range(2):
                assert set(held_tokens(cache, layer, row, head)) == set(
                    held_tokens(its_cache, layer, 0, head)
                )


@pytest.mark.slow
def test_two_tiers_with_budgets_on_native_kernels_too():
    policy = dkv.CompressionPolicy(
        "l2 in tiers",
        tiers=("K8V4", "K4V2"),
        score=KeyNorm(),
        keep=dkv.Budget(keep=0.5, keep_high=0.3),
        protect=dkv.Protect(sinks=4),
        schedule=dkv.Schedule(window=16),
    )
    found = kept(policy)
    assert all(len(head) == LENGTH // 2 for layer in found for head in layer)
    if build.why_unavailable() is None:
        assert kept(policy, kernels=Kernels("cpu")) == found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dkv.Budget(keep=0.0), "keep=0.0 must be a share above 0 and up to 1"),
        (lambda: dkv.Budget(keep=1.5), "keep=1.5 must be a share"),
        (lambda: dkv.Budget(keep=0), "keep=0 must be"),
        (lambda: dkv.Budget(keep="50%"), "keep='50%' must be a number of bytes"),
        (lambda: dkv.Budget(keep=0.5, keep_high=0.9), "not exceed"),
        (lambda: dkv.Budget(whole_layers=(0.0,)), "must be numbers of layers"),
        (lambda: dkv.Budget(whole_layers=(True, False)), "must be numbers of layers"),
        (lambda: dkv.Budget(whole_layers=0), "must be a list of layers"),
        (lambda: dkv.Budget(share_heads=2.0), "from 0 to 1"),
        (lambda: dkv.Budget(layers="cube"), "layers='cube' must be one of 'uniform', 'pyramid' or"),
        (lambda: WindowAttention(queries="all"), "queries='all' must be a number"),
        (lambda: WindowAttention(), "queries=0 must be a number such as 64"),
        (lambda: LastQuery(queries=64), "queries=64 must be 1"),
        (lambda: KeyNorm(queries=64), "looks at no queries"),
        (lambda: AttentionSum(queries=64, reduce="sum"), "'max' or 'mean'"),
        (lambda: dkv.Protect(sinks=-1), "sinks=-1 must be an integer"),
    ],
)
def test_stages_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TWO = ("K8V4", "K4V2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keep": dkv.Budget(keep="1MiB"), "protect": dkv.Protect(token_ids=(3,))},
            "beyond any number of tokens",
        ),
        ({"score": "loudness"}, "score='loudness' must be a Score: one of"),
        ({"keep": dkv.KeepAll()}, "needs keep=Budget"),
        ({"keep": dkv.Thresholds(alpha_low=0.1, alpha_high=0.1)}, "needs keep=Budget"),
        ({"score": None}, "needs a score to rank tokens by"),
        ({"tiers": TWO}, "keep_high=None must be given with two tiers"),
        ({"keep": dkv.Budget(keep_high=0.1)}, "only then"),
        (
            {
                "keep": dkv.Budget(keep=20),
                "protect": dkv.Protect(sinks=5),
                "schedule": dkv.Schedule(window=16),
            },
            "room for window=16 and sinks=5",
        ),
        (
            {"score": PivotalContext(queries=8), "keep": dkv.Budget(share_heads=0.0)},
            "keeps as much in every head",
        ),
        (
            {"score": PivotalContext(queries=8), "keep": dkv.Budget(whole_layers=(0,))},
            "cannot keep what layers before them drop",
        ),
    ],
)
def test_choices_that_cannot_work(changes, message):
    stages = {"name": "x", "score": KeyNorm(), "keep": dkv.Budget(keep=0.5)}
    with pytest.raises(ValueError, match=message):
        dkv.CompressionPolicy(**stages | changes)


def test_methods_are_data():
    for name in ("snapkv", "key_norm", "pyramidkv"):
        policy = dkv.load_policy(name)
        assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy
    with pytest.raises(ValueError, match="no layer 7 of 2"):
        dkv.key_norm(0.5, whole_layers=(7,)).bind(2, 1, 1)
    with pytest.raises(ValueError, match="adaptive already"):
        dkv.ada_kv(dkv.diffkv())


def test_the_compositions_of_the_docs_can_be_built():
    text = (Path(__file__).parent.parent.parent / "docs" / "methods" / "README.md").read_text(
        encoding="utf-8"
    )
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names, built = {"dkv": dkv}, []
    for node in ast.parse(code).body:
        if isinstance(node, ast.Expr):
            built.append(eval(ast.unparse(node), names))
        else:
            exec(ast.unparse(node), names)
    assert len(built) == 7 and all(isinstance(policy, dkv.CompressionPolicy) for policy in built)
