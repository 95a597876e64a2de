"""What a fitted policy is to reach."""

from typing import TYPE_CHECKING, Any, NamedTuple

from diffkv_jax.arguments import number, one_of
from diffkv_jax.choice.automatic import PRESETS
from diffkv_jax.model import AttentionSpec
from diffkv_jax.units import parse_bytes

if TYPE_CHECKING:
    from diffkv_jax.fitting.measure import Measured


class Goal(NamedTuple):
    """As small a KL as fits into `share` of a bfloat16 cache's bytes, or, if None, as few bytes as
    give a mean KL of at most `target_kl`.
    """

    share: float | None
    target_kl: float | None

    def met(self, found: "Measured") -> bool:
        if self.share is not None:
            return found.share <= self.share
        return self.target_kl is not None and found.mean_kl <= self.target_kl

    def cost(self, found: "Measured") -> float:
        return found.mean_kl if self.share is not None else found.share

    def excess(self, found: "Measured") -> float:
        """What must come down for the goal to be met."""
        return found.share if self.share is not None else found.mean_kl

    def asked(self) -> dict[str, float]:
        """The one that is given, by its name."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def order(self, found: "Measured") -> tuple[bool, float]:
        """What meets the goal first, by cost; what does not by how near it comes."""
        met = self.met(found)
        return not met, self.cost(found) if met else self.excess(found)


def goal_of(
    attention: AttentionSpec,
    share: Any,
    memory_budget: Any,
    target_kl: Any,
    context: int,
    requests: int = 1,
) -> Goal:
    """The goal that is given, for `requests` of `context` tokens each; "balanced" if none is.

    Raises:
        TypeError, ValueError: more than one is, or it is no share, amount of memory or KL.
    """
    given = {"share": share, "memory_budget": memory_budget, "target_kl": target_kl}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} are given, and one of them is the goal: take one")
    if memory_budget is not None:
        tokens = requests * sum(min(w or context, context) for w in attention.sliding_windows)
        channels = attention.num_kv_heads * attention.head_dim * (2 - bool(attention.latent))
        share = min(parse_bytes(memory_budget) / (2 * channels * tokens), 1.0)
    if share is not None:
        return Goal(number("share", share, above=0, most=1), None)
    target_kl = "balanced" if target_kl is None else target_kl
    if isinstance(target_kl, str):
        target_kl = PRESETS[one_of("target_kl", target_kl, (*PRESETS,))]
    return Goal(None, number("target_kl", target_kl, above=0))
