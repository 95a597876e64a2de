"""`Calibration`: the arrays that learned codecs need, bound to the model they were learned from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from diffkv_jax.arguments import WrongType, file_path, flag, instance, refuse, shown, text, tuple_of
from diffkv_jax.cache.cache import Tables, table_shapes
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.affine import maps_of, with_maps
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.stage import from_mapping, to_mapping
from diffkv_jax.policy.transform import Transform

SAMPLED = 4096  # numbers of each parameter array that the fingerprint looks at


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` learned, for every policy with the same tiers, transforms and model.

    Attributes:
        tables: float16 or bfloat16 NumPy arrays `[L, K, ...]` of K and V in each tier, None where a
            codec learns nothing; L paged layers, K KV heads.
        tiers, transform: those of the policy.
        fingerprint: of the model, see `fingerprint`.
        maps: what the transform has learned, float32 `[L, K, head_dim]` or `[L, K, head_dim,
            head_dim]`, as its fields come.
    """

    tables: Tables
    tiers: tuple[str, ...]
    transform: Transform
    fingerprint: str
    maps: tuple[np.ndarray, ...] = ()

    def __post_init__(self):
        rule = "a pair of arrays or None, of K and V, for each tier"
        tables = tuple_of("tables", self.tables, _pair, rule)
        tiers = tuple_of("tiers", self.tiers, text, "a list of format names such as ['K8v4V8v4']")
        if len(tables) != len(tiers):
            raise ValueError(
                f"tables hold {len(tables)} pairs, and tiers={tiers} are {len(tiers)}: give one "
                "for each"
            )
        transform = from_mapping("transform", self.transform, Transform)
        maps = tuple_of("maps", self.maps, _map, "a list of arrays")
        found = (tables, tiers, transform, text("fingerprint", self.fingerprint), maps)
        for field, value in zip(fields(self), found, strict=True):
            object.__setattr__(self, field.name, value)

    @cached_property
    def digest(self) -> str:
        """A hash of all that was learned."""
        found = hashlib.sha256()
        for array in jax.tree.leaves((self.tables, self.maps)):
            found.update(np.asarray(array).tobytes())
        return found.hexdigest()

    def check(self, model: CausalLM, params: Mapping[str, Any]) -> None:
        """Refuse another model or other parameters.

        Raises:
            TypeError: they are no model or no parameters.
            ValueError: they are not those that it was made with.
        """
        instance("model", model, CausalLM, "load_pretrained returns one")
        leaves = jax.tree.leaves(params) if isinstance(params, Mapping) else [None]
        if not all(hasattr(leaf, "dtype") for leaf in leaves):
            raise WrongType(
                f"params={shown(params)} must be the model's parameters: nested mappings of arrays"
            )
        if self.fingerprint != fingerprint(model, params):
            raise ValueError(
                "the calibration was made with another model or other parameters: calibrate with "
                "this one"
            )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write it as an Orbax checkpoint folder.

        Raises:
            TypeError: `path` is no path.
            ValueError: it cannot be written there, or something is there and `overwrite` is not
                given.
        """
        folder, overwrite = file_path("path", path), flag("overwrite", overwrite)
        if folder.is_file() or (folder.exists() and not overwrite):
            raise ValueError(
                f"path={str(folder)!r} is there already: "
                f"{'take another' if folder.is_file() else 'give overwrite=True'}"
            )
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse("path", str(path), f"a folder that can be made ({error})")
        names = {
            "tiers": list(self.tiers),
            "transform": to_mapping(self.transform),
            "fingerprint": self.fingerprint,
            "maps": len(self.maps),
        }
        target, arrays = str(folder.absolute()), _named(self.tables)
        arrays |= {f"map.{i}": np.asarray(x) for i, x in enumerate(self.maps)}
        ocp.save(target, arrays, overwrite=overwrite, custom_metadata=names)

    @staticmethod
    def load(path: str | Path) -> "Calibration":
        """What `save` wrote.

        Raises:
            TypeError: `path` is no path.
            ValueError: there is no readable calibration at `path`.
        """
        folder = str(file_path("path", path).absolute())
        try:
            found = ocp.metadata(folder)
            arrays = {name: np.asarray(array) for name, array in ocp.load(folder).items()}
            names: Any = found.custom_metadata
            tiers = tuple(names["tiers"])
            tables = [(arrays.get(f"{i}.key"), arrays.get(f"{i}.value")) for i in range(len(tiers))]
            maps = tuple(arrays[f"map.{i}"] for i in range(names.get("maps", 0)))
            return Calibration(tuple(tables), tiers, names["transform"], names["fingerprint"], maps)
        except Exception as error:  # Orbax meets a damaged folder as many exception types
            raise ValueError(
                f"path={str(path)!r} must be a folder that Calibration.save wrote "
                f"({type(error).__name__}): calibrate again"
            ) from error


def _pair(name: str, value: Any) -> tuple:
    if not isinstance(value, tuple | list) or len(value) != 2:
        refuse(name, value, "a pair", True)
    first, second = value
    for table in (first, second):
        if table is not None and not isinstance(table, np.ndarray | jax.Array):
            refuse(name, table, "an array or None", True)
    return first, second


def _map(name: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray | jax.Array):
        refuse(name, value, "an array", True)
    return value


def _named(tables: Tables) -> dict[str, Any]:
    parts = {
        f"{i}.{part}": array
        for i, pair in enumerate(tables)
        for part, array in zip(("key", "value"), pair, strict=True)
    }
    return {name: np.asarray(array) for name, array in parts.items() if array is not None}


def learned_codecs(spec: CacheSpec) -> bool:
    """Whether a codec learns something."""
    return any(shape is not None for pair in table_shapes(spec) for shape in pair)


def learned_for(
    spec: CacheSpec, policy: CompressionPolicy, calibration: Calibration | None
) -> tuple[Tables | None, Transform]:
    """The arrays that a new cache gets (None where no codec learns), and the policy's transform
    with what it has learned.

    Raises:
        ValueError: something is learned and there is no calibration, or that of other tiers,
            transforms or geometry; or one for nothing.
    """
    shapes, codecs = table_shapes(spec), learned_codecs(spec)
    learns = f"learned codecs {policy.tiers}" if codecs else f"transform={policy.transform}"
    if calibration is None:
        if codecs or policy.transform.learned:
            raise ValueError(
                f"policy {policy.name!r} has {learns}: make what is learned with calibration = "
                "diffkv_jax.calibrate(model, params, tokens, policy) and give calibration="
            )
        return None, policy.transform
    if not codecs and not policy.transform.learned:
        raise ValueError(
            f"policy {policy.name!r} has no learned codec or transform: leave calibration= out"
        )
    for field in ("tiers", "transform"):
        learned, given = getattr(calibration, field), getattr(policy, field)
        if learned != given:
            raise ValueError(
                f"the calibration was made for {field}={learned!r}, policy {policy.name!r} has "
                f"{given!r}: calibrate with it"
            )
    tables = calibration.tables
    found = tuple(tuple(x if x is None else x.shape for x in pair) for pair in tables)
    if found != shapes:
        raise ValueError(
            f"the calibration's arrays have shapes {found}, the cache needs {shapes}: calibrate "
            "with this model and policy"
        )
    return tables if codecs else None, _with_maps(spec, policy.transform, calibration.maps)


def _with_maps(spec: CacheSpec, transform: Transform, maps: tuple) -> Transform:
    shape = (len(spec.paged_layers), spec.attention.num_kv_heads, spec.attention.head_dim)
    found, wanted = [np.shape(x) for x in maps], len(maps_of(transform))
    known = (shape, (*shape, shape[-1]))
    if len(found) != wanted or not all(one in known for one in found):
        raise ValueError(
            f"the calibration's maps have shapes {found}, transform={transform} needs {wanted} of "
            f"{shape} or {known[1]}: calibrate with this model and policy"
        )
    exact = spec.attention.dtype == "float32"
    kept = (x if exact or np.ndim(x) == 3 else np.asarray(x, np.float16) for x in maps)
    return with_maps(transform, list(kept))


def fingerprint(model: CausalLM, params: Mapping[str, Any]) -> str:
    """A hash of the attention geometry, of the parameters' names and shapes and of evenly spaced
    numbers of each, as bfloat16.

    The same model loaded in another dtype has the same one.
    """
    digest = hashlib.sha256(repr(replace(model.attention, dtype="")).encode())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), sample in zip(leaves, _sampled(params), strict=True):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}".encode())
        digest.update(np.asarray(sample).tobytes())
    return digest.hexdigest()


@jax.jit
def _sampled(params: Mapping[str, Any]) -> list[jax.Array]:
    """Evenly spaced numbers of each array, without flattening it: that would copy it whole."""

    def sample(leaf: jax.Array) -> jax.Array:
        index = np.unravel_index(
            np.linspace(0, leaf.size - 1, min(SAMPLED, leaf.size)).astype(np.int64), leaf.shape
        )
        return jax.lax.bitcast_convert_type(leaf[index].astype(jnp.bfloat16), jnp.uint16)

    return [sample(leaf) for leaf in jax.tree.leaves(params)]
