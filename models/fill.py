"""From a stream of named tensors to the stacked parameter tree, complete in both directions."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from .names import Slot, flatten, slots, unflatten
from .source import WeightSource

_EMBEDDING = ("embed_tokens", "embedding")
_HEAD = "lm_head.weight"
_logger = logging.getLogger("diffkv_jax")


def fill_params(
    source: WeightSource, param_shapes: Mapping[str, Any], *, origin: str, progress: bool = False
) -> dict[str, Any]:
    """The parameters of a model, filled from `source`.

    Each stacked parameter is allocated once and filled layer by layer while the tensors stream by,
    so the peak is the result plus what the source holds open (one shard) plus one tensor.

    Args:
        source: the opened weights.
        param_shapes: nested dict of `jax.ShapeDtypeStruct`; its dtypes are those of the result.
        origin: how errors name the weights, normally their path.
        progress: show a progress bar.
    Raises:
        ValueError: a tensor that is unused, a parameter that stays unfilled, a wrong shape (all
            listed), or values that are not finite.
    """
    wanted = slots(param_shapes)
    tied = "lm_head" not in param_shapes
    _check_complete(source, wanted, tied, origin)
    _log_ignored(source, origin)
    stacks = {
        path: np.empty(leaf.shape, leaf.dtype) for path, leaf in flatten(param_shapes).items()
    }
    spare_head = None
    for name, value in tqdm(
        source.stream(),
        total=len(source.tensors),
        desc="weights",
        unit="tensor",
        disable=not progress,
    ):
        if name in wanted:
            _store(stacks, wanted[name], value, f"{origin}: {name}")
        else:
            spare_head = value
    if spare_head is not None:
        _check_spare_head(spare_head, stacks[_EMBEDDING], origin)
    return unflatten({path: jax.device_put(stacks.pop(path)) for path in list(stacks)})


def _check_complete(
    source: WeightSource, wanted: Mapping[str, Slot], tied: bool, origin: str
) -> None:
    unused = sorted(set(source.tensors) - set(wanted) - ({_HEAD} if tied else set()))
    unfilled = sorted(set(wanted) - set(source.tensors))
    shapes = {
        name: (source.tensors[name].shape, slot.shape)
        for name, slot in wanted.items()
        if name in source.tensors
    }
    wrong = [
        f"{name} {given}, must be {needed}"
        for name, (given, needed) in shapes.items()
        if given != needed
    ]
    complain(origin, unused=unused, unfilled=unfilled, wrong=wrong)


def complain(origin: str, *, unused: list[str], unfilled: list[str], wrong: list[str]) -> None:
    """Raise one ValueError that lists everything that does not fit, if anything does not."""
    parts = [f"tensors that no parameter uses: {', '.join(unused)}"] if unused else []
    parts += [f"parameters that no tensor fills: {', '.join(unfilled)}"] if unfilled else []
    parts += [f"tensors of another shape: {'; '.join(wrong)}"] if wrong else []
    if parts:
        found = ". Found ".join(parts)
        raise ValueError(
            f"{origin} must fit the model in its config.json exactly, found {found}. Use the "
            "config.json of these weights."
        )


def _log_ignored(source: WeightSource, origin: str) -> None:
    for name, reason in source.ignored.items():
        _logger.info("%s: ignored %s (%s)", origin, name, reason)
    if source.ignored:
        _logger.info("%s: ignored %d tensors in all", origin, len(source.ignored))


def _store(
    stacks: dict[tuple[str, ...], np.ndarray], slot: Slot, value: np.ndarray, label: str
) -> None:
    """Write one tensor into its place, cast to the parameter's dtype."""
    target = stacks[slot.path] if slot.layer is None else stacks[slot.path][slot.layer]
    with np.errstate(over="ignore", invalid="ignore"):  # checked below, by name
        target[...] = value.T if slot.transpose else value
    if not np.isfinite(target).all():
        raise ValueError(
            f"{label} must be finite in {target.dtype}: load with dtype='bfloat16' or 'float32' if "
            "it overflows float16, else copy or download the damaged file again"
        )


def _check_spare_head(head: np.ndarray, embedding: np.ndarray, origin: str) -> None:
    """A tied model may still store its output matrix: it must be the embedding [vocab, hidden]."""
    if head.shape != embedding.shape or not np.array_equal(head.astype(embedding.dtype), embedding):
        raise ValueError(
            f"{origin}: {_HEAD} must equal model.embed_tokens.weight because tie_word_embeddings "
            "is true, but it differs: set tie_word_embeddings to false in config.json"
        )
    _logger.info("%s: ignored %s (equal to the embedding it is tied to)", origin, _HEAD)
