"""FastGen: the policy that each head picks and the tokens it holds, in the prompt and in decode,
against NumPy.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.methods.fastgen import HeadClasses
from diffkv_jax.methods.h2o import AttentionSum
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.steps.rescore import rescore_oldest, unmark
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_model
from oracles.fastgen import POLICIES, Head, queries_and_keys

KV_HEADS, Q_HEADS = 5, 10
SPECIAL, MARKS = (1, 2), (5, 6, 7, 8, 9)
LENGTHS, NEW = (230, 140), 21
WINDOW, FLUSH, OBSERVE = 16, 8, 32
PROMPTS = [np.random.default_rng(seed).integers(0, 97, n) for seed, n in enumerate(LENGTHS)]


def model_of():
    return tiny_model(q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=32, layers=1, sharpness=12.0)


def heads_of(tokens: np.ndarray, **shares: float) -> list[Head]:
    """The heads of a request as the paper has them."""
    q, k = queries_and_keys(model_of()[1], tokens, Q_HEADS, KV_HEADS)
    classes = np.array(
        ["special" if t in SPECIAL else "punctuation" if t in MARKS else "" for t in tokens]
    )
    return [Head(q[head], k[head], classes, WINDOW, **shares) for head in range(KV_HEADS)]


def share_for(policy: int, masses: np.ndarray) -> float:
    """A share to recover with which this policy is the cheapest, far from both neighbours."""
    below = masses[policy - 1] if policy else 0.0
    assert masses[policy] - below > 1e-3
    return float((below + masses[policy]) / 2)


@lru_cache
def recover() -> tuple:
    """Head h of request 0 is to pick policy h; those of request 1 in the other order."""
    rows = []
    for row, prompt in enumerate(PROMPTS):
        picks = range(KV_HEADS) if row == 0 else reversed(range(KV_HEADS))
        rows.append(
            tuple(
                share_for(pick, head.masses(len(prompt), OBSERVE))
                for pick, head in zip(picks, heads_of(prompt), strict=True)
            )
        )
    return (tuple(rows),)


def policy(**changes) -> dkv.CompressionPolicy:
    options = dict(
        protect=SPECIAL, punctuation=MARKS, sinks=0, queries=OBSERVE, window=WINDOW, flush=FLUSH
    )
    return dkv.fastgen(recover(), **(options | changes))


@lru_cache
def run(implementation: str) -> dkv.GenerateOutput:
    """Both prompts in chunks of 64, then 20 steps: two events."""
    options = dict(
        max_new_tokens=NEW, prefill_chunk=64, implementation=implementation, cache_dtype="float32"
    )
    return dkv.generate(*model_of(), PROMPTS, policy=policy(), **options)


def expected(row: int, out: dkv.GenerateOutput, **shares: float) -> list[set[int]]:
    """What each head of a request holds in the end."""
    tokens = np.concatenate([PROMPTS[row], out.tokens[row]])
    held = []
    for pick, head in zip(
        np.asarray(out.cache.state.keep)[0, row], heads_of(tokens, **shares), strict=True
    ):
        head.masses(LENGTHS[row], OBSERVE)
        head.drop(pick, LENGTHS[row])
        for step in range(1, NEW):
            at = LENGTHS[row] + step - 1
            head.step(at)
            if step % FLUSH == 0:
                head.drop(pick, at + 1)
        held.append(head.held)
    return held


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
        ),
    ],
)
def test_heads_hold_what_their_policies_say(implementation):
    out = run(implementation)
    cache = out.cache
    picked = np.asarray(cache.state.keep)[0]
    np.testing.assert_array_equal(picked, [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)
    for row in range(2):
        found = [set(held_tokens(cache, 0, row, head)) for head in range(KV_HEADS)]
        assert found == expected(row, out)
        sizes = [len(held) for held in found]
        assert sizes == sorted(sizes, reverse=row == 1) and len(set(sizes)) == len(POLICIES)
        # the comparison can fail
        assert [a == b for a, b in zip(found, expected(row, out, local=0.25), strict=True)].count(
            False
        ) == 1
        assert [a == b for a, b in zip(found, expected(row, out, frequent=0.2), strict=True)].count(
            False
        ) == 2


@pytest.mark.slow
def test_events_leave_alone_what_finds_no_page():
    """The marks of a request that is not admitted are taken back."""
    cache = run("xla").cache
    before = [np.asarray(x) for x in (cache.stored.pages.significance, cache.recent.significance)]
    marked = rescore_oldest(cache, jnp.array([4, 0]))
    assert (np.asarray(marked.recent.significance)[0, 0] < 0).any() and not (
        np.asarray(marked.recent.significance)[0, 1] < 0
    ).any()
    after = unmark(marked)
    for old, new in zip(
        before, (after.stored.pages.significance, after.recent.significance), strict=True
    ):
        np.testing.assert_allclose(np.asarray(new), np.abs(old), atol=1e-30)


def looking_at(token: int | None):
    """A model whose queries all look at one token (at all alike if None): a channel that every
    token has, and one that it alone has.
    """
    model, params = tiny_model(q_heads=2, kv_heads=1, head_dim=32, layers=1)
    params = jax.tree.map(lambda x: x, params)
    attention, table = params["layers"]["self_attn"], np.array(params["embed_tokens"]["embedding"])
    table[:, :2] = (3, 0)
    if token is not None:
        table[token, 1] = 3
    params["embed_tokens"]["embedding"] = jnp.asarray(table)
    # channel 15 hardly turns with the position
    for name, source, columns in (("q_proj", 0, (15, 47)), ("k_proj", 1, (15,))):
        kernel = np.zeros_like(np.asarray(attention[name]["kernel"]))
        kernel[0, source, list(columns)] = 12
        attention[name]["kernel"] = jnp.asarray(kernel)
    return model, params


@pytest.mark.parametrize(("token", "policy_of_head"), [(None, "full"), (7, "punctuation")])
def test_what_a_head_looks_at_decides(token, policy_of_head):
    model, params = looking_at(token)
    prompt = np.random.default_rng(4).integers(10, 97, 200)
    prompt[[40, 90, 130]] = 7
    out = dkv.generate(
        model,
        params,
        prompt[None],
        policy=dkv.fastgen(punctuation=MARKS, window=16),
        max_new_tokens=1,
    )
    assert POLICIES[int(out.cache.state.keep[0, 0, 0])] == policy_of_head
    marks = {40, 90, 130, *np.flatnonzero(prompt == 5)}
    assert set(held_tokens(out.cache, 0, 0, 0)) == (
        set(range(200)) if token is None else {0, 1, 2, 3, *marks, *range(184, 200)}
    )


@pytest.mark.slow
def test_protected_ids_stay_with_any_method():
    """In decode too: sampled tokens of the ids stay as those of the prompt do."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policy = dkv.streaming_llm(100, sinks=2, protect=tuple(range(30)), window=16, flush=8)
    random = dict(sampling=dkv.Sample(temperature=9.0), key=jax.random.key(1))
    out = dkv.generate(model, params, PROMPTS[1][None], policy=policy, max_new_tokens=41, **random)
    tokens = np.concatenate([PROMPTS[1], out.tokens[0]])
    stay = {0, 1, *(at for at in range(164) if tokens[at] < 30)}
    others = [at for at in range(164) if at not in stay]
    assert set(held_tokens(out.cache, 1, 0, 1)) == stay | set(others[len(stay) - 84 :]) | set(
        range(164, 180)
    )
    assert max(stay) >= 140 and 2 < len(stay) < 80


