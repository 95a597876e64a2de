"""Rotary scaling as GGUF keys state it: logits against `transformers`, and what is refused by
name.
"""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_gguf import CONFIG, TENSORS, file_with

from diffkv_jax.models import load_pretrained
from diffkv_jax.models.rope import RopeScaling
from helpers_model import (
    gguf_metadata,
    gguf_tensors,
    tiny_config,
    tiny_tensors,
    write_gguf,
    write_model_gguf,
)

pytest.importorskip("gguf")

TOKENS = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (1, 60)).astype(np.int32)
YARN = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 4.0,
    "rope__scaling__original_context_length": 16,
}
HF_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# GGUF keys behind "llama.", and what they are in config.json
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yarn": (YARN, HF_YARN),
    "yarn_betas": (
        YARN | {"rope__scaling__yarn_beta_fast": 4.0, "rope__scaling__yarn_beta_slow": 0.5},
        HF_YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
    ),
    "yarn_without_a_context": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0},
        HF_YARN | {"original_max_position_embeddings": 64},
    ),
    "yarn_attention": (
        YARN | {"rope__scaling__yarn_attn_factor": 1.5},
        HF_YARN | {"attention_factor": 1.5},
    ),
    "yarn_attn_factor": (
        YARN | {"rope__scaling__attn_factor": 1.25},
        HF_YARN | {"attention_factor": 1.25 * (1 + 0.1 * float(np.log(4.0)))},
    ),
    "yarn_log": (
        YARN | {"rope__scaling__yarn_log_multiplier": 0.5},
        HF_YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    ),
    "yarn_of_an_old_key": (
        {
            "rope__scaling__type": "yarn",
            "rope__scale_linear": 4.0,
            "rope__scaling__original_context_length": 16,
        },
        HF_YARN,
    ),
    "linear": (
        {"rope__scaling__type": "linear", "rope__scaling__factor": 3.0},
        {"rope_type": "linear", "factor": 3.0},
    ),
    "linear_by_default": ({"rope__scaling__factor": 3.0}, {"rope_type": "linear", "factor": 3.0}),
    "scale_linear": ({"rope__scale_linear": 3.0}, {"rope_type": "linear", "factor": 3.0}),
}


