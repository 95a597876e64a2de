"""Published methods by name: each a `CompressionPolicy`.

Arguments named as its fields are checked as those; here are the others.
"""

import dataclasses
from typing import Any, Literal, TypedDict, Unpack

from diffkv_jax.arguments import instance, integer, number, one_of
from diffkv_jax.methods.format_names import named_format, outliers_apart, tokens_of_block
from diffkv_jax.policy.fields import MOST_TOKENS
from diffkv_jax.policy.pairs import Merge
from diffkv_jax.policy.policy import Budget, CompressionPolicy, Threshold
from diffkv_jax.policy.replay import Replay
from diffkv_jax.policy.selection import Score


def diffkv(
    alpha_high: Threshold = 1.0,
    alpha_low: Threshold = 0.0,
    *,
    tiers: tuple[str, ...] = ("K8V4", "K4V2"),
    observe: int | Literal["all"] = 64,
    window: int = 64,
    flush: int = 32,
    sinks: int = 0,
    protect: tuple[int, ...] = (),
    rotate: bool = False,
) -> CompressionPolicy:
    """DiffKV (arXiv 2412.03131): significant tokens at K8V4, less significant ones at K4V2, the
    rest dropped, per head and request.
    """
    choices: dict[str, Any] = {"sinks": sinks, "protect": protect, "rotate": rotate}
    return CompressionPolicy(
        "diffkv", tiers, alpha_high, alpha_low, observe, window, flush, **choices
    )


def quantized(
    fmt: str, *, window: int = 64, flush: int = 32, rotate: bool = False
) -> CompressionPolicy:
    """Every token outside the recent window at one format, such as "K8V4"; nothing is dropped."""
    fmt = named_format(fmt, fmt=fmt)
    return CompressionPolicy(fmt, (fmt,), window=window, flush=flush, rotate=rotate)


def kivi(
    bits: int = 2,
    *,
    group: int = 32,
    value_group: int | None = None,
    residual: int = 128,
    rotate: bool = False,
) -> CompressionPolicy:
    """KIVI (arXiv:2402.02750): keys per channel in groups of `group` tokens, values per token in
    groups of `value_group` channels.

    `value_group` must divide the model's head_dim; None: `group`, or the nearest divisor of
    head_dim (20 for 80 and 32). At most `residual` recent tokens are exact; they leave `group` at a
    time.
    """
    group, residual = (
        tokens_of_block("group", group),
        integer("residual", residual, least=1, most=MOST_TOKENS),
    )
    bits, window = integer("bits", bits, least=0), residual - group
    channels = (
        group
        if value_group is None
        else integer("value_group", value_group, least=1, most=MOST_TOKENS)
    )
    if window < 1:
        raise ValueError(
            f"residual={residual} must be larger than group={group}: the tokens of a "
            f"group leave together, one at least stays"
        )
    tiers = (
        named_format(
            f"K{bits}cV{bits}g{channels}", bits=bits, group=group, value_group=value_group
        ),
    )
    return CompressionPolicy(
        f"kivi-{bits}", tiers, window=window, flush=group, block=group, rotate=rotate
    )


def gear(
    bits: int = 2,
    *,
    rank: int = 2,
    outliers: float = 0.02,
    group: int = 64,
    value_group: int | None = None,
    buffer: int = 64,
    backbone: Literal["kivi", "kcvt"] = "kivi",
) -> CompressionPolicy:
    """GEAR (arXiv:2403.05527): a backbone quantiser, its error in `rank` ranks a block of `group`
    tokens, and a share of outliers.

    Backbone "kivi": as in `kivi`, with its `value_group`; "kcvt": keys per channel over the block,
    values per token. Without outliers (0) it is GEAR-L.
    New tokens are exact until `buffer` of them have gathered; `group` of those are encoded
    together.
    """
    backbone = one_of("backbone", backbone, ("kivi", "kcvt"))
    bits, rank, outliers = (
        integer("bits", bits, least=0),
        integer("rank", rank, least=0),
        number("outliers", outliers, least=0),
    )
    group, buffer = (
        tokens_of_block("group", group),
        integer("buffer", buffer, least=1, most=MOST_TOKENS),
    )
    if buffer < group:
        raise ValueError(
            f"buffer={buffer} must be at least group={group}: the tokens of a group "
            f"are encoded together"
        )
    if backbone == "kcvt" and value_group is not None:
        raise ValueError(
            f"value_group={value_group!r} belongs to backbone='kivi': values of "
            f"'kcvt' have one group a token, leave it out"
        )
    channels = (
        group
        if value_group is None
        else integer("value_group", value_group, least=1, most=MOST_TOKENS)
    )
    fmt = f"K{bits}cV{bits}{f'g{channels}' if backbone == 'kivi' else ''}"
    fmt += outliers_apart(outliers) + (f"+r{rank}" if rank else "")
    fmt = named_format(
        fmt, bits=bits, rank=rank, outliers=outliers, group=group, value_group=value_group
    )
    return CompressionPolicy(
        f"gear-{bits}", (fmt,), window=max(buffer - group, 1), flush=group, block=group
    )


