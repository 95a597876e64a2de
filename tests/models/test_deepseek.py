"""DeepSeek V2 and V3 against `transformers` (torch, eager attention, float32), through the real
checkpoint converter.
"""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.models import build_model, config_from_hf, load_pretrained
from helpers_model import randomize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the reference's range
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    moe_intermediate_size=20,
    n_routed_experts=8,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    routed_scaling_factor=1.7,
)
GROUPS = dict(n_group=4, topk_group=2)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=4.0,
    original_max_position_embeddings=1024,
    beta_fast=8.0,
    mscale=0.9,
    mscale_all_dim=0.5,
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2_lite": (
        "DeepseekV2",
        SIZES | dict(q_lora_rank=None, n_shared_experts=2, rope_parameters=YARN),
    ),
    "v2": (
        "DeepseekV2",
        SIZES
        | GROUPS
        | dict(q_lora_rank=16, topk_method="group_limited_greedy", attention_bias=True),
    ),
    "v3": ("DeepseekV3", SIZES | GROUPS | dict(q_lora_rank=16, first_k_dense_replace=2)),
    "v3_half_rotation": (
        "DeepseekV3",
        SIZES | GROUPS | dict(q_lora_rank=None, first_k_dense_replace=0, rope_interleave=False),
    ),
}


class Pair(NamedTuple):
    """Our model and parameters, and the reference's logits on the same tokens [B, T]."""

    model: Any
    params: Any
    tokens: np.ndarray
    logits: np.ndarray


@pytest.fixture(autouse=True)
def _exact_matrix_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Any:
    """A function from a case's name to its `Pair`, each built once."""
    return cache(lambda name: _build(name, tmp_path_factory.mktemp(name)))


def _build(name: str, folder: Path) -> Pair:
    family, fields = CASES[name]
    config = getattr(transformers, f"{family}Config")(**fields)
    config._attn_implementation = "eager"
    reference = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    randomize(reference, seed=5)
    reference.save_pretrained(folder)
    tokens = np.random.default_rng(3).integers(0, fields["vocab_size"], (2, 24)).astype(np.int32)
    with torch.no_grad():
        logits = reference(
            torch.as_tensor(tokens, dtype=torch.long), use_cache=False
        ).logits.numpy()
    model, params = load_pretrained(folder)[:2]
    return Pair(model, params, tokens, logits)


def _error(pair: Pair, model: Any = None, params: Any = None) -> float:
    """Largest absolute difference from the reference over its range."""
    positions = jnp.broadcast_to(jnp.arange(pair.tokens.shape[1]), pair.tokens.shape)
    apply = jax.jit((model or pair.model).apply)
    logits, _ = apply({"params": pair.params if params is None else params}, pair.tokens, positions)
    assert logits.shape == pair.logits.shape and logits.dtype == jnp.float32
    return float(np.abs(logits - pair.logits).max() / np.ptp(pair.logits))


@pytest.mark.daily(2)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_reference(pairs, name):
    pair = pairs(name)
    stacks = {"v2_lite": (1, 2), "v2": (1, 2), "v3": (2, 1), "v3_half_rotation": (0, 3)}[name]
    rows = [
        pair.params[key]["input_layernorm"]["weight"].shape[0] if key in pair.params else 0
        for key in ("dense_layers", "layers")
    ]
    assert tuple(rows) == stacks
    assert _error(pair) <= TOLERANCE


@pytest.mark.daily(4)
@pytest.mark.parametrize(
    ("name", "part", "changes"),
    [
        ("v2_lite", "latent", dict(rope_interleave=False)),
        ("v2_lite", "rope_scaling", dict(mscale_all_dim=0.0)),
        ("v2_lite", "rope_scaling", dict(attention_factor=1.0)),
        ("v2_lite", "rope_scaling", dict(beta_fast=32.0)),
        ("v2", "experts", dict(n_group=None, topk_group=None)),
        ("v3", "experts", dict(n_group=None, topk_group=None)),
        ("v3", "experts", dict(norm_topk_prob=False)),
        ("v3", "experts", dict(routed_scaling_factor=1.0)),
        ("v3", None, dict(query_pre_attn_scalar=12.0)),
    ],
)
def test_a_wrong_setting_is_rejected(pairs, name, part, changes):
    pair = pairs(name)
    config = pair.model.config
    changes = (
        changes if part is None else {part: dataclasses.replace(getattr(config, part), **changes)}
    )
    assert _error(pair, model=build_model(dataclasses.replace(config, **changes))) > TOLERANCE


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    "change", ["correction bias", "shared experts", "order of experts", "order of layers"]
)
def test_a_wrong_parameter_is_rejected(pairs, change):
    pair = pairs("v3_half_rotation")
    params = jax.tree.map(lambda x: x, pair.params)
    mlp = params["layers"]["mlp"]
    if change == "correction bias":
        mlp["gate"]["e_score_correction_bias"] *= 0
    elif change == "shared experts":
        mlp["shared_experts"]["down_proj"]["kernel"] *= 0
    elif change == "order of experts":
        mlp["experts"] = jax.tree.map(lambda x: x[:, ::-1], mlp["experts"])
    else:
        params["layers"]["mlp"] = jax.tree.map(lambda x: x[::-1], mlp)
    assert _error(pair, params=params) > TOLERANCE


def _raw(**changes: Any) -> dict[str, Any]:
    return {"model_type": "deepseek_v2", **SIZES, "q_lora_rank": None, **changes}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (_raw(topk_method="noaux_tc"), "topk_method='noaux_tc' is not supported"),
        (_raw(norm_topk_prob=True), "norm_topk_prob=True is not supported"),
        (_raw(moe_layer_freq=2), "moe_layer_freq=2 is not supported"),
        (_raw(num_key_value_heads=2), "num_key_value_heads=2 must equal num_attention_heads=4"),
        (_raw(kv_lora_rank=0), "kv_lora_rank=0 must be an integer of at least 1"),
        (_raw(qk_rope_head_dim=7), "qk_rope_head_dim=7 must be even"),
        (_raw(num_experts_per_tok=9), "num_experts_per_tok=9 must not exceed the 8 experts"),
        (_raw(num_experts_per_tok=None), "num_experts_per_tok=None must be an integer"),
        (
            _raw(model_type="deepseek_v3", n_group=3),
            "n_routed_experts=8 must be a multiple of n_group=3",
        ),
        (
            _raw(model_type="deepseek_v3", n_group=8, topk_group=4),
            "n_group=8 leaves one expert a group",
        ),
    ],
)
def test_bad_configs_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(raw)


def test_sizes_left_out_are_those_of_transformers():
    left_out = (
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "first_k_dense_replace",
    )
    for family, kind in (("DeepseekV2", "deepseek_v2"), ("DeepseekV3", "deepseek_v3")):
        ours = config_from_hf(
            {key: value for key, value in _raw(model_type=kind).items() if key not in left_out}
        )
        theirs = getattr(transformers, f"{family}Config")()
        for part in (ours.latent, ours.experts):
            for field in dataclasses.fields(part):
                if field.name in left_out:
                    assert getattr(part, field.name) == getattr(theirs, field.name), (
                        family,
                        field.name,
                    )
