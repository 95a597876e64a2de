"""`policy_of`: a policy as a command line spells it."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffkv_jax import methods
from diffkv_jax.arguments import nearest, shown
from diffkv_jax.choice.automatic import AutoPolicy, as_auto, asks_for_fit
from diffkv_jax.choice.fitted import FILE, FittedPolicy
from diffkv_jax.methods.registry import AUTO, load_policy
from diffkv_jax.policy import affine, learned, transform
from diffkv_jax.policy.policy import CompressionPolicy

_TRANSFORMS = (
    affine.Balanced,
    affine.Centered,
    affine.Chain,
    affine.even_channels,
    learned.Learned,
    transform.Exact,
    transform.Hadamard,
    transform.Usual,
    transform.WithoutRope,
)
_METHODS = [getattr(methods, name) for name in methods.__all__ if name.islower()]
CALLED: dict[str, Callable[..., Any]] = {
    "none": CompressionPolicy.none,
    AUTO: AutoPolicy,
    **{make.__name__: make for make in (*_METHODS, *_TRANSFORMS)},
}


Given = CompressionPolicy | AutoPolicy | FittedPolicy


def policy_of(spelled: str) -> Given:
    """What `load_policy` takes as text, a call such as "diffkv(1, 0, transform=Hadamard())",
    "auto", "balanced" or "auto(share=0.3)", or a folder that `FittedPolicy.save` wrote.

    A call is a method, "none" or "auto", with literals, methods and transforms as arguments;
    nothing else is run.

    Raises:
        ValueError: it is neither; arguments that do not fit.
    """
    if asks_for_fit(spelled.strip()):
        return as_auto(spelled.strip())
    if (Path(spelled) / FILE).is_file():
        return FittedPolicy.load(spelled)
    if "(" not in spelled or spelled.endswith(".json"):
        return load_policy(spelled)
    try:
        found = _value(ast.parse(spelled.strip(), mode="eval").body)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"policy {shown(spelled)}: {error}") from error
    if not isinstance(found, CompressionPolicy | AutoPolicy):
        raise ValueError(
            f"policy {shown(spelled)} must be a call of a method, such as diffkv(1, 0), and is of a"
            f" {type(found).__name__}: give it as an argument, diffkv(1, 0, transform=...)"
        )
    return found


def _value(node: ast.expr) -> Any:
    """A literal, or a call of one of `CALLED` with such values; tuples and lists may hold calls."""
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_value(entry) for entry in node.elts)
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in CALLED:
        raise ValueError(f"{name} must be one of {sorted(CALLED)}{nearest([name], CALLED)}")
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"{name}(...) must name its arguments: write out what ** stands for")
    given = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    return CALLED[name](*[_value(argument) for argument in node.args], **given)
