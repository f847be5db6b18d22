"""Settings of the whole suite: strict promotion, so no silent cast; eight devices for the tests
that share out work; compiled programs let go."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each one holds memory mappings, of which a process may have only so many."""
    yield
    jax.clear_caches()
