"""Settings of the whole suite: strict promotion, no chance of a silent cast; toy models by name."""

import jax
import pytest

from tests.toys import TOYS

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(params=TOYS)
def toy_config(request):
    """Every toy config in turn: together they cross every rule of the model."""
    return TOYS[request.param]
