"""`Calibration`: the arrays that learned codecs need, bound to the model they were learned from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from diffkv_jax.cache import CacheSpec, Tables, table_shapes
from diffkv_jax.model_protocol import CausalLM
from diffkv_jax.policy import CompressionPolicy

SAMPLED = 4096  # numbers of each parameter array that the fingerprint looks at


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` learned: it serves every policy with the same tiers and transforms on the same model.

    Attributes:
        tables: float16 or bfloat16 NumPy arrays `[L, K, ...]` of K and V in each tier, None where a codec learns nothing; L paged
            layers, K KV heads.
        tiers, un_rope, rotate: those of the policy.
        fingerprint: of the model, see `fingerprint`.
    """

    tables: Tables
    tiers: tuple[str, ...]
    un_rope: bool
    rotate: bool
    fingerprint: str

    def check(self, model: CausalLM, params: Mapping[str, Any]) -> None:
        """Refuse another model or other parameters.

        Raises:
            ValueError: they are not those that it was made with.
        """
        if self.fingerprint != fingerprint(model, params):
            raise ValueError("the calibration was made with another model or other parameters: calibrate with this one")

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write it as an Orbax checkpoint folder."""
        names = {"tiers": list(self.tiers), "un_rope": self.un_rope, "rotate": self.rotate, "fingerprint": self.fingerprint}
        ocp.save(str(Path(path).expanduser().absolute()), _named(self.tables), overwrite=overwrite, custom_metadata=names)

    @staticmethod
    def load(path: str | Path) -> "Calibration":
        """What `save` wrote.

        Raises:
            ValueError: there is no readable calibration at `path`.
        """
        folder = str(Path(path).expanduser().absolute())
        try:
            found = ocp.metadata(folder)
            arrays = {name: np.asarray(array) for name, array in ocp.load(folder).items()}
            names: Any = found.custom_metadata
            tiers = tuple(names["tiers"])
            tables = tuple((arrays.get(f"{i}.key"), arrays.get(f"{i}.value")) for i in range(len(tiers)))
            return Calibration(tables, tiers, names["un_rope"], names["rotate"], names["fingerprint"])
        except Exception as error:  # Orbax meets a damaged folder as many exception types
            raise ValueError(f"{path} must be a folder that Calibration.save wrote ({type(error).__name__}): calibrate again") from error


def _named(tables: Tables) -> dict[str, Any]:
    parts = {f"{i}.{part}": array for i, pair in enumerate(tables) for part, array in zip(("key", "value"), pair, strict=True)}
    return {name: np.asarray(array) for name, array in parts.items() if array is not None}


def tables_for(spec: CacheSpec, policy: CompressionPolicy, calibration: Calibration | None) -> Tables | None:
    """The arrays that a new cache gets; None where nothing is learned.

    Raises:
        ValueError: something is learned and there is no calibration, or that of other tiers, transforms or geometry; or one for nothing.
    """
    shapes = table_shapes(spec)
    learns = any(shape is not None for pair in shapes for shape in pair)
    if learns and calibration is None:
        raise ValueError(
            f"policy {policy.name!r} has learned codecs {policy.tiers}: make their tables with "
            "calibration = diffkv_jax.calibrate(model, params, tokens, policy) and give calibration="
        )
    if calibration is None:
        return None
    if not learns:
        raise ValueError(f"policy {policy.name!r} has no learned codec: leave calibration= out")
    for field in ("tiers", "un_rope", "rotate"):
        learned, given = getattr(calibration, field), getattr(policy, field)
        if learned != given:
            raise ValueError(f"the calibration was made for {field}={learned!r}, policy {policy.name!r} has {given!r}: calibrate with it")
    if (found := tuple(tuple(x if x is None else x.shape for x in pair) for pair in calibration.tables)) != shapes:
        raise ValueError(f"the calibration's arrays have shapes {found}, the cache needs {shapes}: calibrate with this model and policy")
    return calibration.tables


def fingerprint(model: CausalLM, params: Mapping[str, Any]) -> str:
    """A hash of the attention geometry, of the parameters' names and shapes and of evenly spaced numbers of each, as bfloat16.

    The same model loaded in another dtype has the same one.
    """
    digest = hashlib.sha256(repr(replace(model.attention, dtype="")).encode())
    for (path, leaf), sample in zip(jax.tree_util.tree_leaves_with_path(params), _sampled(params), strict=True):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode())
        digest.update(np.asarray(sample).tobytes())
    return digest.hexdigest()


@jax.jit
def _sampled(params: Mapping[str, Any]) -> list[jax.Array]:
    """Evenly spaced numbers of each array, without flattening it: the flat copy of a large one would be large."""

    def sample(leaf: jax.Array) -> jax.Array:
        index = np.unravel_index(np.linspace(0, leaf.size - 1, min(SAMPLED, leaf.size)).astype(np.int64), leaf.shape)
        return jax.lax.bitcast_convert_type(leaf[index].astype(jnp.bfloat16), jnp.uint16)

    return [sample(leaf) for leaf in jax.tree.leaves(params)]
