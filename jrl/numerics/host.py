"""The machine: its platform, its memory, and its CPU cores as JAX devices."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from jrl.numerics import checks

MOST = 8  # more host devices than this bring little: the programs are small
KERNELS_NEED_JAX = (0, 11)  # whose Pallas the kernels for GPUs are written in
MOST_WANTED = 256  # each has threads of its own

_platform: str | None = None


def platform() -> str:
    """What programs are traced for, ``cpu``, ``gpu`` or ``tpu``: JAX's default backend, except within ``traced_for``."""
    return _platform or jax.default_backend()


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Trace programs for a platform that is not here, to compile them ahead of time."""
    global _platform
    before, _platform = _platform, name
    try:
        yield
    finally:
        _platform = before


def hopper() -> bool:
    """Whether programs are traced for an NVIDIA Hopper GPU (H100, H200), which ``traced_for("gpu")`` means."""
    if _platform is not None:
        return _platform == "gpu"
    return getattr(jax.local_devices()[0], "compute_capability", None) == "9.0"


def why_no_kernels() -> str | None:
    """What keeps programs that are traced now from the kernels for Hopper GPUs, or None."""
    if not hopper():
        return "it needs an NVIDIA Hopper GPU (H100, H200)"
    if jax.__version_info__ < KERNELS_NEED_JAX:
        return f"it needs jax {'.'.join(map(str, KERNELS_NEED_JAX))}, and this is {jax.__version__}"
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        return "it needs jax_enable_x64 to be off"
    return None


def has_kernels() -> bool:
    """Whether programs that are traced now may take the kernels for Hopper GPUs, and ``JRL_KERNELS=xla`` does not turn them off.

    Raises ``ValueError`` for another value of that variable than ``auto`` and ``xla``.
    """
    wanted = os.environ.get("JRL_KERNELS", "auto")
    checks.one_of("JRL_KERNELS", wanted, ("auto", "xla"))
    return wanted == "auto" and why_no_kernels() is None


def compiler_options() -> dict[str, Any]:
    """Options with which to compile a whole update for this machine: ``jax.jit(f, compiler_options=host.compiler_options())``.

    On a GPU the kernels that do not need each other then run at the same time. No number changes.
    """
    return {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"} if _takes_options() else {}


def chunk_compiler_options() -> dict[str, Any]:
    """Options for a program that repeats an update so often as an argument says, as the run loop's chunks do.

    On a GPU the whole update, its loops included, is then recorded once and launched as one graph. A loop over updates of a length
    that is known before would be recorded whole, which takes longer than it saves.
    """
    if not _takes_options():
        return {}
    recorded = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    return compiler_options() | {
        "xla_gpu_enable_command_buffer": recorded,
        "xla_gpu_graph_min_graph_size": 2,
        "xla_gpu_command_buffer_unroll_loops": True,
    }


def _takes_options() -> bool:
    return platform() == "gpu" and jax.__version_info__ >= (0, 11)


def use_cpu_cores() -> None:
    """Show each CPU core to JAX as a device of its own, so that seeds can be laid over them.

    Called when ``jrl`` is imported, since JAX fixes its devices at their first use; if they are fixed already, nothing
    changes. ``JRL_CPU_DEVICES=1`` keeps JAX's single CPU device, another number asks for that many; what is none is as if it were not
    there, until ``check_environment``.
    """
    wanted = _wanted_cpu_devices()
    chosen: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    already_chosen = chosen > 0 or "xla_force_host_platform" in os.environ.get("XLA_FLAGS", "")
    if already_chosen and not wanted:
        return
    try:
        jax.config.update("jax_num_cpu_devices", wanted or min(num_cores(), MOST))
    except RuntimeError:  # the devices are fixed already
        pass


def _wanted_cpu_devices() -> int | None:
    """The number in ``JRL_CPU_DEVICES``; None if it is not there, or not one that can be."""
    text = os.environ.get("JRL_CPU_DEVICES", "")
    return int(text) if text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MOST_WANTED else None


def check_environment() -> None:
    """Raise ``ValueError`` for a ``JRL_CPU_DEVICES`` that is no number of devices, and for a ``JAX_PLATFORMS`` or a ``JRL_ACCEL`` that
    JAX does not have."""
    if (text := os.environ.get("JRL_CPU_DEVICES", "")) and _wanted_cpu_devices() is None:
        raise ValueError(f"JRL_CPU_DEVICES must be an integer from 1 to {MOST_WANTED}; got {text!r}")
    if platforms := os.environ.get("JAX_PLATFORMS"):
        try:
            jax.default_backend()
        except AssertionError:  # of JAX, where a platform is known and its plugin is missing
            raise ValueError(
                f"JAX finds no device for JAX_PLATFORMS={platforms}; it names the platforms to use, such as cpu"
            ) from None
    wanted = os.environ.get("JRL_ACCEL") or "cpu"
    backends = {"cpu": None, "tpu": "tpu", "cuda12": "gpu", "cuda13": "gpu"}
    if wanted not in backends:
        raise ValueError(f"JRL_ACCEL must be one of {', '.join(backends)}; got {wanted!r}")
    backend = backends[wanted]
    if backend is None:
        return
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        found = f"none ({str(error).splitlines()[0]})"
    if found != backend:
        raise ValueError(
            f"JRL_ACCEL={wanted} asks for a {backend}; JAX finds {found}: install jax[{wanted}], or take JRL_ACCEL=cpu"
        )


def description() -> str:
    """What programs run on, such as "2 cpu devices" or "1 gpu device (NVIDIA H100)"."""
    devices = jax.devices()
    kind = "" if devices[0].platform == "cpu" else f" ({devices[0].device_kind})"
    return f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}{kind}"


def device_memory() -> int | None:
    """Bytes of the first device, or of the machine where it is a CPU; None if that is not known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (device.memory_stats() or {}).get("bytes_limit")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
