"""Which stages of a `CompressionPolicy` can work together: the rules that need two of them.

Each raises ValueError that names the value, the rule and the remedy. What one stage may be alone it
checks itself.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np

from diffkv_jax.arguments import shown
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.policy.keep import Budget, KeepAll, Thresholds
from diffkv_jax.policy.score import Score
from diffkv_jax.policy.stage import lengths, overrides

if TYPE_CHECKING:
    from diffkv_jax.policy.policy import CompressionPolicy

ALWAYS_FINE = 1024  # tokens of a stretch that no model's context is too short for


def check_tiers(tiers: tuple[str, ...]) -> None:
    """One or two formats, the second the smaller one."""
    formats = [_parsed(tiers, name) for name in tiers]
    if not 1 <= len(formats) <= 2:
        raise ValueError(f"tiers={tiers} must name one or two formats: a page table has two ends")
    first, second = (_bytes_of_128(fmt) for fmt in (formats[0], formats[-1]))
    if len(formats) == 2 and first is not None and second is not None and second >= first:
        raise ValueError(
            f"tiers={tiers} must go from more to fewer bytes: {tiers[1]} is not smaller than "
            f"{tiers[0]}"
        )


def _parsed(tiers: tuple[str, ...], name: str) -> KVFormat:
    try:
        return KVFormat.parse(name)
    except ValueError as error:
        raise ValueError(f"tiers={shown(tiers)}: {error}") from None


def _bytes_of_128(fmt: KVFormat) -> float | None:
    """Of a token with 128 channels; None where a format is made for other widths (the cache is then
    what refuses it).
    """
    try:
        return fmt.for_block(128, 32).token_bytes(128)
    except ValueError:
        return None


def check_lengths(policy: "CompressionPolicy", context: int) -> None:
    """Stretches of a model's context are not longer than it, short ones aside: arrays and loops
    have these lengths.
    """
    most = max(context, ALWAYS_FINE)
    for name, value in lengths(policy):
        if value > most:
            raise ValueError(
                f"{name}={value} of policy {policy.name!r} is more than the model's context of "
                f"{context} tokens: lower it to at most {most}"
            )


def check_stages(policy: "CompressionPolicy") -> None:
    """All rules."""
    _check_leaves(policy)
    _check_groups(policy)
    _check_ranking(policy)
    policy.keep.check_policy(policy)
    if isinstance(policy.keep, Thresholds):
        _check_thresholds(policy, policy.keep)
    if isinstance(policy.keep, Budget):
        _check_budget(policy, policy.keep)
    if policy.pairs is not None:
        _check_pairs(policy)


def _check_leaves(policy: "CompressionPolicy") -> None:
    """Only what `keep` holds becomes arrays of the cache (`Keep.bind`)."""
    for name in ("score", "transform", "protect", "schedule", "pairs"):
        if jax.tree.leaves(getattr(policy, name)):
            raise ValueError(
                f"{name}={getattr(policy, name)} has fields made by data(): those are for keep=, "
                "whose numbers compile nothing; make them by static()"
            )


def _check_groups(policy: "CompressionPolicy") -> None:
    """Tokens that share numbers are encoded together, from exact values, and never moved apart."""
    shared = [tier for tier in policy.tiers if not KVFormat.parse(tier).separable]
    if not shared:
        return
    if len(policy.tiers) == 2:
        raise ValueError(
            f"tiers={policy.tiers}: {shared[0]} is not separable, a token cannot move between "
            "tiers; give it alone"
        )
    if policy.score is not None and (policy.in_decode or policy.score.has_passes):
        raise ValueError(
            f"tiers={policy.tiers} and score={policy.score}: it drops stored tokens one at a "
            f"time, and {shared[0]} is not separable: its tokens share numbers. Rank by a score "
            "that decides before they are encoded (WindowAttention, ExpectedAttention), or take a "
            "codec for each token such as 'K4V4'"
        )
    if policy.schedule.flush < (policy.group or 0):
        raise ValueError(
            f"flush={policy.schedule.flush} must be at least group={policy.group}: with "
            f"tiers={policy.tiers} tokens are encoded in whole groups"
        )


def _check_ranking(policy: "CompressionPolicy") -> None:
    """What stays is chosen by a score, and a score is there to choose by."""
    score, keep = policy.score, policy.keep
    if keep.ranks and score is None:
        raise ValueError(f"keep={keep} needs a score to rank tokens by, such as score=KeyNorm()")
    absolute = isinstance(keep, Thresholds | KeepAll)
    if score is not None and absolute and not score.per_query:
        raise ValueError(
            f"score={score} needs keep=Budget(...): {keep} is in units of uniform attention, which "
            "belong to score=MeanAttention()"
        )
    if score is None and len(policy.tiers) == 2:
        raise ValueError(
            f"policy {policy.name!r} with tiers={policy.tiers} needs a score such as "
            "score=MeanAttention(queries=64): a second tier needs scores"
        )
    if score is not None:
        _check_score(policy, score)
    if keep.share_layers and not (score is not None and score.has_passes):
        raise ValueError(
            f"share_layers=True needs the scores of all layers at once: a score with passes such "
            f"as ContextReconstruction(), given {score}"
        )


def _check_score(policy: "CompressionPolicy", score: Score) -> None:
    """A score has something to rank by, and its facts go together."""
    verbs, name = ("enter", "rescore", "passes"), f"score={score}"
    if not score.queries and not any(overrides(score, verb, Score) for verb in verbs):
        raise ValueError(
            f"score={score} ranks by attention: give queries=64, another number, 'all', or a class "
            "that has its own enter, rescore or passes"
        )
    if score.hides_dropped and not score.shares_tokens:
        raise ValueError(
            f"{name} hides tokens from deeper layers for all heads: shares_tokens=True"
        )
    if score.hides_dropped and overrides(score, "on_prompt", Score):
        raise ValueError(f"{name} hides tokens from deeper layers, whose queries on_prompt misses")
    if score.shares_tokens and not isinstance(policy.keep, Budget):
        raise ValueError(f"{name} keeps as much in every head: it needs keep=Budget(...)")
    if score.resets and score.per_query:
        raise ValueError(f"{name} forgets queries that per_query=True divides by: take one of both")
    if score.has_passes and (score.rescores or policy.keep.marks):
        raise ValueError(
            f"{name} decides after its passes: rescore and the marks of keep={policy.keep} "
            "never run then"
        )


def _check_thresholds(policy: "CompressionPolicy", keep: Thresholds) -> None:
    """Thresholds have something to compare with."""
    high, low = (np.asarray(alpha) for alpha in (keep.alpha_high, keep.alpha_low))
    if policy.score is None and high.max() > 0:
        raise ValueError(
            f"policy {policy.name!r} with alpha_high={keep.alpha_high} needs "
            "score=MeanAttention(queries=64): thresholds need scores"
        )
    if len(policy.tiers) == 1 and policy.score is not None and np.any(low != high):
        raise ValueError(
            f"alpha_high={keep.alpha_high} must equal alpha_low={keep.alpha_low} with the single "
            f"tier of tiers={policy.tiers}: there is no low tier between them"
        )


def _check_budget(policy: "CompressionPolicy", keep: Budget) -> None:
    """Budgets are for the tiers there are, and have room for what always stays."""
    if keep.in_bytes:
        _check_bytes(policy, keep)
    least = policy.schedule.window + policy.protect.sinks
    amounts = np.asarray(least if keep.in_bytes else keep.keep)
    if (keep.keep_high is None) == (len(policy.tiers) == 2):
        raise ValueError(
            f"keep_high={keep.keep_high} must be given with two tiers, and only then; "
            f"tiers={policy.tiers}"
        )
    assert policy.score is not None  # `_check_ranking`
    if policy.score.hides_dropped and keep.whole_layers:
        raise ValueError(
            f"whole_layers={keep.whole_layers} cannot keep what layers before them drop: leave "
            "them out, or take a score that hides nothing (nested=False)"
        )
    by_head = keep.share_heads is not None or (amounts.ndim and amounts.shape[-1] > 1)
    if policy.score.shares_tokens and by_head:
        raise ValueError(
            f"score={policy.score} keeps as much in every head: leave "
            f"share_heads={keep.share_heads} and budgets by head, keep={keep.keep}, out"
        )
    if amounts.dtype.kind == "i" and np.any(amounts < least):
        raise ValueError(
            f"keep={keep.keep} must have room for window={policy.schedule.window} and "
            f"sinks={policy.protect.sinks}, which always stay"
        )


def _check_bytes(policy: "CompressionPolicy", keep: Budget) -> None:
    """Memory makes a number of tokens a head, which must then be all that the head ever holds."""
    reason = None
    if len(policy.tiers) == 2:
        reason = f"tiers={policy.tiers} are two, and how many tokens each should get is not said"
    elif not policy.in_decode:
        reason = (
            f"score={policy.score} decides once a prompt, and the tokens generated later all stay"
        )
    elif keep.share_heads is not None:
        reason = (
            f"share_heads={keep.share_heads} lets heads trade pages, for which there must be free "
            "ones"
        )
    elif policy.protect.token_ids:
        reason = f"protect={policy.protect.token_ids} may stay beyond any number of tokens"
    if reason:
        raise ValueError(
            f"keep={keep.keep!r} is an amount of memory; {reason}: give a share or a number of "
            "tokens"
        )


def _check_pairs(policy: "CompressionPolicy") -> None:
    """Two layers that are merged hold all tokens, in one form; what chooses tokens chooses those of
    each other layer alone.
    """
    score, keep = policy.score, policy.keep
    hides = score is not None and score.hides_dropped
    if keep.marks or hides:
        raise ValueError(
            f"pairs={policy.pairs} and {keep if keep.marks else score}: merged layers hold all "
            "tokens, and that is every layer's choice; choose tokens by Thresholds or Budget"
        )
    if score is not None and score.has_passes:
        raise ValueError(
            f"pairs={policy.pairs} keeps all tokens of merged layers, and score={score} decides on "
            "all layers: leave one out"
        )
    if isinstance(keep, Budget) and keep.layers != "uniform":
        raise ValueError(
            f"pairs={policy.pairs} and layers={keep.layers!r}: merged layers hold all tokens, and "
            "budgets would be spread over them too; leave layers out or give each layer's keep="
        )
    for tier in policy.tiers:
        fmt = KVFormat.parse(tier)
        if not fmt.separable or fmt.learned:
            raise ValueError(
                f"pairs={policy.pairs} stores a direction for each token, and "
                f"tiers={policy.tiers} share numbers over tokens or learn them of keys and values "
                "as they are: take 'full' or a codec such as 'K4V4'"
            )
    if policy.transform.position_free or policy.transform.learned:
        raise ValueError(
            f"pairs={policy.pairs} compares keys of two layers as attention reads them, and "
            f"transform={policy.transform} stores others: leave it out"
        )
