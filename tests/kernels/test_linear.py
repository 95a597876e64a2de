"""Products of a few rows with stacked weights, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.linear import linear, sum_of_rows
from diffkv_jax.pallas_kernels.native.build import why_unavailable

LAYERS, WIDTH = 3, 70  # no multiple of a vector
# of x and the weights
TYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]
KERNELS = [Kernels("xla")] + ([] if why_unavailable() else [Kernels("cpu")])


def inputs(
    rows: int, columns: int, dtype: str, weights_dtype: str, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows)
    shape = (LAYERS, columns, WIDTH) if transposed else (LAYERS, WIDTH, columns)
    return jnp.asarray(rng.normal(size=(rows, 1, WIDTH)), dtype), jnp.asarray(
        rng.normal(size=shape), weights_dtype
    )


def exact(x: jax.Array, w: jax.Array, layer: int, transposed: bool) -> np.ndarray:
    return np.einsum(
        "rti,oi->rto" if transposed else "rti,io->rto",
        np.asarray(x, np.float64),
        np.asarray(w[layer], np.float64),
    )


@pytest.mark.daily(4)
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.implementation)
@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("rows", [1, 3, 8, 15, 33, 600])
def test_equals_float64(rows: int, types: tuple[str, str], kernels: Kernels):
    for columns, transposed in [(150, False), (16, False), (5, False), (131, True)]:
        x, w = inputs(rows, columns, *types, transposed)
        stacked = jax.jit(
            lambda x, w, t=transposed: linear(
                x, [w, w[:, ::-1]], jnp.int32(1), transposed=t, dtype="float32", kernels=kernels
            )
        )
        got = stacked(x, w)
        alone = linear(x, [w[1]], transposed=transposed, dtype="float32", kernels=kernels)[0]
        for y in (got[0], alone):
            np.testing.assert_allclose(y, exact(x, w, 1, transposed), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(
            got[1], exact(x, w[:, ::-1], 1, transposed), rtol=1e-5, atol=1e-4
        )
        with pytest.raises(AssertionError):  # the comparison sees another layer
            np.testing.assert_allclose(got[0], exact(x, w, 2, transposed), rtol=1e-5, atol=1e-4)


@pytest.mark.daily(4)
@pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("width", [WIDTH, 69, 640])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("types", [*TYPES, ("bfloat16", "float32")], ids="-".join)
def test_a_row_does_not_depend_on_the_others(types: tuple[str, str], transposed: bool, width: int):
    """Bit for bit, on both sides of every number of rows at which the kernel goes another way."""
    columns = 83  # one panel of 64 columns, a vector of 16 and three more
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(600, width)), types[0])
    w = jnp.asarray(rng.normal(size=(columns, width) if transposed else (width, columns)), types[1])

    def product(x: jax.Array) -> np.ndarray:
        return np.asarray(
            linear(x, [w], transposed=transposed, dtype="float32", kernels=Kernels("cpu"))[0]
        )

    together = product(x)
    for first, rows in [(0, 1), (599, 1), (3, 2), (7, 8), (100, 31), (50, 32), (50, 33), (90, 510)]:
        np.testing.assert_array_equal(
            product(x[first : first + rows]), together[first : first + rows], err_msg=f"{rows} rows"
        )
    assert (product(x[:, ::-1])[0] != together[0]).any(), "the comparison sees another order"


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.implementation)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_rows(dtype: str, kernels: Kernels):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 11, 150)) ** 2, dtype)
    together = np.asarray(sum_of_rows(x, kernels=kernels))
    np.testing.assert_allclose(together[..., 0], np.asarray(x, np.float64).sum(axis=-1), rtol=1e-6)
    if kernels.implementation == "cpu":
        np.testing.assert_array_equal(sum_of_rows(x[1, 4:5], kernels=kernels), together[1, 4:5])


def test_results_have_the_rows_type():
    x, w = inputs(2, 16, "bfloat16", "bfloat16", False)
    for kernels in KERNELS:
        assert linear(x, [w], jnp.int32(0), kernels=kernels)[0].dtype == jnp.bfloat16


@pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_that_does_not_exist_is_refused(layer: int):
    x, w = inputs(2, 16, "float32", "float32", False)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="layer outside"):
        jax.block_until_ready(linear(x, [w], jnp.int32(layer), kernels=Kernels("cpu")))