@pytest.mark.slow
def test_snapkv_averages_over_the_others():
    """Protected tokens are kept, and count as 0 for their neighbours, as sinks do."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    some = tuple(range(4))
    out = dkv.generate(
        model,
        params,
        PROMPTS[1][None],
        policy=dkv.snapkv(70, protect=some, window=16),
        max_new_tokens=1,
    )
    held = set(held_tokens(out.cache, 0, 0, 0))
    assert {
        0,
        1,
        2,
        3,
        *np.flatnonzero(np.isin(PROMPTS[1], some)),
        *range(124, 140),
    } <= held and len(held) == 70


class Tokenizer:
    """What `token_classes` asks of a tokenizer."""

    all_special_ids = [0, 4]
    pieces = ["<s>", "Ġ,", ".", "▁?!", ".", "a.", "Ġ", "...", "é"]

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]


def test_classes_of_a_tokenizer():
    assert dkv.token_classes(Tokenizer()) == ((0, 4), (1, 2, 3, 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recover": 0.0}, "above 0 and up to 1"),
        ({"recover": 1.5}, "above 0 and up to 1"),
        ({"recover": (0.5, float("nan"))}, "above 0 and up to 1"),
        ({"queries": "all"}, "AttentionSum.queries= a number"),
        ({"tiers": ("K8V4", "K4V2")}, "must be one format"),
        ({"frequent": 1.5}, "from 0 to 1"),
        ({"protect": 3}, "must be a list of token ids"),
        ({"protect": (-1,)}, "integers of at least 0"),
        ({"protect": (5, 77)}, r"both name token ids \[5\]"),
    ],
)
def test_choices_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        dkv.fastgen(**{"recover": 0.9, "punctuation": MARKS} | changes)


def test_heads_choose_by_sums_of_attention():
    for score in (AttentionSum(queries=64), dkv.snapkv().score, None):
        with pytest.raises(ValueError, match="measures attention by"):
            dkv.CompressionPolicy("x", score=score, keep=HeadClasses())


def test_the_policy_is_data():
    chosen = policy()
    assert dkv.CompressionPolicy.from_json(chosen.to_json()) == chosen
    assert chosen.bind(1, 2, KV_HEADS).keep.recover.shape == (1, 2, KV_HEADS)
    plain = dkv.generate(*model_of(), PROMPTS[1][None, :40], max_new_tokens=1).cache
    assert plain.state.classes is None and plain.state.keep is None
