"""Chips that this machine need not have: their datasheets, and ahead-of-time compilation of jitted
functions for them.

NVIDIA: XLA's GPU compiler with Triton and ptxas, down to a cubin. TPU: libtpu's compiler. Nothing
runs. Install the packages as CONTRIBUTING.md says; `missing_packages` names those that are absent.
"""

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# no CUDA library but the compiler is needed
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# no chip is opened: processes need no lock
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402


@dataclass(frozen=True)
class Chip:
    """One accelerator: memory bandwidth in bytes/s and dense bf16 rate in FLOP/s from the vendor's
    datasheet.
    """

    name: str
    platform: str  # "cuda" or "tpu"
    bandwidth: float
    bf16_flops: float
    topology: str  # TPU: topology name; NVIDIA: name that JAX knows
    capability: tuple[int, int] = (0, 0)
    cores: int = 0
    shared_optin: int = 0  # bytes of shared memory a block may ask for
    shared_core: int = 0
    l2: int = 0
    memory: int = 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "H100",
            "cuda",
            3.35e12,
            989e12,
            "NVIDIA H100",
            (9, 0),
            132,
            232448,
            233472,
            50 << 20,
            80 << 30,
        ),
        Chip(
            "A100",
            "cuda",
            2.039e12,
            312e12,
            "NVIDIA A100",
            (8, 0),
            108,
            166912,
            167936,
            40 << 20,
            80 << 30,
        ),
        Chip(
            "L40",
            "cuda",
            0.864e12,
            181e12,
            "NVIDIA L40",
            (8, 9),
            142,
            101376,
            102400,
            96 << 20,
            48 << 30,
        ),
        Chip("v5e", "tpu", 0.819e12, 197e12, "v5e:2x2", memory=16 << 30),
        Chip("v6e", "tpu", 1.64e12, 918e12, "v6e:2x2", memory=32 << 30),
        Chip("v5p", "tpu", 2.765e12, 459e12, "v5p:2x2x1", memory=95 << 30),
        Chip("v4", "tpu", 1.228e12, 275e12, "v4:2x2x1", memory=32 << 30),
    )
}

_PACKAGES = {"cuda": ("jax_cuda13_plugin", "jax_plugins.xla_cuda13", "nvidia"), "tpu": ("libtpu",)}


def missing_packages(platform: str) -> list[str]:
    """Modules that compiling for a platform needs and this environment lacks."""

    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    return [name for name in _PACKAGES[platform] if not found(name)]


@dataclass(frozen=True)
class KernelResources:
    """What ptxas says of one kernel: registers a thread; bytes of stack, spill stores and spill
    loads a thread; static shared bytes.

    `dynamic_shared`: bytes of shared memory that XLA adds to a block when it launches the kernel.
    """

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    dynamic_shared: int = 0


@dataclass(frozen=True)
class Compiled:
    """An ahead-of-time compiled function: XLA's executable, its memory analysis and, on NVIDIA,
    what each kernel takes.
    """

    chip: Chip
    executable: jax.stages.Compiled
    kernels: dict[str, KernelResources]

    @property
    def memory(self):
        """XLA's memory analysis: argument, output, alias and temporary bytes."""
        return self.executable.memory_analysis()

    @property
    def hlo(self) -> str:
        """The optimised HLO; empty where XLA cannot print it (asynchronous updates of v6e programs,
        JAX 0.10.2).
        """
        try:
            return self.executable.as_text() or ""
        except jax.errors.JaxRuntimeError:
            return ""


def compile_for(
    chip: Chip,
    function: Callable,
    *arguments,
    donate: tuple[int, ...] = (),
    static: tuple[int, ...] = (),
) -> Compiled:
    """Compile `function(*arguments)` for a chip. Arguments are pytrees of arrays or
    `jax.ShapeDtypeStruct`; only shapes are read.
    """
    mesh = _mesh(chip)
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = [
        a
        if i in static
        else jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), a)
        for i, a in enumerate(arguments)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), tempfile.TemporaryDirectory() as dump:
        lowered = jax.jit(
            function, donate_argnums=donate, static_argnums=static, out_shardings=sharding
        ).lower(*shapes)
        if chip.platform == "tpu":
            return Compiled(chip, lowered.compile(), {})
        executable = lowered.compile(compiler_options={"xla_dump_to": dump})
        return Compiled(chip, executable, _assembled(Path(dump)))


@cache
def _mesh(chip: Chip) -> Mesh:
    if chip.platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology)
    else:
        _find_ptxas()
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip.topology,
            topology="1x1x1",
            target_config=_target_config(chip),
        )
    return Mesh(np.array(topology.devices[:1]), ("chip",))


def _cuda_bin() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    roots = (
        list(spec.submodule_search_locations) if spec and spec.submodule_search_locations else []
    )
    return next(
        (Path(root, "cu13", "bin") for root in roots if Path(root, "cu13", "bin").is_dir()), None
    )


def _find_ptxas() -> None:
    folder = _cuda_bin()
    if folder is not None and str(folder) not in os.environ["PATH"]:
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def _target_config(chip: Chip) -> str:
    """The text proto that XLA asks for when it compiles for a GPU that is not there."""
    return f"""gpu_device_info {{
      cuda_compute_capability {{ major: {chip.capability[0]} minor: {chip.capability[1]} }}
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {chip.shared_core} threads_per_core_limit: 2048
      core_count: {chip.cores} fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {chip.l2} clock_rate_ghz: 1.98
      device_memory_size: {chip.memory} shared_memory_per_block_optin: {chip.shared_optin}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 13 }}
    device_description_str: "{chip.topology}" """


def _assembled(dump: Path) -> dict[str, KernelResources]:
    """What ptxas reports of every kernel in the PTX that XLA has dumped: the same assembler that
    made the executable's cubin.
    """
    folder, found = _cuda_bin(), {}
    assert folder is not None  # the compile that wrote the dump has used it
    launches = "\n".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
    dynamic = {
        name: int(size)
        for name, size in re.findall(
            r"(\S+) grid: .*?shared_memory: (\d+) "
            r"bytes",
            launches,
        )
    }
    for ptx in sorted(dump.glob("*.ptx")):
        target = re.search(r"\.target (\w+)", ptx.read_text())
        if target is None:
            continue
        command = [folder / "ptxas", "-v", f"-arch={target[1]}", ptx, "-o", dump / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for name, body in re.findall(
            r"Function properties for (\S+)\n(.*?)(?=ptxas info\s+: "
            r"(?:Compiling|Function)|\Z)",
            report,
            re.S,
        ):
            stack, stores, loads = map(
                int,
                re.findall(
                    r"(\d+) bytes (?:stack frame|spill "
                    r"stores|spill loads)",
                    body,
                ),
            )
            registers, shared = (
                re.search(r"Used (\d+) registers", body),
                re.search(r"(\d+) bytes smem", body),
            )
            numbers = (
                int(registers[1]) if registers else 0,
                stack,
                stores,
                loads,
                int(shared[1]) if shared else 0,
            )
            found[name] = KernelResources(*numbers, dynamic.get(name, 0))
    return found
