"""Many requests at once over one pool: the engine."""

from diffkv_jax.serving.engine import Engine as Engine
from diffkv_jax.serving.penalties import Penalties as Penalties
from diffkv_jax.serving.request import (
    Event as Event,
    Request as Request,
    TokenLogprob as TokenLogprob,
)
