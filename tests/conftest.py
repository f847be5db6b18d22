"""Settings of the whole suite: strict promotion, so no silent cast; eight devices for the tests
that share out work; compiled programs let go.

Nearly all of the suite's time is compiling. So machine code is made in the quickest way: without
LLVM's optimisation, on one core, as the others have tests of their own, and by XLA's older emitters
of fusions where there still are some, three times as fast together (the graphs that XLA optimises
are the users' own). What one file has compiled another reads from a cache that lasts as long as the
process. Processes don't share it, since JAX writes its entries in place, where another one may read
half of one. Tracing makes many objects and few of them garbage, so that is looked for more seldom;
and programs don't say which line of Python each operation came from, which nobody reads here."""

import gc
import os
import tempfile
from pathlib import Path

# With libtpu, which only compiles here, JAX would look for TPUs.
os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if Path("/dev/nvidia0").exists() else "cpu")

import jax
import pytest

flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
# Read when a backend starts; subprocesses of tests read them, too.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

gc.set_threshold(50_000, 20, 20)

cache = tempfile.TemporaryDirectory(prefix="compiled-")  # deleted when the process ends
jax.config.update("jax_compilation_cache_dir", cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)

compilations: list[str] = []


def note_compilation(event: str, _seconds: float, fun_name: str = "", **_: str) -> None:
    if event.endswith("backend_compile_duration"):
        compilations.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(note_compilation)


@pytest.fixture
def compiled():
    """The functions compiled since the test began, or since it cleared the list."""
    compilations.clear()
    return compilations


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each one holds memory mappings, of which a process may have only so many."""
    yield
    jax.clear_caches()
