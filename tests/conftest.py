"""Settings of the whole suite: strict promotion, so no silent cast; compiled programs let go."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Each one holds memory mappings, of which a process may have only so many."""
    yield
    jax.clear_caches()
