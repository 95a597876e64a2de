"""Heads by what the first tier gains them."""

import jax
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.fitting.candidates import Path, possible
from diffkv_jax.fitting.heads import neediest
from diffkv_jax.fitting.measure import Bench
from diffkv_jax.fitting.texts import STEPS, Texts
from diffkv_jax.testing.tiny import prompt, tiny_model

CONTEXT = 200
TEXTS = Texts(np.stack([prompt(CONTEXT + STEPS + 1, seed) for seed in range(2)]), CONTEXT)
HEADS = Path("heads", ("K8V8", "K2V2"))


def only(layer: int, head: int):
    """A model whose other KV heads have no part in what it says."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    params = jax.tree.map(lambda x: x, params)
    attention = params["layers"]["self_attn"]
    kernel = attention["o_proj"]["kernel"]  # [layers, 4 * 32, hidden]
    kept = np.zeros(kernel.shape[:2], np.float32)
    kept[layer, head * 64 : (head + 1) * 64] = 1
    attention["o_proj"]["kernel"] = kernel * kept[..., None]
    return model, params


@pytest.mark.slow
@pytest.mark.parametrize("needy", [(0, 1), (1, 0)])
def test_the_head_that_matters_comes_first(needy):
    model, params = only(*needy)
    (path,) = possible([HEADS], model.attention, CONTEXT)
    bench, batches = Bench(model, params, TEXTS, CONTEXT, replays=True), []
    order = neediest(bench, path, dkv.Exact(), None, lambda: batches.append(1))
    assert order[0] == needy and sorted(order) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(batches) == 2  # layers, then the heads of the one that gains
    path = path._replace(order=order)
    one, none = bench.along(path, (0.5, 1.0), dkv.Exact(), None)  # one head in four, and none
    assert one.mean_kl < 0.2 * none.mean_kl and one.share > none.share


def test_places_and_sets():
    (path,) = possible([HEADS], only(0, 0)[0].attention, CONTEXT)
    path = path._replace(order=((1, 0), (0, 0), (0, 1), (1, 1)))
    alone = path.policy(dkv.Exact(), (0.5,)).keep
    assert np.asarray(alone.alpha_high).tolist() == [[[4, 4]], [[0, 4]]]
    several = np.asarray(path.policy(dkv.Exact(), (0.0, 0.3, 1.0), rows=2).keep.alpha_high)
    assert several.shape == (2, 6, 2)
    assert (several[:, :2] == 0).all() and (several[:, 4:] == 4).all()
    assert several[:, 2].tolist() == several[:, 3].tolist() == [[0, 4], [0, 4]]
