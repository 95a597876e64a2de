"""DeepSeek V2 and V3: latent attention, mixture of experts (arXiv:2405.04434, arXiv:2412.19437)."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .deepseek_config import ExpertSizes, LatentSizes
from .family import REQUIRED, Family, all_full, sizes
from .switches import Switches

_V2_LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "q_lora_rank": 1536,
}
_V2_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
}
_V3_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
}
_GROUPS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "group_limited_greedy": {"n_group": None, "topk_group": None},
}


def _v2(raw: Mapping[str, Any]) -> dict[str, Any]:
    method = raw.get("topk_method", "greedy")
    if method not in _GROUPS:
        raise ValueError(
            f"topk_method={method!r} is not supported for model_type='deepseek_v2'; supported are "
            f"{', '.join(_GROUPS)}."
        )
    _check_choice(raw, "scoring_func", "softmax")
    _check_choice(raw, "rope_interleave", True)
    experts = _read(raw, _V2_EXPERTS | _GROUPS[method])
    groups = {name: experts.pop(name, None) for name in ("n_group", "topk_group")}
    return _parts(
        raw, True, ExpertSizes(**experts, **groups, scoring="softmax", norm_topk_prob=False)
    )


def _v3(raw: Mapping[str, Any]) -> dict[str, Any]:
    _check_choice(raw, "topk_method", "noaux_tc")
    _check_choice(raw, "scoring_func", "sigmoid")
    return _parts(
        raw,
        bool(raw.get("rope_interleave", True)),
        ExpertSizes(**_read(raw, _V3_EXPERTS), scoring="sigmoid"),
    )


def _check_choice(raw: Mapping[str, Any], key: str, only: Any) -> None:
    """A key that config.json may leave out and that can mean one thing in this family."""
    if raw.get(key, only) not in (only, None):
        raise ValueError(
            f"{key}={raw[key]!r} is not supported for model_type={raw['model_type']!r}; it must be "
            f"{only!r}."
        )


def _parts(raw: Mapping[str, Any], interleave: bool, experts: ExpertSizes) -> dict[str, Any]:
    """`Family.parts` of both: the whole width of a query scales scores, its rotary part turns."""
    if raw.get("moe_layer_freq", 1) != 1:
        raise ValueError(
            f"moe_layer_freq={raw['moe_layer_freq']!r} is not supported; it must be 1, experts in "
            "every later layer."
        )
    latent = LatentSizes(**_read(raw, _V2_LATENT), rope_interleave=interleave)
    width = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    return {
        "latent": latent,
        "experts": experts,
        "head_dim": latent.qk_rope_head_dim,
        "query_pre_attn_scalar": float(width),
    }


def _read(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Absent keys take their default; null stays None, which means something for q_lora_rank."""
    return {name: raw.get(name, default) for name, default in defaults.items()}


def _switches(config: ModelConfig) -> Switches:
    return Switches(
        qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias
    )


_READS = (
    *_V2_LATENT,
    *_V3_EXPERTS,
    "topk_method",
    "scoring_func",
    "moe_layer_freq",
    "rope_interleave",
    "norm_topk_prob",
)
_FIELDS = sizes(head_dim=64, attention_bias=False, max_position_embeddings=REQUIRED)
DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    hf_fields={**_FIELDS, "mlp_bias": False},
    rope_theta=10000.0,
    layers=all_full,
    switches=_switches,
    reads=_READS,
    must_be_off=("norm_topk_prob",),  # implementations disagree on scaling the weights then
    parts=_v2,
)
DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    hf_fields=_FIELDS,
    rope_theta=10000.0,
    layers=all_full,
    switches=_switches,
    reads=_READS,
    parts=_v3,
)