@cache
def reference(name: str | None) -> np.ndarray:
    """Logits [1, T, vocab] of `transformers` with the same weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = {
        key: value for key, value in CONFIG.items() if key not in ("model_type", "rope_theta")
    }
    rope = {"rope_type": "default"} if name is None else CASES[name][1]
    config = transformers.LlamaConfig(**fields, rope_parameters={"rope_theta": 10000.0, **rope})
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.load_state_dict({key: torch.as_tensor(value) for key, value in TENSORS.items()})
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS, dtype=torch.long), use_cache=False).logits.numpy()


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.ptp(wanted))


@pytest.mark.daily(4)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    model, params, _ = load_pretrained(file_with(tmp_path / "a.gguf", CASES[name][0]))
    with jax.default_matmul_precision("highest"):
        got = model.apply({"params": params}, jnp.asarray(TOKENS), jnp.arange(60)[None])[0]
    assert relative_error(np.asarray(got), reference(name)) < 1e-5
    assert relative_error(reference(None), reference(name)) > 1e-2  # a key that is not read shows
    if name not in ("yarn", "yarn_of_an_old_key") and name.startswith("yarn"):
        assert relative_error(reference("yarn"), reference(name)) > 1e-3


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # llama.cpp never scales then
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        # and takes 0 for 1
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 0.0}, None),
        ({"rope__scaling__factor": 2.0, "rope__scale_linear": 2.0}, RopeScaling("linear", 2.0)),
        (
            {
                "rope__scaling__finetuned": True,
                "rope__dimension_count": 16,
                "rope__scaling__yarn_beta_fast": 32.0,
            },
            None,
        ),
        # both: not set
        ({"rope__scaling__yarn_ext_factor": -1.0, "rope__scaling__attn_factor": 1.0}, None),
        (
            {
                "attention__causal": True,
                "attention__scale": 0.25,
                "attention__clamp_kqv": 0.0,
                "logit_scale": 1.0,
            },
            None,
        ),
        (
            {
                "attention__max_alibi_bias": 0.0,
                "expert_count": 0,
                "expert_used_count": 0,
                "vocab_size": 160,
            },
            None,
        ),
    ],
)
def test_values_that_change_nothing(
    tmp_path: Path, keys: dict[str, Any], expected: RopeScaling | None
) -> None:
    assert (
        load_pretrained(file_with(tmp_path / "a.gguf", keys)).model.config.rope_scaling == expected
    )


REFUSED = [
    {"rope__dimension_count": 8},
    {"rope__dimension_count": 32},
    {"rope__dimension_count_swa": 8},
    {"rope__dimension_sections": [4, 4, 0, 0]},
    {"rope__freq_base_swa": 500.0},
    {"rope__scaling__alpha": 2.0},
    {"rope__scaling__attn_factor": 1.2},
    {"rope__scaling__type": "none", "rope__scaling__attn_factor": 1.2},
    {
        "rope__scaling__type": "linear",
        "rope__scaling__factor": 2.0,
        "rope__scaling__yarn_attn_factor": 1.2,
    },
    {"rope__scaling__yarn_beta_fast": 8.0},
    {"rope__scaling__type": "linear", "rope__scaling__yarn_beta_slow": 2.0},
    {"rope__scaling__yarn_log_multiplier": 0.1},
    {"rope__scaling__yarn_ext_factor": 1.0},
    YARN | {"rope__scaling__yarn_ext_factor": 0.5},
    YARN | {"rope__scaling__yarn_ext_factor": 0.0},
    YARN | {"rope__scaling__yarn_attn_factor": 1.1, "rope__scaling__yarn_log_multiplier": 0.5},
    {"rope__scaling__factor": 2.0, "rope__scale_linear": 4.0},
    {"rope__scaling__factor": "4"},
    {"rope__something_new": 3},
    {"attention__something_new": True},
    {"attention__scale": 0.5},
    {"attention__causal": False},
    {"attention__clamp_kqv": 8.0},
    {"attention__max_alibi_bias": 8.0},
    {"attention__value_length": 8},
    {"attention__key_length_mla": 24},
    {"attention__temperature_scale": 0.1},
    {"attention__shared_kv_layers": 1},
    {"attn_logit_softcapping": 50.0},
    {"final_logit_softcapping": 30.0},
    {"logit_scale": 0.5},
    {"residual_scale": 0.22},
    {"embedding_scale": 12.0},
    {"vocab_size": 161},
]


@pytest.mark.parametrize(
    "keys",
    REFUSED,
    ids=lambda keys: "+".join(f"{k}={v}" for k, v in keys.items() if k not in YARN or v == 2.0),
)
def test_what_is_refused_is_named_with_its_value(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = file_with(tmp_path / "a.gguf", keys)
    with pytest.raises(ValueError) as error:
        load_pretrained(path)
    last, value = list(keys.items())[-1]
    assert f"llama.{last.replace('__', '.')}={value!r}" in str(error.value)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.sliding_window", 8), ("rope.dimension_count", 8), ("rope.new", 1.5)],
)
def test_siblings_in_other_architectures(tmp_path: Path, family: str, key: str, value: Any) -> None:
    config = tiny_config(family)
    path = write_model_gguf(
        tmp_path / "a.gguf", config, tiny_tensors(config), **{f"{family}.{key}": value}
    )
    with pytest.raises(ValueError, match=f"{family}.{key}={value}"):
        load_pretrained(path)


def test_gemma_has_no_factor_for_its_windows(tmp_path: Path) -> None:
    config = tiny_config("gemma3_text")
    keys = {
        f"gemma3__{key}": value
        for key, value in (YARN | {"rope__scaling__attn_factor": 1.5}).items()
    }
    with pytest.raises(ValueError, match="gemma3.rope.scaling.attn_factor=1.5 is not supported"):
        load_pretrained(write_model_gguf(tmp_path / "a.gguf", config, tiny_tensors(config), **keys))


def test_a_window_makes_it_mistral(tmp_path: Path) -> None:
    model = load_pretrained(file_with(tmp_path / "a.gguf", {"attention__sliding_window": 8})).model
    assert (model.config.model_type, model.config.sliding_windows) == ("mistral", (8,))
    assert load_pretrained(
        file_with(tmp_path / "b.gguf", {"attention__sliding_window": 0})
    ).model.config.sliding_windows == (None,)


@pytest.mark.parametrize(
    ("divisors", "keys", "message"),
    [
        (
            np.full(8, 2.0, np.float32),
            {},
            "the divisors in rope_freqs.weight must be those of Llama 3",
        ),
        (
            np.ones(4, np.float32),
            {},
            "must hold one divisor for each of the 8 pairs of a head, given shape .4,.",
        ),
        (
            np.ones(8, np.float32),
            {"llama.rope.scaling.factor": 2.0},
            "rope.scaling.type='linear' .* beside the tensor rope_freqs.weight",
        ),
        (
            np.ones(8, np.float32),
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
            "rope.scaling.type='yarn' .* beside the tensor rope_freqs.weight",
        ),
    ],
)
def test_divisors_that_do_not_fit(
    tmp_path: Path, divisors: np.ndarray, keys: dict[str, Any], message: str
) -> None:
    tensors = gguf_tensors(CONFIG, TENSORS) | {"rope_freqs.weight": divisors}
    path = write_gguf(tmp_path / "a.gguf", "llama", gguf_metadata(CONFIG) | keys, tensors)
    with pytest.raises(ValueError, match=message):
        load_pretrained(path)
