"""Published methods."""

from diffkv_jax.methods.all import *  # noqa: F403
from diffkv_jax.methods.all import METHODS as METHODS
