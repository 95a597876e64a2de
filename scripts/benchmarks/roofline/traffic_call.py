"""One `pallas_call` of an abstract execution (traffic.py): its Refs, its grid, and the blocks that
TPU pipelines fetch and send.
"""

from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import numpy as np

from benchmarks.roofline.traffic_values import LARGEST_MEMORY, Memory


@dataclass
class KernelTraffic:
    """What one `pallas_call` does: bytes read and written by operand, and the FLOPs of its dot
    products.
    """

    name: str
    grid: tuple[int, ...]
    read: dict[str, float] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0

    def add(self, other: "KernelTraffic") -> None:
        """Take in what another one counted."""
        for mine, theirs in ((self.read, other.read), (self.written, other.written)):
            for name, size in theirs.items():
                mine[name] = mine.get(name, 0) + size
        self.flops += other.flops


@dataclass
class Traffic:
    """The kernels that a function launches, in order.

    `assumed` says where a branch or mask depends on data that was not given; the larger count was
    taken there. `results` are the names of operands that the function returns.
    """

    kernels: list[KernelTraffic] = field(default_factory=list)
    assumed: set[str] = field(default_factory=set)
    results: set[str] = field(default_factory=set)

    def operands(self) -> dict[str, tuple[float, float]]:
        """Bytes (read, written) of each operand: an argument of the function, or `kernel.i` for
        output i of a kernel.
        """
        names = dict.fromkeys(name for k in self.kernels for name in (*k.read, *k.written))
        return {
            name: (
                sum(k.read.get(name, 0) for k in self.kernels),
                sum(k.written.get(name, 0) for k in self.kernels),
            )
            for name in names
        }

    @property
    def bytes(self) -> float:
        """All bytes, read and written."""
        return sum(sum(pair) for pair in self.operands().values())

    def scratch(self) -> dict[str, tuple[float, float]]:
        """Bytes (read, written) of what a kernel leaves for another or for XLA, whose reading is
        taken to be once.
        """
        kernels = {kernel.name for kernel in self.kernels}
        made = {
            n: pair
            for n, pair in self.operands().items()
            if n.rpartition(".")[0] in kernels and n not in self.results
        }
        return {name: (read or written, written) for name, (read, written) in made.items()}

    @property
    def flops(self) -> float:
        """FLOPs of all dot products."""
        return sum(k.flops for k in self.kernels)


@dataclass
class _Block:
    """An operand of which a TPU kernel gets one block a grid step."""

    memory: Memory  # whole, padded to full blocks, with the operand's name
    mapping: Any
    is_output: bool
    index: tuple[int, ...] | None = None

    def _extent(self) -> list[tuple[int, int, int]]:
        """(first, size, size of the array) along each axis."""
        assert self.index is not None
        sizes = _block_shape(self.mapping, False)
        return [
            (i * n, n, total)
            for i, n, total in zip(self.index, sizes, self.mapping.array_aval.shape, strict=True)
        ]

    def elements(self) -> int:
        """Of the block at `index`, what lies beyond the array's end left out."""
        return prod(min(n, total - first) for first, n, total in self._extent())

    def view(self) -> Memory:
        """What the kernel sees of the block: axes without a block size are left out."""
        kept = [hasattr(n, "block_size") for n in self.mapping.block_shape]
        extent = zip(self._extent(), kept, strict=True)
        return self.memory.part(
            tuple(slice(first, first + n) if keep else first for (first, n, _), keep in extent)
        )


def walk_call(walk, eqn, inputs: list[Any]) -> list[Any]:
    """Walk the kernel over its grid; the outputs of the call."""
    p, mapping = eqn.params, eqn.params["grid_mapping"]
    sizes = iter(inputs)
    grid = tuple(n if isinstance(n, int) else int(next(sizes)) for n in mapping.grid)
    operands, name, triton = (
        list(sizes),
        p.get("name") or eqn.primitive.name,
        "triton" in type(p["compiler_params"]).__module__,
    )
    avals = [v.aval for v in eqn.invars[len(inputs) - len(operands) :]]
    prefetched = mapping.num_index_operands
    padding = [(1,) * aval.ndim for aval in avals[:prefetched]] + [
        _block_shape(b, triton) for b in mapping.block_mappings
    ]
    memories = []
    for i, (operand, aval) in enumerate(zip(operands, avals, strict=True)):
        memories.append(_memory(walk, operand, aval, f"{name} operand {i}", padding[i]))
    aliases = {output: operand for operand, output in p["input_output_aliases"]}
    for i, v in enumerate(eqn.outvars):
        fresh = Memory(
            _padded(v.aval.shape, padding[len(avals) + i]),
            v.aval.dtype,
            f"{name}.{i}",
            kept=v.aval.size <= LARGEST_MEMORY,
        )
        memories.append(memories[aliases[i]] if i in aliases else fresh)
    outputs = memories[len(avals) :]
    kernel = KernelTraffic(name, grid)
    walk.triton = triton
    with walk.inside(kernel):
        if triton:
            _walk_programs(walk, p["jaxpr"], grid, memories)
        else:
            _walk_steps(walk, p["jaxpr"], grid, mapping, memories)
    return [
        walk.named(_value(m, v.aval.shape), m.name)
        for m, v in zip(outputs, eqn.outvars, strict=True)
    ]


