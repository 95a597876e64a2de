"""Which tokens the presses of kvpress (torch) keep of a prompt: their own scores, and their own
choice among heads.
"""

import importlib
import sys
import types
from collections.abc import Callable

import numpy as np
import torch
import transformers

# imported by presses that no test uses
NOT_NEEDED = ("datasets", "cachetools", "requests", "fire", "pandas")


def presses() -> types.ModuleType:
    """kvpress, with empty modules in place of what it imports and does not use here."""
    for name in NOT_NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = _Empty(name)
    return importlib.import_module("kvpress")


class _Empty(types.ModuleType):
    """Any name is a decorator that changes nothing."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: lambda function: function


def scores(press, model, tokens: np.ndarray) -> list[np.ndarray]:
    """What a scoring press gives every token of a prompt int [N]: float32 [KV heads, N] a layer."""
    found: list[np.ndarray] = []
    original = press.score

    def score(*arguments, **named):
        result = original(*arguments, **named)
        found.append(result[0].detach().float().numpy().copy())
        return result

    press.score = score
    _prefill(press, model, tokens)
    return found


def kept_by_best(
    scores: list[np.ndarray], count: Callable[[int], int], window: int
) -> list[list[set[int]]]:
    """The `count(layer)` best tokens of each head of each layer; the last `window` are always among
    them.
    """
    chosen = []
    for layer, heads in enumerate(scores):
        protected = np.where(np.arange(heads.shape[1]) >= heads.shape[1] - window, np.inf, heads)
        order = np.argsort(-protected, axis=1, kind="stable")
        chosen.append([set(row[: count(layer)].tolist()) for row in order])
    return chosen


def kept_by_mask(press, model, tokens: np.ndarray) -> list[list[set[int]]]:
    """What a press that masks tokens (Ada-KV) leaves visible: sets of positions a head a layer."""
    _prefill(press, model, tokens)
    kept = []
    for layer in model.model.layers:
        heads = [set(range(len(tokens))) for _ in range(model.config.num_key_value_heads)]
        _, masked_heads, positions = (np.asarray(x) for x in layer.self_attn.masked_key_indices)
        for head, position in zip(masked_heads, positions, strict=True):
            heads[head].discard(int(position))
        kept.append(heads)
    return kept


def _prefill(press, model, tokens: np.ndarray) -> None:
    # kvpress 0.5.5 expects what transformers passed to every layer before 5.3
    positions = torch.arange(len(tokens))
    with torch.no_grad(), press(model):
        model(
            torch.as_tensor(tokens)[None],
            past_key_values=transformers.DynamicCache(),
            use_cache=True,
            cache_position=positions,
        )
