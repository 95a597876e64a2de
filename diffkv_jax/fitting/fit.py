"""`fit_policy`: the policy with the least measured KL that fits into some bytes, or with the fewest
bytes that keeps to some KL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from diffkv_jax.arguments import flag, integer
from diffkv_jax.batching import as_batch
from diffkv_jax.calibration.calibrate import USUAL
from diffkv_jax.calibration.calibration import Calibration, fingerprint
from diffkv_jax.calibration.sample_text import built_in_rows
from diffkv_jax.choice.automatic import fits_policies
from diffkv_jax.choice.fitted import FitReport, FittedPolicy
from diffkv_jax.fitting.candidates import (
    BY_HEADS,
    DROPPING,
    IN_A_POOL,
    KEEPING,
    NARROW,
    ROUGH,
    Path,
    possible,
    transforms,
)
from diffkv_jax.fitting.finals import decided
from diffkv_jax.fitting.goal import Goal, goal_of
from diffkv_jax.fitting.heads import neediest
from diffkv_jax.fitting.measure import Bench, Measured, learned
from diffkv_jax.fitting.search import Tried, search
from diffkv_jax.fitting.texts import GOES_ON, LEAST, STEPS, Texts, split
from diffkv_jax.inputs import as_params, check_model, check_outside_jit
from diffkv_jax.methods.registry import PRESETS
from diffkv_jax.model import AttentionSpec, CausalLM
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.policy.transform import Transform

MEASURED = 2048  # most tokens of context in the texts
FITTED_ROWS = 4
ROWS = 8  # of text, if there is enough
KL_BY_BYTES = 2.5  # the KL grows as the bytes to this power fall, about, on every path
ORDERED_BY = 2  # rows that say which heads need most
LEAST_SHARE = 1.02
DEAR = PRESETS["balanced"]  # a KL from which on dropping tokens may be the better way to few bytes
COMPARED = 0.7  # place on a path where transforms are compared


@fits_policies
@in_32_bits
def fit_policy(
    model: CausalLM,
    params: Mapping[str, Any],
    tokens: Any = None,
    *,
    share: float | None = None,
    memory_budget: int | str | None = None,
    target_kl: float | str | None = None,
    context: int | None = None,
    requests: int = 1,
    drop: bool = True,
    progress: bool = True,
) -> FittedPolicy:
    """Choose transform, tiers and thresholds by what they cost on some text: the least mean KL from
    the full cache within `share` or `memory_budget`, or the fewest bytes with `target_kl`.

    Candidates run in the real cache, behind at most 2,048 tokens. The KL is the mean over text that
    goes on and a passage of it that is repeated: what was dropped or blurred shows there. The
    report is of other text. Tokens are dropped only where the goal is not met otherwise: by KVzip's
    ranks, after a second reading of a prompt, or, with a `memory_budget`, which need not hold a
    whole prompt, by DiffKV's. A fit takes minutes.

    Args:
        model: as for `generate`.
        params: its parameters.
        tokens: int [S, N], or a list of equally long texts, to calibrate, fit and report on: at
            least two times 260 tokens. None: the package's own, for models of `load_pretrained`.
        share: most allocated bytes, of a plain bfloat16 cache's at `context`.
        memory_budget: the same as bytes or text such as "512MiB", for all requests, at their end.
        target_kl: most mean KL in nats, or "quality" (0.003), "balanced" (0.01) or "small" (0.03).
            None of the three: "balanced".
        context: tokens of a request, prompt and answer; None: 4,096 or the model's context.
        requests: how many there are.
        drop: whether tokens may be dropped.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: bad input, named; or nothing meets the goal, with the best there is.
    """
    check_model("fit_policy", model)
    params = as_params("fit_policy", params)
    check_outside_jit("fit_policy", tokens)
    drop, progress = flag("drop", drop), flag("progress", progress)
    attention, length = model.attention, _length(model.attention, context)
    requests = integer("requests", requests, least=1)
    goal = goal_of(attention, share, memory_budget, target_kl, length, requests)
    _check_possible(goal, attention, length)
    texts, others = texts_of(model, tokens, length)
    with tqdm(desc="fitting a policy", unit=" runs", disable=not progress) as bar:
        bench = Bench(model, params, texts, length, requests, replays=True)
        dropping = () if not drop else DROPPING if memory_budget is None else IN_A_POOL
        best, transform, calibration = _best(bench, goal, dropping, bar)
        policy = replace(best.path.policy(transform, (best.point,)), name="fitted")
        calibration = _for_tiers(calibration, policy.tiers)
        seen = Bench(model, params, others, length, requests).of(policy, calibration)
        bar.update()
    report = _report(seen, best, others, length)
    return FittedPolicy(policy, calibration, report, fingerprint(model, params), goal.asked())


def _best(
    bench: Bench, goal: Goal, dropping: Sequence[Path], bar: tqdm
) -> tuple[Tried, Transform, Calibration | None]:
    """What meets the goal best, where nothing is dropped if that meets it well; the transform and
    what that has learned.

    Raises:
        ValueError: nothing meets it.
    """
    attention = bench.model.attention
    paths, rough = (possible(some, attention, bench.context) for some in (KEEPING, (ROUGH,)))
    transform, calibration = _best_transform(bench, (rough or paths)[-1], bar)

    def measure(path: Path, points: Sequence[float], on: Bench = bench) -> list[Measured]:
        found = on.along(path, points, transform, _for_tiers(calibration, path.tiers))
        bar.update()
        return found

    few = bench.with_rows(ORDERED_BY)

    def by_heads(paths: Sequence[Path]) -> list[Path]:
        """Those that the model can have, with one order of heads."""
        found = possible(paths, attention, bench.context)
        if not found:
            return []
        known = _for_tiers(calibration, found[0].tiers)
        order = neediest(few, found[0], transform, known, bar.update)
        return [path._replace(order=order) for path in found]

    tried = search(measure, paths + by_heads(BY_HEADS), goal)
    found = tried[0].measured
    dear = not goal.met(found) or (goal.share is not None and found.mean_kl > DEAR)
    if dear or (goal.share is None and _is_smallest(tried)):
        more = possible(dropping if dear else (), attention, bench.context)
        tried += search(measure, more or by_heads(NARROW), goal)
        tried.sort(key=lambda one: goal.order(one.measured))
    _check_met(goal, tried[0], bool(dropping))
    best = decided(bench, goal, tried, lambda on, one: measure(one.path, (one.point,), on)[0])
    return best, transform, calibration


def _is_smallest(tried: Sequence[Tried]) -> bool:
    """Whether the best has next to the fewest bytes, so that fewer bits might do too."""
    return tried[0].measured.share <= LEAST_SHARE * min(one.measured.share for one in tried)


def _length(attention: AttentionSpec, context: Any) -> int:
    most = attention.max_position_embeddings
    given = min(USUAL, most) if context is None else context
    return integer("context", given, least=min(LEAST, most), most=most)


def _report(seen: Measured, best: Tried, others: Texts, context: int) -> FitReport:
    return FitReport(
        kl=seen.mean_kl,
        going_on=seen.going_on,
        repeated=seen.repeated,
        kl_error=seen.kl_error,
        top1=float(seen.top1.mean()),
        recall=seen.recall,
        recall_full=seen.recall_full,
        share=seen.share,
        context=context,
        measured=others.context,
        rows=len(others.rows),
        fitted_kl=best.measured.mean_kl,
    )


def texts_of(model: CausalLM, tokens: Any, context: int) -> tuple[Texts, Texts]:
    """Texts to fit on and others to report on, of the given tokens or of the built-in text.

    Raises:
        TypeError, ValueError: bad tokens, or too few; a model with too short a context.
    """
    room = model.attention.max_position_embeddings - STEPS - 1
    if room < LEAST:
        raise ValueError(
            f"the model's context of {room + STEPS + 1} tokens is too short to measure policies: "
            f"at least {LEAST + STEPS + 1} are needed; name a policy, such as quantized('K8V8')"
        )
    if tokens is None:
        measured = min(MEASURED, context, room)
        width = measured + GOES_ON + 1
        return split(built_in_rows(model, width), measured, FITTED_ROWS)
    batch, sizes = as_batch(tokens, model.attention.vocab_size)
    if (sizes != batch.shape[1]).any():
        raise ValueError(
            f"tokens must be texts of one length, given lengths {sizes.tolist()}: cut them to the "
            "shortest"
        )
    # rather several texts than long ones
    spare = batch.size // ROWS - STEPS if len(batch) < ROWS else batch.shape[1] - STEPS
    measured = min(MEASURED, context, room, batch.shape[1] - STEPS, max(spare, LEAST))
    if measured < LEAST:
        raise ValueError(
            f"tokens have shape {list(batch.shape)}, and what is measured needs texts of at least "
            f"{LEAST + STEPS} tokens: give longer ones"
        )
    return split(batch, measured, FITTED_ROWS)


def _best_transform(bench: Bench, path: Path, bar: tqdm) -> tuple[Transform, Calibration | None]:
    """The transform with the least KL for its bytes in one place of a path, and what it learned
    from the texts of the fit.
    """
    found = []
    for transform in transforms(bench.model.attention):
        policy = path.policy(transform, (COMPARED,))
        calibration = learned(bench.model, bench.params, bench.texts, policy, bench.context)
        seen = bench.of(policy, calibration)
        # what a transform itself takes could go into bits instead
        worth = seen.mean_kl * seen.share**KL_BY_BYTES
        found.append((worth, len(found), transform, calibration))
        bar.update()
    _, _, transform, calibration = min(found)
    return transform, calibration


def _for_tiers(calibration: Calibration | None, tiers: tuple[str, ...]) -> Calibration | None:
    """The same maps of keys and values for codecs that learn nothing."""
    if calibration is None:
        return None
    return replace(calibration, tiers=tiers, tables=((None, None),) * len(tiers))


def _check_possible(goal: Goal, attention: AttentionSpec, context: int) -> None:
    """Refuse a model without paged layers, and a share that not even the tokens fit into which
    every candidate keeps exact.
    """
    rings = [min(window, context) for window in attention.sliding_windows if window is not None]
    if len(rings) == len(attention.sliding_windows):
        raise ValueError(
            "every layer of the model has a sliding window, whose tokens are not compressed: there "
            "is nothing to choose; take policy=None"
        )
    paths = possible(KEEPING, attention, context)
    if not paths:
        raise ValueError(
            f"no candidate can hold heads of {attention.head_dim} channels: take policy=None"
        )
    if goal.share is None:
        return
    recent = min(path.window + path.window // 2 for path in paths)
    paged = len(attention.sliding_windows) - len(rings)
    itemsize = jnp.dtype(attention.dtype).itemsize
    least = (paged * recent + sum(rings)) * itemsize / (2 * (paged * context + sum(rings)))
    if goal.share < least:
        raise ValueError(
            f"no policy fits into {goal.share:.2%} of a bfloat16 cache's bytes: recent tokens, "
            f"which stay exact, take {least:.2%} at context={context}. Raise the budget"
        )


def _check_met(goal: Goal, best: Tried, drop: bool) -> None:
    found = best.measured
    if goal.met(found):
        return
    dropping = "" if drop else ", or allow tokens to be dropped: fit_policy(..., drop=True)"
    there = f"mean KL {found.mean_kl:.4f} at {found.share:.1%} of bfloat16"
    if goal.share is not None:
        raise ValueError(
            f"no policy fits into {goal.share:.1%} of a bfloat16 cache's bytes; the smallest that "
            f"was tried: {there}. Raise the budget{dropping}"
        )
    raise ValueError(
        f"no policy keeps the mean KL below target_kl={goal.target_kl}; the best that was tried: "
        f"{there}. Raise it, or take quantized('K8V8') or no policy"
    )
