"""KVzip: its scores, and the tokens that it keeps, against kvpress; and what cannot work."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from kvzip_of_kvpress import HEADS, REPLAY, Tokenizer, kvzip, of_kvpress, scores
from tiny_llama import LENGTH, PROMPT, kept

import diffkv_jax as dkv
from diffkv_jax.methods import recipes
from diffkv_jax.methods.fastgen import HeadClasses
from diffkv_jax.methods.key_norm import KeyNorm
from diffkv_jax.methods.kvzip import ContextReconstruction
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native import build
from diffkv_jax.testing.tiny import tiny_model


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
def test_what_is_scored_are_the_keys_that_attention_reads():
    """The recipe with four bits, on native kernels where they can be built: nearly the choice that
    exact keys make, in as many tokens.
    """
    policy = dkv.kvzip(0.6, tiers=recipes.kvzip_4bit().tiers, replay=REPLAY, window=1)
    found = kept(policy, kernels=Kernels("xla" if build.why_unavailable() else "cpu"))
    exact = kept(dataclasses.replace(policy, tiers=("full",)))
    both = sum(len(found[layer][head] & exact[layer][head]) for layer, head in HEADS)
    total = sum(len(found[layer][head]) for layer, head in HEADS)
    assert total == round(0.6 * LENGTH) * len(HEADS) and found != exact and both > 0.95 * total


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
        ({"keep": HeadClasses()}, "decides after its passes"),
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