def _walk_programs(walk, jaxpr, grid: tuple[int, ...], memories: list[Memory]) -> None:
    """Triton: programs know nothing of each other, so some may stand for others."""
    points = product(*map(range, grid))
    chosen = (
        walk.sample(walk.kernel.name, grid) if walk.sample else ((point, 1.0) for point in points)
    )
    for walk.program, walk.weight in chosen:
        walk.merged.clear()
        walk.run(jaxpr, (), memories)


def _walk_steps(walk, jaxpr, grid: tuple[int, ...], mapping, memories: list[Memory]) -> None:
    """TPU: grid steps one after another; scratch lives on, and a block is fetched or sent when its
    index changes.
    """
    prefetched, arrays = (
        memories[: mapping.num_index_operands],
        memories[mapping.num_index_operands :],
    )
    for memory in prefetched:
        walk.count(memory, prod(memory.shape), write=False)
        memory.name = ""
    refs: list[Memory | _Block] = []
    for i, (memory, block) in enumerate(zip(arrays, mapping.block_mappings, strict=True)):
        refs.append(memory if _whole(block) else _Block(memory, block, i >= mapping.num_inputs))
    blocks = [ref for ref in refs if isinstance(ref, _Block)]
    scratch = [Memory.scratch(v.aval) for v in jaxpr.invars[len(memories) :]]
    for walk.program in product(*map(range, grid)):
        program = [np.int32(i) for i in walk.program]
        for block in blocks:
            map_jaxpr = block.mapping.index_map_jaxpr
            index = tuple(
                map(int, walk.run(map_jaxpr.jaxpr, map_jaxpr.consts, [*program, *prefetched]))
            )
            if index != block.index:
                if block.is_output and block.index is not None:
                    walk.count(block.memory, block.elements(), write=True)
                block.index = index
                if not block.is_output:
                    walk.count(block.memory, block.elements(), write=False)
        views = [ref.view() if isinstance(ref, _Block) else ref for ref in refs]
        walk.run(jaxpr, (), [*prefetched, *views, *scratch])
    for block in blocks:
        if block.is_output and block.index is not None:
            walk.count(block.memory, block.elements(), write=True)


def _whole(block) -> bool:
    """Whether the kernel gets the array in device memory instead of blocks near the core."""
    return str(block.transformed_block_aval.memory_space).lower() in ("hbm", "any")


def _block_shape(block, triton: bool) -> tuple[int, ...]:
    whole = not triton and _whole(block)
    return tuple(1 if whole else max(1, getattr(n, "block_size", 1)) for n in block.block_shape)


def _padded(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // b) * b for n, b in zip(shape, block, strict=True))


def _memory(walk, value: Any, aval, name: str, block: tuple[int, ...]) -> Memory:
    """An operand's memory, padded to whole blocks."""
    name = walk.name_of(value, name)
    if not isinstance(value, np.ndarray | np.generic):
        return Memory(_padded(aval.shape, block), aval.dtype, name)
    memory = Memory(_padded(aval.shape, block), aval.dtype, name, kept=True)
    inside = tuple(slice(0, n) for n in aval.shape)
    memory.allocate()
    part = memory.part(inside)
    assert part.values is not None and part.known is not None
    part.values[...], part.known[...] = value, True
    return memory


def _value(memory: Memory, shape: tuple[int, ...]) -> np.ndarray | None:
    """An output of the call, None when not all of it is known."""
    if memory.values is None or memory.known is None:
        return None
    inside = tuple(slice(0, n) for n in shape)
    return memory.values[inside] if memory.known[inside].all() else None
