"""The rotary-embedding part of config.json, in both of its layouts.

transformers 5: `rope_parameters` {rope_type, rope_theta, factor, ...}, for Gemma 3 one such block
per layer type. Before: `rope_theta` and `rope_scaling` (with `rope_type`, once called `type`), for
Gemma 3 `rope_local_base_freq`.
"""

from collections.abc import Mapping
from typing import Any

from .config import LAYER_TYPES
from .rope import ROPE_TYPES, RopeScaling, yarn_mscale

_COMMON = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "finetuned",
}
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor"}
_YARN = {
    "factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
}
_KEYS = {"default": set(), "linear": {"factor"}, "llama3": _LLAMA3, "yarn": _YARN}
"""What a block of each rope type may say. In _COMMON: the factor is checked, the context is of
llama3 and yarn and nothing to the others, `finetuned` tells how the model was trained."""


def read_rope(
    raw: Mapping[str, Any], theta: float, local_theta: float | None, context: int
) -> dict[str, Any]:
    """`ModelConfig`'s rope_theta, rope_scaling and rope_local_base_freq.

    Args:
        raw: the parsed config.json of the text model.
        theta, local_theta: the family's bases where config.json is silent; `local_theta` None = one
            base only.
        context: max_position_embeddings, the original context where a llama3 block names none.
    """
    full, local = _blocks(raw, two_bases=local_theta is not None)
    for block in (raw, full, local):
        if block.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError(
                f"partial_rotary_factor={block['partial_rotary_factor']} is not supported; the "
                "rotary embedding must cover the whole head (1.0)."
            )
    for block in (full, local):
        _check_block(block)
    if _rope_type(local) != "default":
        raise ValueError(
            f"rope_type={_rope_type(local)!r} of the sliding_attention layers is not supported; "
            "these must be 'default'."
        )
    return {
        "rope_theta": _first(full.get("rope_theta"), raw.get("rope_theta"), theta),
        "rope_scaling": _scaling(full, context),
        "rope_local_base_freq": None
        if local_theta is None
        else _first(local.get("rope_theta"), raw.get("rope_local_base_freq"), local_theta),
    }


def _first(*values: Any) -> Any:
    """The first that is given."""
    return next((value for value in values if value is not None), None)


def _blocks(raw: Mapping[str, Any], two_bases: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the full_attention (or all) layers, and of the sliding_attention layers."""
    given = raw.get("rope_parameters") or {}
    nested = [kind for kind in LAYER_TYPES if kind in given]
    if nested and not two_bases:
        raise ValueError(
            f"rope_parameters has blocks {nested}, but model_type={raw.get('model_type')!r} has "
            "one rotary embedding for all layers; give one flat block."
        )
    older = raw.get("rope_scaling") or {}
    for name, block in (("rope_parameters", given), ("rope_scaling", older)):
        if not isinstance(block, Mapping):
            raise ValueError(f"{name}={block!r} must be an object or null; correct config.json.")
    if nested and (beside := sorted(set(given) - set(LAYER_TYPES))):
        raise ValueError(
            f"rope_parameters has {beside} beside its blocks {nested}; put them into the blocks "
            "they belong to."
        )
    full = dict((given.get("full_attention") or {}) if nested else given)
    if differ := sorted(key for key in older if key in full and older[key] != full[key]):
        raise ValueError(
            f"rope_scaling and rope_parameters differ in {differ}: {older!r} and {full!r}; keep "
            "one of them."
        )
    full.update(older)
    context = raw.get("original_max_position_embeddings")
    if context is not None and _rope_type(full) in ("llama3", "yarn"):  # transformers: outside wins
        full["original_max_position_embeddings"] = context
    return full, dict(given.get("sliding_attention") or {})


def _rope_type(block: Mapping[str, Any]) -> str:
    kind = block.get("rope_type") or block.get("type") or "default"
    if block.get("type") not in (None, kind):
        raise ValueError(
            f"rope_type={kind!r} and type={block['type']!r} must agree; remove the older 'type' "
            "from config.json."
        )
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_type={kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}. Use a "
            "checkpoint with one of these."
        )
    return kind


def _check_block(block: Mapping[str, Any]) -> None:
    """Raise ValueError for keys that the block's rope type does not have."""
    kind = _rope_type(block)
    known = _COMMON | _KEYS[kind]
    unknown = {key: value for key, value in block.items() if key not in known and value is not None}
    if unknown:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unknown.items()))
        raise ValueError(
            f"rope_scaling or rope_parameters has {listed}, which rope_type={kind!r} does not "
            f"have; it has {', '.join(sorted(known))}. Correct config.json, or use a checkpoint "
            "without it."
        )


def _scaling(block: Mapping[str, Any], context: int) -> RopeScaling | None:
    kind = _rope_type(block)
    if kind == "default":
        return None
    needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ("factor",))
    missing = [name for name in needed if block.get(name) is None]
    if missing:
        raise ValueError(
            f"rope_type={kind!r} needs {', '.join(missing)} beside it; add what is missing to "
            "config.json."
        )
    if kind == "linear":
        return RopeScaling(kind, float(block["factor"]))
    original = int(block.get("original_max_position_embeddings") or context)
    if kind == "yarn":
        return _yarn(block, original)
    stretch = [float(block[name]) for name in needed]
    return RopeScaling(kind, *stretch, original_max_position_embeddings=original)


def _yarn(block: Mapping[str, Any], original: int) -> RopeScaling:
    """The factor on cosines and sines is given, or follows from `factor`, with DeepSeek's two
    weights as their quotient.
    """
    if block.get("truncate") is False:
        raise ValueError(
            "truncate=False is not supported for rope_type='yarn'; the blend goes between whole "
            "pairs."
        )
    factor, above = float(block["factor"]), float(block.get("mscale") or 0.0)
    below = float(block.get("mscale_all_dim") or 0.0)
    weighted = yarn_mscale(factor)
    if above and below:
        weighted = yarn_mscale(factor, above) / yarn_mscale(factor, below)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=float(block.get("beta_fast") or 32.0),
        beta_slow=float(block.get("beta_slow") or 1.0),
        attention_factor=float(block.get("attention_factor") or weighted),
        mscale_all_dim=below,
    )
