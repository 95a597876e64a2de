"""Bytes that Pallas kernels move between device memory and the cores, counted from their jaxprs
without running them.

A kernel is walked by abstract execution. What the caller gives as NumPy arrays (page tables,
lengths, layer index) and what follows from it is computed; everything else is a shape. So loops run
as often as they would, branches are those that would be taken, and each access of device memory
counts as it would happen:

- Triton: the elements that a load, store or atomic touches where its mask is set, those that lanes
  of one access share once. Equal loads in one straight piece of code without a store between are
  one load, as the compiler merges them (seen in its PTX). Caches are not modelled: two loads are
  two reads.
- Mosaic TPU: every DMA between HBM and the core; a block of a `BlockSpec` each time its index
  differs from the step before; the operands of scalar prefetch once.

XLA operations around the kernels are not counted.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import jax
import numpy as np

from benchmarks.roofline.traffic_access import UNKNOWN, Accesses, Unknown
from benchmarks.roofline.traffic_call import KernelTraffic, Traffic, walk_call
from benchmarks.roofline.traffic_values import (
    EVALUATE,
    Memory,
)

Sample = Callable[[str, tuple[int, ...]], Iterable[tuple[tuple[int, ...], float]]]
_KEEP_NAME = {
    "reshape",
    "bitcast_convert_type",
    "convert_element_type",
    "broadcast_in_dim",
    "squeeze",
    "slice",
    "transpose",
    "copy",
}
_NOTHING = set(
    "dma_wait semaphore_wait semaphore_signal debug_barrier_p debug_barrier debug_print "
    "debug_callback delay trace_value".split()
)
_SAME = set(
    "multiple_of max_contiguous with_memory_space_constraint copy copy_p stop_gradient "
    "optimization_barrier".split()
)
LARGEST_KNOWN = 1 << 16  # elements of a computed value inside a kernel; larger ones are shapes only


def count_traffic(function: Callable, *arguments: Any, sample: Sample | None = None) -> Traffic:
    """Count what the kernels of `function(*arguments)` move.

    Args:
        function: traceable by `jax.make_jaxpr`.
        arguments: pytrees; NumPy arrays are known, `jax.ShapeDtypeStruct` are not. Operands are
            named after the function's parameters.
        sample: `(kernel name, grid) -> (grid point, weight), ...`: the programs of a Triton kernel
            that are walked, each counting `weight` times; all by default. TPU kernels are walked
            whole, because a grid step may depend on the one before.

    Raises:
        ValueError: how often a loop runs depends on data that was not given.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    jaxpr = jax.make_jaxpr(function)(*shapes)
    parameters = list(inspect.signature(function).parameters)
    parameters += [f"argument {i}" for i in range(len(parameters), len(arguments))]
    walk = _Walk(sample)
    leaves = []
    for parameter, argument in zip(parameters, arguments, strict=False):
        for path, leaf in jax.tree_util.tree_flatten_with_path(argument)[0]:
            # a view: the same array twice is two arguments
            known = leaf.view() if isinstance(leaf, np.ndarray) else None
            leaves.append(walk.named(known, parameter + jax.tree_util.keystr(path)))
    with np.errstate(all="ignore"):
        outputs = walk.run(jaxpr.jaxpr, jaxpr.consts, leaves)
    walk.traffic.results = {walk.name_of(x, "") for x in outputs}
    return walk.traffic


