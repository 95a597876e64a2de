"""What all methods that evict tokens have in common: their options."""

from typing import Any, TypedDict, Unpack

from diffkv_jax.arguments import token_ids
from diffkv_jax.policy.keep import Keep
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.protect import Protect
from diffkv_jax.policy.schedule import Schedule
from diffkv_jax.policy.score import Score
from diffkv_jax.policy.transform import Transform


class Options(TypedDict, total=False):
    """What every method with a budget (and `fastgen`) takes beside it. By default what stays is
    exact, and so are the 64 most recent tokens; the first four always stay.
    """

    tiers: tuple[str, ...]
    window: int
    flush: int
    group: int | None
    sinks: int
    protect: tuple[int, ...]  # token ids
    transform: Transform


def evicting(name: str, score: Score, keep: Keep, **options: Unpack[Options]) -> CompressionPolicy:
    """The policy of a method that ranks tokens by `score` and keeps what `keep` says."""
    given: dict[str, Any] = {"sinks": 4} | options
    given["protect"] = token_ids("protect", given.get("protect", ()))
    return CompressionPolicy(
        name,
        score=score,
        keep=keep,
        protect=Protect(**_taken(given, sinks="sinks", protect="token_ids")),
        schedule=Schedule(**_taken(given, window="window", flush="flush", group="group")),
        **given,
    )


def _taken(options: dict[str, Any], **fields: str) -> dict[str, Any]:
    """Those `options` (removed) that are fields of a stage, by the names that it has for them."""
    return {new: options.pop(old) for old, new in fields.items() if old in options}