def coupled_quantization(
    channels: int = 4, bits: int = 8, *, window: int = 64, flush: int = 32
) -> CompressionPolicy:
    """Coupled Quantization (arXiv:2405.03917): `channels` neighbouring channels share a code of
    `bits` bits; keys without RoPE.

    Its codebooks are learned: `generate(..., calibration=calibrate(model, params, tokens,
    policy))`.
    """
    bits, channels = integer("bits", bits, least=0), integer("channels", channels, least=0)
    fmt = named_format(f"K{bits}v{channels}V{bits}v{channels}", bits=bits, channels=channels)
    return CompressionPolicy(
        f"cq_{channels}c{bits}b", (fmt,), window=window, flush=flush, un_rope=True
    )


def kvquant(
    bits: int = 4, outliers: float = 0.01, *, sinks: int = 0, window: int = 64, flush: int = 32
) -> CompressionPolicy:
    """KVQuant (arXiv:2401.18079): learned levels, of each channel's range for keys (without RoPE)
    and of each token's for values.

    The share `outliers` of each token (0: none) is kept apart. With `sinks` the first tokens stay
    exact, in a tier of their own through which prompts of several chunks pass: give a memory
    budget. Its tables are learned, as those of `coupled_quantization`.
    """
    bits, outliers = integer("bits", bits, least=0), number("outliers", outliers, least=0)
    window, sinks = (
        integer("window", window, least=1, most=MOST_TOKENS),
        integer("sinks", sinks, least=0, most=MOST_TOKENS),
    )
    apart = outliers_apart(outliers)
    tiers = (named_format(f"K{bits}sV{bits}t{apart}", bits=bits, outliers=outliers),)
    policy = CompressionPolicy(
        f"kvquant_{bits}b{apart}", tiers, window=window, flush=flush, un_rope=True
    )
    if not sinks:
        return policy
    return dataclasses.replace(
        policy,
        tiers=("full", *tiers),
        score="recency",
        sinks=sinks,
        keep_high=window + sinks,
        keep=2**30,
    )


def turboquant(bits: int = 4, *, window: int = 64, flush: int = 32) -> CompressionPolicy:
    """TurboQuant (arXiv:2504.19874) without QJL: rotated, then the best scalar levels for a normal
    variable, one scale a token.
    """
    bits = integer("bits", bits, least=0)
    fmt = named_format(f"K{bits}nV{bits}n", bits=bits)
    return dataclasses.replace(
        quantized(fmt, window=window, flush=flush, rotate=True), name="turboquant"
    )


class Options(TypedDict, total=False):
    """What every method with a budget (and `fastgen`) takes beside it, as in `CompressionPolicy`,
    but that four `sinks` are the default.
    """

    tiers: tuple[str, ...]
    window: int
    flush: int
    sinks: int
    protect: tuple[int, ...]
    rotate: bool