class _Walk(Accesses):
    """Abstract execution of one function. Values are NumPy arrays and scalars, `Memory` (a Ref), or
    `Unknown`.
    """

    def __init__(self, sample: Sample | None):
        super().__init__()
        self.sample = sample
        self.names: dict[int, tuple[Any, str]] = {}  # of values outside of kernels, by identity
        self.program: tuple[int, ...] = ()
        self.used: dict[int, tuple[Any, set]] = {}  # variables of each jaxpr that something reads

    def named(self, value: Any, name: str) -> Any:
        """A value outside of kernels (None: an unknown one), whose name is remembered."""
        value = Unknown() if value is None else value
        self.names[id(value)] = (value, name)
        return value

    def name_of(self, value: Any, default: str) -> str:
        """The name of a value outside of kernels."""
        return self.names.get(id(value), (None, default))[1]

    def run(self, jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """The outputs of a jaxpr."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(
            zip(jaxpr.invars, arguments, strict=True)
        )

        def value_of(atom) -> Any:
            return atom.aval.dtype.type(atom.val) if hasattr(atom, "val") else values[atom]

        if id(jaxpr) not in self.used:
            read = {
                x
                for atoms in (jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
                for x in atoms
                if not hasattr(x, "val")
            }
            self.used[id(jaxpr)] = (jaxpr, read)
        used = self.used[id(jaxpr)][1]
        for eqn in jaxpr.eqns:
            inputs = [value_of(x) for x in eqn.invars]
            self.live = bool(eqn.outvars) and eqn.outvars[0] in used
            method = getattr(self, f"_{eqn.primitive.name}", None)
            outputs = (method or self._other)(eqn, inputs)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [value_of(x) for x in jaxpr.outvars]

    def _other(self, eqn, inputs: list[Any]) -> list[Any]:
        """A primitive without memory: computed when all of its inputs are known, walked into when
        it is a call.
        """
        name, params = eqn.primitive.name, eqn.params
        if name in _NOTHING:
            return [UNKNOWN] * len(eqn.outvars)
        if name in _SAME:
            return inputs[: len(eqn.outvars)]
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in params:
                return self._call(params[key], inputs)
        if name == "dot_general" and self.kernel is not None:
            ((contracted, _), _), shape = params["dimension_numbers"], eqn.invars[0].aval.shape
            inner = prod(shape[i] for i in contracted)
            self.kernel.flops += 2.0 * self.weight * inner * prod(eqn.outvars[0].aval.shape)
        outputs = self._evaluate(eqn, inputs)
        if self.kernel is None and name in _KEEP_NAME and id(inputs[0]) in self.names:
            self.named(outputs[0], self.name_of(inputs[0], ""))
        return outputs

    def _evaluate(self, eqn, inputs: list[Any]) -> list[Any]:
        name, unknown = (
            eqn.primitive.name,
            [Unknown() if self.kernel is None else UNKNOWN for _ in eqn.outvars],
        )
        too_large = self.kernel is not None and any(
            prod(v.aval.shape) > LARGEST_KNOWN for v in eqn.outvars
        )
        known = [not isinstance(x, Unknown) for x in inputs]
        if too_large or name == "dot_general":
            return unknown
        if not all(known):
            if name == "select_n" and known[0]:  # a known choice of a known value
                chosen = np.unique(inputs[0])
                if len(chosen) == 1 and known[1 + int(chosen[0])]:
                    return [np.broadcast_to(inputs[1 + int(chosen[0])], eqn.outvars[0].aval.shape)]
            if name == "and" and any(
                k and not np.any(x) for k, x in zip(known, inputs, strict=True)
            ):
                return [np.zeros(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)]
            return unknown
        if name in EVALUATE:
            return [EVALUATE[name](*inputs, **({"aval": eqn.outvars[0].aval} | eqn.params))]
        try:
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
        except NotImplementedError:
            return unknown
        return [np.asarray(x) for x in (outputs if eqn.primitive.multiple_results else [outputs])]

    def _body(self, called, inputs: list[Any]) -> list[Any]:
        """A loop's body or a branch: straight code of its own."""
        self.merged.clear()
        outputs = self._call(called, inputs)
        self.merged.clear()
        return outputs

    def _call(self, called, inputs: list[Any]) -> list[Any]:
        return (
            self.run(called.jaxpr, called.consts, inputs)
            if hasattr(called, "consts")
            else self.run(called, [], inputs)
        )

    # control flow

    def _while(self, eqn, inputs: list[Any]) -> list[Any]:
        p = eqn.params
        split = (p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"])
        cond_consts, body_consts, carry = (
            inputs[: split[0]],
            inputs[split[0] : split[1]],
            inputs[split[1] :],
        )
        self.merged.clear()
        while True:
            (goes_on,) = self._call(p["cond_jaxpr"], [*cond_consts, *carry])
            if isinstance(goes_on, Unknown):
                where = (
                    "outside of the kernels"
                    if self.kernel is None
                    else f"in kernel {self.kernel.name}"
                )
                raise ValueError(
                    f"how often a loop {where} runs depends on data that is not "
                    f"given: give those arguments as NumPy arrays"
                )
            if not goes_on:
                return carry
            carry = self._body(p["body_jaxpr"], [*body_consts, *carry])

    def _scan(self, eqn, inputs: list[Any]) -> list[Any]:
        p = eqn.params
        first = p["num_consts"] + p["num_carry"]
        consts, carry, xs = (
            inputs[: p["num_consts"]],
            inputs[p["num_consts"] : first],
            inputs[first:],
        )
        steps, rows = range(p["length"]), []
        for i in reversed(steps) if p["reverse"] else steps:
            outputs = self._body(
                p["jaxpr"], [*consts, *carry, *(x if isinstance(x, Unknown) else x[i] for x in xs)]
            )
            carry = outputs[: p["num_carry"]]
            rows.append(outputs[p["num_carry"] :])
        stacks = zip(*(reversed(rows) if p["reverse"] else rows), strict=True)
        return [
            *carry,
            *(
                Unknown() if any(isinstance(y, Unknown) for y in ys) else np.stack(ys)
                for ys in stacks
            ),
        ]

    def _cond(self, eqn, inputs: list[Any]) -> list[Any]:
        which, branches = inputs[0], eqn.params["branches"]
        if not isinstance(which, Unknown):
            return self._body(branches[min(max(int(which), 0), len(branches) - 1)], inputs[1:])
        kernel, counts = self.kernel, []
        self.traffic.assumed.add(
            f"{kernel.name if kernel else 'outside'}: a branch depends on unknown data"
        )
        self.doubt += 1
        for branch in branches:
            self.kernel = kernel and KernelTraffic(kernel.name, kernel.grid)
            self._body(branch, inputs[1:])
            counts.append(self.kernel)
        self.doubt -= 1
        self.kernel = kernel
        if kernel is not None:
            kernel.add(
                max(counts, key=lambda k: (sum(k.read.values()) + sum(k.written.values()), k.flops))
            )
        return [Unknown() for _ in eqn.outvars]

    # kernels

    def _run_scoped(self, eqn, inputs: list[Any]) -> list[Any]:
        jaxpr = eqn.params["jaxpr"]
        return self.run(jaxpr, inputs, [Memory.scratch(v.aval) for v in jaxpr.invars])

    def _program_id(self, eqn, inputs: list[Any]) -> list[Any]:
        return [np.int32(self.program[eqn.params["axis"]])]

    def _num_programs(self, eqn, inputs: list[Any]) -> list[Any]:
        assert self.kernel is not None
        return [np.int32(self.kernel.grid[eqn.params["axis"]])]

    def _pallas_call(self, eqn, inputs: list[Any]) -> list[Any]:
        return walk_call(self, eqn, inputs)

    @contextmanager
    def inside(self, kernel: KernelTraffic):
        """Count what happens within as done by a kernel."""
        self.kernel = kernel
        yield
        self.kernel, self.program, self.weight = None, (), 1.0
        self.traffic.kernels.append(kernel)
