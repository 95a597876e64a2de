"""`inspect_model`: a model's keys and values, and what candidate caches cost on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from diffkv_jax.calibration.probe import activations
from diffkv_jax.calibration.usual import with_usual
from diffkv_jax.fitting.candidates import fits
from diffkv_jax.fitting.fit import texts_of
from diffkv_jax.fitting.measure import Bench, learned
from diffkv_jax.inputs import as_params, check_model, check_outside_jit
from diffkv_jax.methods.diffkv import diffkv
from diffkv_jax.methods.quantized import quantized
from diffkv_jax.model import CausalLM
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.policy.transform import EXACT, Hadamard

CONTEXT = 512  # tokens that candidates are measured behind
LEAST_SPREAD = 1e-6
FIRST_TOKENS = 16  # left out: their keys are like no others


@dataclass(frozen=True)
class ModelReport:
    """What `inspect_model` found; arrays float64 [L] over the layers without a sliding window.

    Attributes:
        layers: their numbers in the model, int [L].
        key_norm, value_norm: mean norm of a token's key (or value) in a head.
        key_offset, value_offset: the largest offset of a channel, its mean over tokens in units of
            its standard deviation: ten and more, and four bits that share a scale over a token's
            channels hold little else.
        mean_kl: of candidate caches on text that goes on, nats, by their names.
        context: tokens that they were measured behind.
    """

    layers: np.ndarray
    key_norm: np.ndarray
    value_norm: np.ndarray
    key_offset: np.ndarray
    value_offset: np.ndarray
    mean_kl: Mapping[str, float]
    context: int

    def __str__(self) -> str:
        layers = Table("layer", title="keys and values: mean norm, largest offset of a channel")
        for name in ("key norm", "value norm", "key offset", "value offset"):
            layers.add_column(name, justify="right")
        columns = (self.key_norm, self.value_norm, self.key_offset, self.value_offset)
        for number, *found in zip(self.layers, *columns, strict=True):
            layers.add_row(str(number), *(f"{x:.1f}" for x in found))
        costs = Table("cache", "mean KL", title=f"measured behind {self.context} tokens")
        for name, kl in self.mean_kl.items():
            costs.add_row(name, f"{kl:.4f}")
        console = Console(width=80)
        with console.capture() as capture:
            console.print(layers, costs)
        return capture.get()


@in_32_bits
def inspect_model(model: CausalLM, params: Mapping[str, Any], tokens: Any = None) -> ModelReport:
    """Measure keys, values and some caches of a model, on its built-in text or `tokens`.

    Args:
        model: as for `generate`.
        params: its parameters.
        tokens: int [S, N] as `fit_policy` takes them; None: the package's own text.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    check_model("inspect_model", model)
    params = as_params("inspect_model", params)
    check_outside_jit("inspect_model", tokens)
    attention = model.attention
    texts, others = texts_of(model, tokens, CONTEXT)
    paged = [i for i, window in enumerate(attention.sliding_windows) if window is None]
    seen = activations(model, params, jnp.asarray(texts.rows[0]), gradients=False)
    k, v = (np.asarray(x, np.float64)[paged, FIRST_TOKENS:] for x in (seen.k, seen.v))
    if attention.latent is not None:
        v = k[..., : attention.latent]
    candidates = {
        "K8V4, Exact()": quantized("K8V4", transform=EXACT),
        "K4V4, Exact()": quantized("K4V4", transform=EXACT),
        "K4V4, Hadamard()": quantized("K4V4", transform=Hadamard()),
        "K4V4": quantized("K4V4"),
        "diffkv(1, 0), Exact()": diffkv(1.0, 0.0, transform=EXACT),
        "diffkv(1, 0)": diffkv(1.0, 0.0),
    }
    bench, mean_kl = Bench(model, params, others, CONTEXT, replays=True), {}
    for name, policy in candidates.items():
        policy = with_usual(policy, attention)
        if paged and fits(policy, attention):
            mean_kl[name] = bench.of(policy, learned(model, params, texts, policy)).going_on
    return ModelReport(
        layers=np.asarray(paged, int),
        key_norm=_norm(k),
        value_norm=_norm(v),
        key_offset=_offset(k),
        value_offset=_offset(v),
        mean_kl=mean_kl,
        context=texts.context,
    )


def _norm(x: np.ndarray) -> np.ndarray:
    """Mean norm over tokens and heads of `x [L, N, K, d]`."""
    return np.linalg.norm(x, axis=-1).mean(axis=(1, 2))


def _offset(x: np.ndarray) -> np.ndarray:
    """Largest mean of a channel over tokens, in its standard deviations."""
    spread = np.maximum(x.std(axis=1), LEAST_SPREAD)
    return (np.abs(x.mean(axis=1)) / spread).max(axis=(1, 2))
