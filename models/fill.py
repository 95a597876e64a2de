"""From a stream of named tensors to the stacked parameter tree, complete in both directions."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from .names import Slot, flatten, slots, unflatten
from .source import WeightSource

_EMBEDDING = ("embed_tokens", "embedding")
_HEAD = "lm_head.weight"
_SPARE = ("output matrix of a tied model",)
_ROWS = 64  # of a matrix, cast and checked at once
_CHECKED = 2**17  # numbers looked at at once
_logger = logging.getLogger("diffkv_jax")


def fill_params(
    source: WeightSource,
    param_shapes: Mapping[str, Any],
    *,
    origin: str,
    progress: bool | None = False,
) -> dict[str, Any]:
    """The parameters of a model, filled from `source`.

    Each stacked parameter is allocated once and filled layer by layer while the tensors stream by,
    so the peak is the result plus a piece of a tensor, beside the pages of a memory-mapped shard,
    which the system takes back when it needs them. On CPUs the result is the memory filled.

    Args:
        source: the opened weights.
        param_shapes: nested dict of `jax.ShapeDtypeStruct`; its dtypes are those of the result.
        origin: how errors name the weights, normally their path.
        progress: show a progress bar; None: where standard error is a terminal.
    Raises:
        ValueError: a tensor that is unused, a parameter that stays unfilled, a wrong shape (all
            listed), or values that are not finite.
    """
    wanted = slots(param_shapes)
    tied = "lm_head" not in param_shapes
    _check_complete(source, wanted, tied, origin)
    _log_ignored(source, origin)
    stacks = {
        path: _aligned(leaf.shape, leaf.dtype) for path, leaf in flatten(param_shapes).items()
    }
    if tied and _HEAD in source.tensors:
        shape = source.tensors[_HEAD].shape
        wanted, stacks[_SPARE] = (
            {**wanted, _HEAD: Slot(_SPARE, None, False, shape)},
            np.empty(shape, stacks[_EMBEDDING].dtype),
        )
    with tqdm(
        total=len(source.tensors),
        desc="weights",
        unit="tensor",
        disable=None if progress is None else not progress,
        leave=False,
    ) as bar:
        for name, start, rows in source.stream():
            _store(stacks, wanted[name], start, rows, f"{origin}: {name}")
            bar.update(start == 0)
    if _SPARE in stacks:
        _check_spare_head(stacks.pop(_SPARE), stacks[_EMBEDDING], origin)
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
    stacks: dict[tuple[str, ...], np.ndarray],
    slot: Slot,
    first: int,
    value: np.ndarray,
    label: str,
) -> None:
    """Write rows of a tensor into their place, cast to the parameter's dtype: a few at a time, so
    that they stay in a processor's cache between the cast, the check and the transpose.
    """
    target = stacks[slot.path] if slot.layer is None else stacks[slot.path][slot.layer]
    rows = (target.T if slot.transpose else target)[first : first + len(value)]
    for start in range(0, len(value), _ROWS):
        with np.errstate(over="ignore", invalid="ignore"):  # checked below, by name
            part = value[start : start + _ROWS].astype(target.dtype)
        if not all_finite(part):
            raise ValueError(
                f"{label} must be finite in {target.dtype}: load with dtype='bfloat16' or "
                "'float32' if it overflows float16, else copy or download the damaged file again"
            )
        rows[start : start + _ROWS] = part


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is infinite or NaN, of any float dtype of 16 or 32 bits: by the exponent's
    bits, six times as fast as `np.isfinite` of bfloat16, and a piece at a time.
    """
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    exponent = np.array(np.inf, values.dtype).view(bits.dtype)
    pieces = (bits[start : start + _CHECKED] for start in range(0, bits.size, _CHECKED))
    return not any(((piece & exponent) == exponent).any() for piece in pieces)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array, not filled, whose memory JAX's CPU backend takes over as it is: it copies arrays
    that do not begin at a multiple of 64 bytes.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _check_spare_head(head: np.ndarray, embedding: np.ndarray, origin: str) -> None:
    """A tied model may still store its output matrix: it must be the embedding [vocab, hidden]."""
    if head.shape != embedding.shape or not np.array_equal(head, embedding):
        raise ValueError(
            f"{origin}: {_HEAD} must equal model.embed_tokens.weight because tie_word_embeddings "
            "is true, but it differs: set tie_word_embeddings to false in config.json"
        )
    _logger.info("%s: ignored %s (equal to the embedding it is tied to)", origin, _HEAD)
