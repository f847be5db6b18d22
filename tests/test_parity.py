"""The whole model against `transformers`, weights carried over by checkpoint folders."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import llama4_eqx as l4
from tests.toys import SCOUT, TOYS, random_tokens, reference_model, relative_error


@pytest.fixture
def pair(toy_config, tmp_path):
    reference = reference_model(toy_config)
    reference.save_pretrained(tmp_path)
    return reference, l4.load_checkpoint(tmp_path)


def test_logits(pair):
    reference, model = pair
    tokens = random_tokens(2, 61)
    with torch.no_grad():
        truth = reference(torch.tensor(tokens)).logits
    assert relative_error(eqx.filter_jit(model)(tokens).logits, truth) < 2e-5
