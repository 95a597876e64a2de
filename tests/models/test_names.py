"""The name rule, against names and layouts written out by hand."""

import jax
import numpy as np
import pytest

from diffkv_jax.models import build_model, config_from_hf, param_shapes
from diffkv_jax.models.names import canonical, flatten, hf_name, ignored_reason, slots, unflatten
from helpers_model import FAMILIES, tiny_config, tiny_tensors

CASES = [
    (("embed_tokens", "embedding"), None, "model.embed_tokens.weight"),
    (("layers", "self_attn", "q_proj", "kernel"), 3, "model.layers.3.self_attn.q_proj.weight"),
    (("layers", "self_attn", "q_proj", "bias"), 0, "model.layers.0.self_attn.q_proj.bias"),
    (("layers", "input_layernorm", "weight"), 11, "model.layers.11.input_layernorm.weight"),
    (("norm", "weight"), None, "model.norm.weight"),
    (("lm_head", "kernel"), None, "lm_head.weight"),
]


@pytest.mark.parametrize(("path", "layer", "name"), CASES)
def test_hf_name(path: tuple[str, ...], layer: int | None, name: str) -> None:
    assert hf_name(path, layer) == name


def test_hf_name_refuses_an_unknown_leaf() -> None:
    with pytest.raises(ValueError, match="parameter layers/scale must end in one of"):
        hf_name(("layers", "scale"), 0)


def test_slots_say_shape_layer_and_transpose() -> None:
    tree = {
        "layers": {"mlp": {"up_proj": {"kernel": jax.ShapeDtypeStruct((2, 5, 7), np.float32)}}},
        "lm_head": {"kernel": jax.ShapeDtypeStruct((5, 9), np.float32)},
        "embed_tokens": {"embedding": jax.ShapeDtypeStruct((9, 5), np.float32)},
    }
    found = slots(tree)
    assert sorted(found) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    up = found["model.layers.1.mlp.up_proj.weight"]
    assert (up.path, up.layer, up.transpose, up.shape) == (
        ("layers", "mlp", "up_proj", "kernel"),
        1,
        True,
        (7, 5),
    )
    assert found["lm_head.weight"].shape == (9, 5)
    assert (
        found["model.embed_tokens.weight"].shape == (9, 5)
        and not found["model.embed_tokens.weight"].transpose
    )


@pytest.mark.daily(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_exactly_hugging_faces_tensors(family: str) -> None:
    config = tiny_config(family)
    model = build_model(config_from_hf(config))
    assert {name: slot.shape for name, slot in slots(param_shapes(model)).items()} == {
        name: value.shape for name, value in tiny_tensors(config).items()
    }


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_canonical(name: str, plain: str) -> None:
    assert canonical(name) == plain


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("vision_tower.vision_model.embeddings.position_embedding.weight", True),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", True),
        ("multi_modal_projector.mm_input_projection_weight", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("model.rotary_emb.inv_freq", True),
        ("model.layers.0.self_attn.q_proj.weight", False),
        ("language_model.model.norm.weight", False),
        ("revisual.weight", False),
    ],
)
def test_ignored_reason(name: str, ignored: bool) -> None:
    assert (ignored_reason(name) is not None) == ignored


def test_flatten_and_unflatten_are_inverse() -> None:
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert unflatten(flatten(tree)) == tree
