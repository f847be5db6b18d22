"""The oracles that several files compare with: Meta's code, and the tokenizer that it reads."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jaxtyping
import pytest

from llama4_eqx.processing import load_tokenizer


@pytest.fixture(scope="session")
def meta():
    """Meta's `llama4` package, its reader of `tokenizer.model`, and our tokenizer of that file."""
    spec = importlib.util.find_spec("llama_models")
    assert spec is not None, "install the extra `dev`, which has llama-models"
    assert spec.submodule_search_locations
    # Only what touches pixels uses torchvision, which isn't installed, and it makes Pillow accept
    # broken files. `patch.dict` puts `sys.modules` back, so that nothing imported over the
    # stand-ins outlives this fixture.
    names = ["PIL", "torchvision", "torchvision.transforms"]
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):
        chat_format = importlib.import_module("llama_models.llama4.chat_format")
        preprocess = importlib.import_module("llama_models.llama4.preprocess")
        args = importlib.import_module("llama_models.llama4.args")
        datatypes = importlib.import_module("llama_models.datatypes")
        reader = chat_format.Tokenizer.get_instance()
    folder = Path(spec.submodule_search_locations[0]) / "llama4"
    return SimpleNamespace(
        chat_format=chat_format,
        preprocess=preprocess,
        args=args,
        datatypes=datatypes,
        reader=reader,
        tokenizer=load_tokenizer(folder),
    )


@pytest.fixture
def unchecked(monkeypatch):
    """Turns off the checks of annotations, which would raise before ours."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
