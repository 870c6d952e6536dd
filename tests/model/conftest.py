"""A tiny BERT: in memory, in a folder, in a cache of the hub."""

import pytest
from bert_files import as_hub_cache, save, tiny

from skspin._model.files import _ask_hub
from skspin._model.registry import forget_models


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    yield save(tmp_path / "tiny", model, tokenizer)
    forget_models()


@pytest.fixture
def new_process():
    """Forget what this process has asked the hub."""
    _ask_hub.cache_clear()
    yield _ask_hub.cache_clear
    _ask_hub.cache_clear()


@pytest.fixture
def cache(tmp_path, folder, new_process):
    return {"cache_dir": as_hub_cache(tmp_path / "hub", folder)}
