"""The model families by `model_type`, and `build_model`."""

from typing import Any

import jax.numpy as jnp

from . import (
    deepseek as deepseek,
    gemma3 as gemma3,
    llama as llama,
    mistral as mistral,
    qwen2 as qwen2,
    qwen3 as qwen3,
)
from .config import ModelConfig
from .decoder import Decoder
from .family import FAMILIES, Family

TEXT_PART = {family.text_of: name for name, family in FAMILIES.items() if family.text_of}
"""Multimodal model types and the family of the text model inside them."""


def family_of(model_type: str) -> Family:
    """The family of a config.json's `model_type`.

    Raises:
        ValueError: it is not supported; the message lists those that are.
    """
    model_type = TEXT_PART.get(model_type, model_type)
    if model_type not in FAMILIES:
        supported = ", ".join([*FAMILIES, *TEXT_PART])
        raise ValueError(
            f"model_type={model_type!r} is not supported; supported are {supported}. Use a "
            "checkpoint of one of these."
        )
    return FAMILIES[model_type]


def build_model(config: ModelConfig, dtype: Any = "float32", param_dtype: Any = None) -> Decoder:
    """The model of `config`, without parameters.

    Args:
        config: sizes and family.
        dtype: the dtype of activations and matrix products: float32, bfloat16 or float16.
        param_dtype: the dtype that `init` and `param_shapes` give parameters; None = `dtype`.
            Parameters of any float dtype can be applied, they are cast to `dtype` where used.
    Raises:
        ValueError: a family or dtype that is not supported.
    """
    dtype = _float_name("dtype", dtype)
    param_dtype = dtype if param_dtype is None else _float_name("param_dtype", param_dtype)
    switches = family_of(config.model_type).switches(config)
    return Decoder(config=config, switches=switches, dtype=dtype, param_dtype=param_dtype)


def _float_name(argument: str, dtype: Any) -> str:
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{argument}={name} is not supported; give float32, bfloat16 or float16.")
    return name
