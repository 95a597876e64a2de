"""Which choices of a `CompressionPolicy` can work together; each check raises ValueError that names
the value, the rule and the remedy.

What each field may be alone is checked before (`diffkv_jax.policy.fields`).
"""

from typing import TYPE_CHECKING

import numpy as np

from diffkv_jax.arguments import shown
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.policy.selection import BY_ATTENTION, BY_FORECAST, BY_KEY, BY_REPLAY

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
            f"tiers={tiers} must go from more to fewer bytes: {tiers[1]} is not "
            f"smaller than {tiers[0]}"
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


def check_blocks(policy: "CompressionPolicy") -> None:
    """Tokens that share numbers are encoded together, from exact values, and never moved apart; one
    transform of channels at most.
    """
    if policy.rotate and policy.un_rope:
        raise ValueError("rotate=True mixes the channels that un_rope=True needs apart; choose one")
    if policy.block is None:
        return
    shared = [tier for tier in policy.tiers if not KVFormat.parse(tier).separable]
    if not shared:
        return
    if len(policy.tiers) == 2:
        raise ValueError(
            f"tiers={policy.tiers}: {shared[0]} is not separable, a token cannot "
            f"move between tiers; give it alone"
        )
    if policy.selection.in_decode or policy.score in BY_REPLAY:
        raise ValueError(
            f"tiers={policy.tiers} and observe={policy.observe!r}: score={policy.score!r} drops "
            f"stored tokens one at a time, and "
            f"{shared[0]} is not separable: its tokens share numbers. "
            "Rank by score='window' or 'expected', which decide before they are encoded, or take "
            "a codec for each token such as 'K4V4'"
        )
    if policy.flush < policy.block:
        raise ValueError(
            f"flush={policy.flush} must be at least block={policy.block}: "
            f"{shared[0]} is encoded in whole blocks"
        )


def check_lengths(policy: "CompressionPolicy", context: int) -> None:
    """Stretches of a model's context are not longer than it, short ones aside: arrays and loops
    have these lengths.
    """
    most = max(context, ALWAYS_FINE)
    for name in ("window", "flush", "sinks", "pooling", "future"):
        if (value := getattr(policy, name)) > most:
            rule = (
                f"is more than the model's context of {context} tokens: lower it to at most {most}"
            )
            raise ValueError(f"{name}={value} of policy {policy.name!r} {rule}")


def check_thresholds(policy: "CompressionPolicy") -> None:
    """Thresholds have an order and something to compare with."""
    for field, without in (
        ("keep_high", None),
        ("pooled", None),
        ("whole_layers", ()),
        ("layers", "uniform"),
        ("shared", False),
    ):
        if getattr(policy, field) != without:
            raise ValueError(
                f"{field}={getattr(policy, field)!r} belongs to budgets: give keep= "
                f"too, or leave it out"
            )
    high, low = _side_by_side(policy, "alpha_high", "alpha_low")
    if np.any(low > high):
        raise ValueError(
            f"alpha_low={policy.alpha_low} must not exceed "
            f"alpha_high={policy.alpha_high}: low tokens lie between the two"
        )
    if policy.observe is None and (high.max() > 0 or len(policy.tiers) == 2):
        raise ValueError(
            f"policy {policy.name!r} with alpha_high={policy.alpha_high} and tiers={policy.tiers} "
            f"needs observe=64 or 'all': "
            "thresholds and a second tier need significance, observe is None"
        )
    if len(policy.tiers) == 1 and policy.observe is not None and np.any(low != high):
        raise ValueError(
            f"alpha_high={policy.alpha_high} must equal alpha_low={policy.alpha_low} with the "
            f"single tier {policy.tiers}: "
            "there is no low tier between them"
        )


def _side_by_side(policy: "CompressionPolicy", *names: str) -> list[np.ndarray]:
    """The numbers of fields of which each head has one."""
    numbers = [np.asarray(getattr(policy, name)) for name in names]
    try:
        np.broadcast_shapes(*(array.shape for array in numbers))
    except ValueError:
        given = " and ".join(f"{name}={shown(getattr(policy, name))}" for name in names)
        raise ValueError(
            f"{given} must broadcast together, to [layers, requests, kv_heads]"
        ) from None
    return numbers


