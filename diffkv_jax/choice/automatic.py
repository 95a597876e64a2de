"""`policy="auto"`: what `fit_policy` finds for a model, once, and what is kept of it."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from diffkv_jax.arguments import flag, instance, number, refuse
from diffkv_jax.calibration.automatic import fitted
from diffkv_jax.calibration.calibrate import USUAL
from diffkv_jax.calibration.calibration import Calibration, fingerprint
from diffkv_jax.calibration.kept import Kept, kept_name, read_for
from diffkv_jax.calibration.sample_text import SampleText
from diffkv_jax.calibration.usual import with_usual
from diffkv_jax.choice.fitted import FittedPolicy
from diffkv_jax.inputs import as_policy
from diffkv_jax.methods.registry import AUTO, FITTED, PRESETS
from diffkv_jax.model import CausalLM
from diffkv_jax.pallas_kernels.native.build import cache_directory
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.units import parse_bytes

FILLED = 0.9  # of a pool that never grows: some texts take 5 % more bytes than those of a fit
LEAST = 256  # tokens of context that bytes are told for
VERSION = 4  # of the text, the candidates and the search: raised where one of them changes
CALIBRATE = "calibrate(model, params, tokens, policy) makes it"

_known: Kept[FittedPolicy] = Kept()
_fits: list[Callable[..., FittedPolicy]] = []


def fits_policies(fit: Callable[..., FittedPolicy]) -> Callable[..., FittedPolicy]:
    """Name the function that finds what "auto" asks for. It stands above all that asks."""
    _fits[:] = [fit]
    return fit


def check_no_calibration(calibration: Any) -> None:
    """Refuse one beside a policy that is or will be fitted (ValueError)."""
    if calibration is not None:
        raise ValueError("a fitted policy has a calibration of its own: leave calibration= out")


class Choice(NamedTuple):
    """A policy, what it has learned, and whether it was fitted to the model."""

    policy: CompressionPolicy
    calibration: Calibration | None
    measured: bool


@dataclass(frozen=True)
class AutoPolicy:
    """A policy that `fit_policy` is to choose on the model's built-in text, kept in the folder
    `policies` of $DIFFKV_JAX_CACHE (else diffkv_jax in the user's cache folder). "auto" stands for
    `AutoPolicy()`, "quality", "balanced" and "small" for `AutoPolicy(target_kl=...)` of that name.

    Attributes:
        share, target_kl, drop: as `fit_policy` has them. Without share and target_kl a
            `memory_budget=` of the call is the goal, or else "balanced". Of that budget a tenth
            is left to texts that take more.
    """

    share: float | None = None
    target_kl: float | str | None = None
    drop: bool = True

    def __post_init__(self) -> None:
        if self.share is not None and self.target_kl is not None:
            raise ValueError(
                f"share={self.share} and target_kl={self.target_kl!r} are two goals: take one"
            )
        share = number("share", self.share, above=0, most=1, optional=True)
        target_kl = self.target_kl
        if not (isinstance(target_kl, str) and target_kl in PRESETS):
            rule = f"a mean KL in nats, or one of {list(PRESETS)}"
            target_kl = number("target_kl", target_kl, above=0, optional=True, rule=rule)
        found = {"share": share, "target_kl": target_kl, "drop": flag("drop", self.drop)}
        for name, value in found.items():
            object.__setattr__(self, name, value)


def asks_for_fit(policy: Any) -> bool:
    """Whether it is "auto", a preset or an `AutoPolicy`."""
    return isinstance(policy, AutoPolicy) or (isinstance(policy, str) and policy in FITTED)


def as_auto(policy: Any) -> AutoPolicy:
    """What asks for a fit, as what it asks for."""
    if isinstance(policy, AutoPolicy):
        return policy
    return AutoPolicy() if policy == AUTO else AutoPolicy(target_kl=policy)


def chosen(
    model: CausalLM,
    params: Mapping[str, Any],
    policy: Any,
    calibration: Any = None,
    *,
    memory_budget: int | str | None = None,
    context: int | None = None,
    requests: int = 1,
) -> Choice:
    """The policy that a user means, for requests of `context` tokens.

    Raises:
        TypeError, ValueError: it is no policy; a calibration of something else; "auto" for a model
            without the built-in text.
    """
    if asks_for_fit(policy) or isinstance(policy, FittedPolicy):
        check_no_calibration(calibration)
    if asks_for_fit(policy):
        policy = _fitted(model, params, as_auto(policy), memory_budget, context, requests)
    elif isinstance(policy, FittedPolicy):
        policy.check(model, params)
    if isinstance(policy, FittedPolicy):
        return Choice(policy.policy, policy.calibration, measured=True)
    policy = as_policy(policy)
    if calibration is None and isinstance(getattr(model, "text", None), SampleText):
        policy = with_usual(policy, model.attention)
    if calibration is None:
        return Choice(policy, fitted(model, params, policy), measured=False)
    instance("calibration", calibration, Calibration, CALIBRATE).check(model, params)
    return Choice(policy, calibration, measured=False)


def _fitted(
    model: CausalLM,
    params: Mapping[str, Any],
    auto: AutoPolicy,
    memory_budget: int | str | None,
    context: int | None,
    requests: int,
) -> FittedPolicy:
    """Kept in this process, else on disk, else found now."""
    if not isinstance(getattr(model, "text", None), SampleText):
        refuse(
            "policy",
            AUTO,
            "the name of a policy where the model has no text to choose one by "
            "(load_pretrained gives it one): or call fit_policy(model, params, tokens)",
        )
    goal: dict[str, Any] = asdict(auto)
    if auto.share is None and auto.target_kl is None and memory_budget is not None:
        goal |= {"memory_budget": int(FILLED * parse_bytes(memory_budget)), "requests": requests}
    # one fit for nearly equal lengths; without a share bytes decide nothing
    by_bytes = auto.share is not None or "memory_budget" in goal
    goal["context"] = _rounded_up(
        model.attention.max_position_embeddings, context if by_bytes else None
    )
    what = json.dumps([VERSION, goal], sort_keys=True)
    name = kept_name(fingerprint(model, params), what)

    def make() -> FittedPolicy:
        return _fits[0](model, params, progress=sys.stderr.isatty(), **goal)

    folder = cache_directory() / "policies" / name
    return _known.get(folder, read_for(model, params, FittedPolicy.load), make)


def _rounded_up(most: int, tokens: int | None) -> int:
    """A power of two for nearly equal lengths; None: the usual one."""
    tokens = USUAL if tokens is None else max(tokens, LEAST)
    return min(1 << (tokens - 1).bit_length(), most)