def streaming_llm(keep: Budget = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """StreamingLLM (arXiv:2309.17453): the first tokens and the most recent ones. Keys keep their
    positions: they are not rotated anew.
    """
    return _evicting("streaming_llm", "recency", keep, options)


def h2o(keep: Budget = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """H2O (arXiv:2306.14048): the tokens with the largest sum of attention over all queries so far;
    the mean over a group's query heads.
    """
    return _evicting("h2o", "attention_sum", keep, options, observe="all", group="mean")


def tova(keep: Budget = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """TOVA (arXiv:2401.06104): the tokens that the last query attends to most; for each KV head,
    where the paper averages over all heads.

    Between two events nothing leaves; `flush=1` decides at every step, as the paper does.
    """
    return _evicting("tova", "last_query", keep, options, observe=1, group="mean")


def snapkv(
    keep: Budget = 0.5, *, pooling: int = 5, **options: Unpack[Options]
) -> CompressionPolicy:
    """SnapKV (arXiv:2404.14469): what the prompt's last `window` queries attend to, averaged over
    neighbours; decides once a prompt.
    """
    return _evicting(
        "snapkv",
        "window",
        keep,
        options,
        observe=options.get("window", 64),
        group="mean",
        pooling=pooling,
    )


def pyramidkv(
    keep: Budget = 0.5, *, pooling: int = 5, **options: Unpack[Options]
) -> CompressionPolicy:
    """PyramidKV (arXiv:2406.02069): SnapKV with budgets that shrink linearly with depth; `keep` is
    their mean over the layers.
    """
    return dataclasses.replace(
        snapkv(keep, pooling=pooling, **options), name="pyramidkv", layers="pyramid"
    )


def pyramidinfer(
    keep: Budget = 0.5,
    *,
    newest_weight: float = 1.2,
    nested: bool = True,
    **options: Unpack[Options],
) -> CompressionPolicy:
    """PyramidInfer (arXiv:2405.12532): one set of tokens a layer, fewer with depth, chosen while
    the prompt is read.

    What a layer drops is not there for deeper ones (`nested`). `keep` is the mean over the layers.
    """
    chosen: dict[str, Any] = {
        "newest_weight": newest_weight,
        "shared": True,
        "nested": nested,
        "layers": "cosine",
    }
    return _evicting(
        "pyramidinfer",
        "window",
        keep,
        options,
        observe=options.get("window", 64),
        group="mean",
        **chosen,
    )


def key_norm(
    keep: Budget = 0.5, *, whole_layers: tuple[int, ...] = (0, 1), **options: Unpack[Options]
) -> CompressionPolicy:
    """L2-norm eviction (arXiv:2406.11430): the keys with the smallest norms, beside the first and
    the recent tokens; layers 0 and 1 whole.

    Models that normalise their keys (Qwen3, Gemma 3) leave little to rank by.
    """
    return _evicting("key_norm", "key_norm", keep, options, whole_layers=whole_layers)


def key_difference(keep: Budget = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """KeyDiff (arXiv:2504.15364): the keys least like the mean of all unit keys of their prompt
    chunk; after the prompt, of the window.
    """
    return _evicting("key_difference", "key_difference", keep, options)


def expected_attention(
    keep: Budget = 0.5, *, future: int = 512, epsilon: float = 0.0, **options: Unpack[Options]
) -> CompressionPolicy:
    """ExpectedAttention (arXiv:2510.00636): what queries like the prompt's, at the next `future`
    positions, can be expected to attend to; decides once a prompt.
    """
    return _evicting(
        "expected_attention", "expected", keep, options, future=future, epsilon=epsilon
    )


def kvzip(
    keep: Budget = 0.5, *, replay: Replay | None = None, **options: Unpack[Options]
) -> CompressionPolicy:
    """KVzip (arXiv:2505.23416): the largest attention that a token gets while the model goes over
    the prompt again; one threshold for the heads of all layers. Decides once, after the first
    prompt of a request: what comes later stays.

    `replay` says in which words the model is asked to repeat the prompt
    (`diffkv_jax.replay_words`), and in which chunks.
    """
    return _evicting("kvzip", "replay", keep, options, replay=replay, pooled=0.0, layers="pooled")


def fastgen(
    recover: Threshold = 0.95,
    *,
    punctuation: tuple[int, ...] = (),
    frequent: float = 0.3,
    local: float = 0.3,
    observe: int = 64,
    **options: Unpack[Options],
) -> CompressionPolicy:
    """FastGen (arXiv:2310.01801): each head picks the cheapest of five unions of token classes that
    holds `recover` of its attention.

    Give the ids of `diffkv_jax.policy.protect.token_classes(tokenizer)` as `protect` and
    `punctuation`; sinks count as protected.
    """
    chosen: dict[str, Any] = {
        "recover": recover,
        "punctuation": punctuation,
        "frequent": frequent,
        "local": local,
        "group": "mean",
    }
    return _evicting("fastgen", "attention_sum", None, options, observe=observe, **chosen)


def random_eviction(keep: Budget = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """Tokens picked by a hash of position and head: the baseline that every table needs."""
    return _evicting("random_eviction", "random", keep, options)


def minicache(
    start: float = 0.5,
    t: float = 0.6,
    retention: float = 0.05,
    *,
    inner: str = "full",
    window: int = 64,
    flush: int = 32,
    rotate: bool = False,
) -> CompressionPolicy:
    """MiniCache (arXiv:2405.14366): from the share `start` of the layers on, pairs of them keep one
    direction for a token of both.

    `inner` stores directions, the tokens of the layers before, and the share `retention` of tokens
    that differ too much to be merged.
    """
    inner = named_format(inner, inner=inner)
    return CompressionPolicy(
        "minicache",
        (inner,),
        window=window,
        flush=flush,
        rotate=rotate,
        merge=Merge(start, t, retention),
    )


def ada_kv(policy: CompressionPolicy, floor: float = 0.2) -> CompressionPolicy:
    """Ada-KV (arXiv:2407.11550) over a policy with budgets: the KV heads of a layer share them,
    each keeps at least `floor` of its own.

    Raises:
        TypeError: it is no policy.
        ValueError: the policy has thresholds instead.
    """
    instance("policy", policy, CompressionPolicy, "diffkv_jax.load_policy makes one of a name")
    floor = number("floor", floor, least=0, most=1)
    if policy.keep is None:
        raise ValueError(
            f"ada_kv needs a policy with keep=, given {policy.name!r} with "
            f"thresholds, which are adaptive already"
        )
    return dataclasses.replace(policy, name=f"ada_kv({policy.name})", pooled=floor)


def _evicting(
    name: str, score: Score, keep: Budget | None, options: Options, **choices: Any
) -> CompressionPolicy:
    """Exact tiers and four protected sinks unless the options say otherwise."""
    given: dict[str, Any] = {"tiers": ("full",), "sinks": 4} | choices | options
    return CompressionPolicy(name, score=score, keep=keep, **given)


METHODS = (
    diffkv,
    turboquant,
    kivi,
    gear,
    coupled_quantization,
    kvquant,
    streaming_llm,
    h2o,
    tova,
    snapkv,
    pyramidkv,
    pyramidinfer,
    key_norm,
    key_difference,
    expected_attention,
    kvzip,
    fastgen,
    random_eviction,
    minicache,
)