def check_ranking(policy: "CompressionPolicy") -> None:
    """The score is known and has what it needs; what only some scores have is given to those
    alone.
    """
    if policy.score in BY_ATTENTION and policy.observe is None:
        raise ValueError(
            f"score={policy.score!r} ranks by attention and needs observe=64 or "
            f"another number of queries, or 'all'"
        )
    if policy.score == "window" and policy.observe == "all":
        raise ValueError(
            "score='window' is that of the prompt's last queries: observe='all' must "
            "be a number of them, such as 64"
        )
    if policy.score == "last_query" and policy.observe != 1:
        raise ValueError(
            f"score='last_query' is that of one query: observe={policy.observe!r} must be 1"
        )
    if policy.score in (*BY_KEY, *BY_FORECAST) and policy.observe is not None:
        raise ValueError(
            f"score={policy.score!r} looks at no queries' attention: leave "
            f"observe={policy.observe!r} out"
        )
    if policy.pooling > 1 and policy.score != "window":
        raise ValueError(
            f"pooling={policy.pooling} averages scores of the prompt's last queries: "
            f"it needs score='window'"
        )
    if (policy.future, policy.epsilon) != (512, 0.0) and policy.score != "expected":
        raise ValueError(
            f"future={policy.future} and epsilon={policy.epsilon} belong to "
            f"score='expected': leave them out"
        )
    for field, without in (("newest_weight", 1), ("shared", False)):
        if getattr(policy, field) != without and policy.score != "window":
            raise ValueError(
                f"{field}={getattr(policy, field)} is about scores of the prompt's "
                f"last queries: it needs score='window'"
            )
    if policy.nested and not policy.shared:
        raise ValueError(
            "nested=True drops a token for all heads of the deeper layers: it needs shared=True"
        )
    if policy.score not in (None, "attention") and policy.keep is None and policy.recover is None:
        raise ValueError(
            f"score={policy.score!r} needs keep=: thresholds in units of uniform "
            f"attention belong to score='attention'"
        )


def check_replay(policy: "CompressionPolicy") -> None:
    """Going over the prompt again is a score of its own, and alone knows all layers' scores before
    anything is dropped.
    """
    if policy.score not in BY_REPLAY:
        if policy.replay is not None:
            raise ValueError(
                f"replay={policy.replay} belongs to score='replay', given "
                f"{policy.score!r}: leave it out"
            )
        if policy.layers == "pooled":
            raise ValueError(
                f"layers='pooled' needs the scores of all layers at once: "
                f"score='replay', given {policy.score!r}"
            )
        return
    if policy.observe is not None:
        raise ValueError(
            f"score='replay' comes from queries that go over the prompt again: leave "
            f"observe={policy.observe!r} out"
        )
    if policy.merge is not None:
        raise ValueError(
            f"merge={policy.merge} keeps all tokens of merged layers, and "
            f"score='replay' decides on all layers: leave one out"
        )
    if policy.layers == "pooled" and policy.pooled is None:
        raise ValueError(
            "layers='pooled' shares budgets between layers, and so between heads: "
            "give pooled= too, such as 0.0"
        )
    if policy.layers == "pooled" and policy.whole_layers:
        raise ValueError(
            f"whole_layers={policy.whole_layers} keep everything, and "
            f"layers='pooled' shares their budgets: leave one out"
        )


def check_classes(policy: "CompressionPolicy") -> None:
    """Token ids are ids, each of one class; heads that choose classes have what that takes, and
    nothing else decides.
    """
    if both := set(policy.protect) & set(policy.punctuation):
        raise ValueError(
            f"protect and punctuation both name token ids {sorted(both)}: give each one class"
        )
    if policy.recover is None:
        for field, without in (("punctuation", ()), ("frequent", 0.3), ("local", 0.3)):
            if getattr(policy, field) != without:
                raise ValueError(
                    f"{field}={getattr(policy, field)!r} is for heads that choose: "
                    f"give recover= too, or leave it out"
                )
        return
    if (
        policy.score != "attention_sum"
        or policy.group != "mean"
        or not isinstance(policy.observe, int)
    ):
        raise ValueError(
            f"recover={policy.recover} measures attention by score='attention_sum', group='mean' "
            f"and observe= a number of queries, "
            f"given score={policy.score!r}, group={policy.group!r}, observe={policy.observe!r}"
        )
    if (
        policy.keep is not None
        or np.any(np.asarray(policy.alpha_high))
        or np.any(np.asarray(policy.alpha_low))
    ):
        raise ValueError(
            f"recover={policy.recover} decides what stays: leave keep, alpha_high and alpha_low out"
        )
    if len(policy.tiers) != 1:
        raise ValueError(
            f"recover={policy.recover} keeps or drops: tiers={policy.tiers} must be one format"
        )


