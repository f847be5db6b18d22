"""Settings of the whole suite: strict promotion, so no silent cast; eight devices for the tests
that share out work; compiled programs let go.

Nearly all of the suite's time is compiling. So the machine code isn't optimised (the programs that
XLA optimises are the users' own; only LLVM's passes after it are left out), and what one worker
or example has compiled the others read from a cache that lasts as long as the run."""

import os
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else pytest-xdist's first process has set it
    run_cache = tempfile.TemporaryDirectory(prefix="compiled-")  # deleted when the run ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = run_cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    )

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each one holds memory mappings, of which a process may have only so many."""
    yield
    jax.clear_caches()
