"""Digests of files: remembered as long as the file is the same, in this process and in others."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

import skspin._model.fingerprint as module
import skspin._store
from skspin import LLMActivationTransformer, open_store
from skspin._model.fingerprint import fingerprint
from skspin._model.registry import forget_models
from skspin._model.source import Source
from skspin.datasets import demo_model

CHILD = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from skspin import LLMActivationTransformer
transformer = LLMActivationTransformer(sys.argv[1], cache=sys.argv[2], dtype="float32").fit(["a"])
X = transformer.transform(["a"])
print(sum(path.endswith("model.safetensors") for path in opened))
print(transformer.model_fingerprint_, float(X.sum()))
"""


def in_new_process(model, cache):
    """Transform a text; return how often weights were opened, and what came out."""
    command = [sys.executable, "-c", CHILD, str(model), str(cache)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    n_opened, result = run.stdout.strip().split("\n")
    return int(n_opened), result


def save(folder, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    BertModel(BertConfig(num_hidden_layers=2, **sizes)).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model")
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(tmp_path / "model")
    yield tmp_path / "model"
    forget_models()


@pytest.fixture
def new_process(monkeypatch):
    """Remember nothing, like a process that has just begun; files need not be old."""
    monkeypatch.setattr(module, "_known_files", {})
    monkeypatch.setattr(skspin._store, "_FOLDERS", {})
    monkeypatch.setattr(module, "_YOUNG_NS", -(2**62))

    def forget():
        module._known_files.clear()
        skspin._store._FOLDERS.clear()

    return forget


@pytest.fixture
def reads(monkeypatch):
    """Count the files that are read."""
    counted = []
    read = module._read_digest
    monkeypatch.setattr(module, "_read_digest", lambda path: counted.append(path) or read(path))
    return counted


def test_a_process_reads_a_file_once(folder, new_process, reads):
    first = fingerprint(Source(folder))
    n_files = len(reads)
    assert n_files >= 3  # configuration, tokenizer, weights
    assert fingerprint(Source(folder)) == first
    assert len(reads) == n_files
    new_process()
    fingerprint(Source(folder))
    assert len(reads) == 2 * n_files


def test_a_store_remembers_files_for_other_processes(folder, new_process, reads, tmp_path):
    store = open_store(tmp_path / "store")
    first = fingerprint(Source(folder), store)
    n_files = len(reads)
    new_process()
    assert fingerprint(Source(folder), store) == first
    assert len(reads) == n_files
    assert fingerprint(Source(folder)) == first  # the process knows it too now
    assert len(reads) == n_files


def test_a_store_learns_what_the_process_knows_already(folder, new_process, reads, tmp_path):
    fingerprint(Source(folder))
    n_files = len(reads)
    fingerprint(Source(folder), open_store(tmp_path / "store"))
    new_process()
    fingerprint(Source(folder), open_store(tmp_path / "store"))
    assert len(reads) == n_files


def test_weights_are_not_opened_in_a_new_process_when_all_is_stored(tmp_path):
    n_opened, first = in_new_process(demo_model(), tmp_path)
    assert n_opened > 0
    assert in_new_process(demo_model(), tmp_path) == (0, first)


def change_size_and_time(path):
    save(path.parent, seed=1)


def change_neither_size_nor_time(path):
    before = os.stat(path)
    save(path.parent, seed=1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size


def exchange_for_another_file(path):
    save(path.parent / "other", seed=1)
    before = os.stat(path)
    os.utime(path.parent / "other" / path.name, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(path.parent / "other" / path.name, path)


@pytest.mark.parametrize(
    "change", [change_size_and_time, change_neither_size_nor_time, exchange_for_another_file]
)
def test_weights_that_change_under_the_same_path_give_new_activations(
    folder, tmp_path, new_process, change
):
    def activations(cache):
        new_process()
        transformer = LLMActivationTransformer(folder, cache=cache, dtype="float32")
        return transformer.fit_transform(["a film"])

    before = activations(tmp_path / "store")
    change(folder / "model.safetensors")
    after = activations(tmp_path / "store")
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, activations(None))


def test_a_file_that_was_just_written_is_not_trusted_to_stay(folder, tmp_path, monkeypatch, reads):
    monkeypatch.setattr(module, "_YOUNG_NS", 10**15)
    for _ in range(2):
        del reads[:]
        fingerprint(Source(folder), open_store(tmp_path / "store"))
        assert len(reads) >= 3
    assert not list((tmp_path / "store").glob("*/cards/*"))


def test_a_damaged_memory_of_a_file_is_made_again(folder, tmp_path, new_process, reads):
    expected = fingerprint(Source(folder), open_store(tmp_path / "store"))
    for card in (tmp_path / "store").glob("*/cards/*"):
        card.write_text(card.read_text().replace("a", "b"))
    new_process()
    with pytest.warns(UserWarning, match="made again"):
        assert fingerprint(Source(folder), open_store(tmp_path / "store")) == expected