def check_budgets(policy: "CompressionPolicy") -> None:
    """Budgets are counts or shares, have something to rank by, and do not meet thresholds."""
    if policy.score is None:
        raise ValueError(
            f"keep={policy.keep} needs a score to rank tokens by, such as score='key_norm'"
        )
    if np.any(np.asarray(policy.alpha_high)) or np.any(np.asarray(policy.alpha_low)):
        raise ValueError(
            f"keep={policy.keep} and alpha_high={policy.alpha_high}, "
            f"alpha_low={policy.alpha_low}: give budgets or thresholds"
        )
    if isinstance(policy.keep, str):
        _check_bytes(policy)
    keep = np.asarray(policy.window + policy.sinks if isinstance(policy.keep, str) else policy.keep)
    if (policy.keep_high is None) == (len(policy.tiers) == 2):
        raise ValueError(
            f"keep_high={policy.keep_high} must be given with two tiers, and only "
            f"then; tiers={policy.tiers}"
        )
    if policy.keep_high is not None:
        high, keep = _side_by_side(policy, "keep_high", "keep")
        if high.dtype.kind != keep.dtype.kind or np.any(high > keep):
            raise ValueError(
                f"keep_high={policy.keep_high} must be of the kind of "
                f"keep={policy.keep} and not exceed it"
            )
    if policy.nested and policy.whole_layers:
        raise ValueError(
            f"whole_layers={policy.whole_layers} cannot keep what layers before them "
            f"drop: leave them or nested=True out"
        )
    if policy.shared and (policy.pooled is not None or (keep.ndim and keep.shape[-1] > 1)):
        raise ValueError(
            f"shared=True keeps as much in every head: leave pooled={policy.pooled} and budgets "
            f"by head, keep={policy.keep}, out"
        )
    if keep.dtype.kind == "i" and np.any(keep < policy.window + policy.sinks):
        raise ValueError(
            f"keep={policy.keep} must have room for window={policy.window} and "
            f"sinks={policy.sinks}, which always stay"
        )


def _check_bytes(policy: "CompressionPolicy") -> None:
    """Memory makes a number of tokens a head, which must then be all that the head ever holds."""
    reason = None
    if len(policy.tiers) == 2:
        reason = f"tiers={policy.tiers} are two, and how many tokens each should get is not said"
    elif not policy.selection.in_decode:
        reason = (
            f"score={policy.score!r} decides once a prompt, and the tokens generated later all stay"
        )
    elif policy.pooled is not None:
        reason = f"pooled={policy.pooled} lets heads trade pages, for which there must be free ones"
    elif policy.protect:
        reason = f"protect={policy.protect} may stay beyond any number of tokens"
    if reason:
        raise ValueError(
            f"keep={policy.keep!r} is an amount of memory; {reason}: give a share or "
            f"a number of tokens"
        )


def check_merge(policy: "CompressionPolicy") -> None:
    """Two layers that are merged hold all tokens, in one form; what chooses tokens chooses those of
    each other layer alone.
    """
    if policy.recover is not None or policy.nested:
        field = "recover" if policy.recover is not None else "nested"
        raise ValueError(
            f"merge={policy.merge} and {field}={getattr(policy, field)}: merged layers hold all "
            f"tokens, and that is every layer's choice; "
            f"leave {field} out, or choose tokens by thresholds or keep="
        )
    if policy.layers != "uniform":
        raise ValueError(
            f"merge={policy.merge} and layers={policy.layers!r}: merged layers hold all tokens, "
            f"and budgets would be spread over them too; "
            "leave layers out or give each layer's keep="
        )
    for tier in policy.tiers:
        fmt = KVFormat.parse(tier)
        if not fmt.separable or fmt.learned:
            raise ValueError(
                f"merge={policy.merge} stores a direction for each token, and {tier} shares "
                f"numbers over tokens or learns them of "
                "keys and values as they are: take 'full' or a codec such as 'K4V4'"
            )
    if policy.un_rope:
        raise ValueError(
            f"merge={policy.merge} compares keys as attention reads them, and "
            f"un_rope=True stores others: leave un_rope out"
        )
