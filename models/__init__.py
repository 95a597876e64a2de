"""Causal language models in Flax Linen, used purely: parameters in, values out."""

from .config import ModelConfig as ModelConfig
from .decoder import param_shapes as param_shapes
from .hf_config import config_from_hf as config_from_hf
from .load import load_pretrained as load_pretrained
from .registry import build_model as build_model
