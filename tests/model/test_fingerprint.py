"""Fingerprints: no file is read for one twice; and what tests of the store's key leave out."""

import copy
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bert_files import SIZES, save, tiny
from transformers import BertConfig, BertModel

from skspin import LLMActivationTransformer, open_store
from skspin._model.files import Source
from skspin._model.fingerprint import fingerprint
from skspin._model.registry import load_backbone

OLD, YOUNG = -(2**62), 10**15


@pytest.fixture
def trusted_from(monkeypatch):
    """Say how old (ns) a file must be, so that its digest is remembered."""
    module = sys.modules["skspin._model.fingerprint"]  # the door has a function of this name
    return lambda age: monkeypatch.setattr(module, "_YOUNG_NS", age)


def forks(test):
    """Mark a test that forks this process."""
    test = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")(test)  # Python 3.12's
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")(test)


# Files


def change_size_and_time(path):
    save(path.parent, tiny(seed=1).half())


def change_neither_size_nor_time(path):
    before = os.stat(path)
    save(path.parent, tiny(seed=1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size


def exchange_for_another_file(path):
    save(path.parent / "other", tiny(seed=1))
    before = os.stat(path)
    os.utime(path.parent / "other" / path.name, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(path.parent / "other" / path.name, path)


@pytest.mark.parametrize(
    "change", [change_size_and_time, change_neither_size_nor_time, exchange_for_another_file]
)
def test_weights_that_change_under_the_same_path_give_new_activations(
    folder, tmp_path, trusted_from, change
):
    trusted_from(OLD)

    def activations(cache):
        transformer = LLMActivationTransformer(folder, cache=cache, dtype="float32")
        return transformer.fit_transform(["a film"])

    before = activations(tmp_path / "store")
    change(folder / "model.safetensors")
    after = activations(tmp_path / "store")
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, activations(None))


def in_a_fork(folder, *calls):
    """Make calls in a process of their own.

    Return, for each, how many of the folder's files it opened, and its result. This process must
    not have asked for the folder before, or the other one knows what it found.
    """

    def make_calls(results):
        opened = []
        sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
        for call in calls:
            del opened[:]
            result = call()
            results.send((sum(Path(str(path)).parent == folder for path in opened), result))

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=make_calls, args=(send,), daemon=True)
    child.start()
    send.close()
    found = []
    for _ in calls:
        assert receive.poll(100), "the forked process hangs"
        found.append(receive.recv())
    child.join()
    return found


@forks
@pytest.mark.filterwarnings("ignore:.*is damaged. It will be made again:UserWarning")
def test_a_process_reads_a_file_once_and_a_store_knows_it_in_others(folder, tmp_path, trusted_from):
    def alone():
        return fingerprint(Source(folder))

    def with_store():
        return fingerprint(Source(folder), open_store(tmp_path / "store"))

    trusted_from(YOUNG)  # a file that was just written is not trusted to stay as it is
    (n_files, name), again = in_a_fork(folder, with_store, with_store)
    assert n_files >= 3 and again == (n_files, name)
    trusted_from(OLD)
    later = in_a_fork(folder, alone, alone, with_store)  # which tells the store
    assert later == [(n_files, name), (0, name), (0, name)]
    assert in_a_fork(folder, alone, with_store) == [(n_files, name), (0, name)]
    assert in_a_fork(folder, with_store, alone) == [(0, name)] * 2
    for path in (tmp_path / "store").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"a", b"b"))
    assert in_a_fork(folder, with_store) == [(n_files, name)]


@forks
def test_weights_are_not_opened_in_a_new_process_when_all_is_stored(folder, tmp_path, trusted_from):
    trusted_from(OLD)

    def transform():
        transformer = LLMActivationTransformer(folder, cache=tmp_path / "store", dtype="float32")
        X = transformer.fit_transform(["a"])
        return transformer.model_fingerprint_, float(X.sum())

    ((n_opened, expected),) = in_a_fork(folder, transform)
    assert n_opened > 0 and in_a_fork(folder, transform) == [(0, expected)]


def test_the_fingerprint_needs_no_torch(folder, cache):
    code = f"""
import sys
from skspin._model.fingerprint import fingerprint
from skspin._model.recipe import resolve_device, resolve_dtype
from skspin._model.files import Source
fingerprint(Source({str(folder)!r}))
fingerprint(Source("org/tiny", model_kwargs={cache!r}))
has_driver = resolve_device() != "cpu"
resolve_dtype("auto", "cpu")
assert has_driver or not {{"torch", "transformers"}} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# The hub, options, tokenizers


def test_options_that_change_no_number_are_not_in_the_fingerprint(folder):
    plain = fingerprint(Source(folder))
    neutral = {"attn_implementation": "eager", "device_map": "cpu", "low_cpu_mem_usage": True}
    assert fingerprint(Source(folder, model_kwargs=neutral)) == plain
    assert fingerprint(Source(folder, model_kwargs={"quantization_config": {"bits": 4}})) != plain
    assert fingerprint(Source(folder, trust_remote_code=True)) != plain


def test_what_a_tokenizer_was_last_used_for_is_not_in_the_fingerprint(model, tokenizer):
    used = copy.deepcopy(tokenizer)
    used(["a", "a b c"], padding=True, truncation=True, max_length=4)
    plain = fingerprint(Source(model, tokenizer=tokenizer))
    assert fingerprint(Source(model, tokenizer=used)) == plain
    used.add_tokens(["spin"])
    assert fingerprint(Source(model, tokenizer=used)) != plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template", "{{ messages[0]['content'] }}"),
        ("model_input_names", ["input_ids"]),
        ("split_special_tokens", True),
        ("truncation_side", "left"),
    ],
)
def test_what_changes_a_texts_tokens_is_in_the_fingerprint(model, tokenizer, name, value):
    changed = copy.deepcopy(tokenizer)
    setattr(changed, name, value)
    before = fingerprint(Source(model, tokenizer=tokenizer))
    assert fingerprint(Source(model, tokenizer=changed)) != before


def test_a_folder_of_a_tokenizer_is_named_by_its_content(folder, tmp_path, tokenizer):
    source = Source(folder, tokenizer=save(tmp_path / "words", tokenizer))
    assert fingerprint(source) != fingerprint(Source(folder))
    assert len(load_backbone(source).tokenizer) == len(tokenizer)


# Models in memory


def change_past_the_counter(model):
    model.encoder.layer[0].output.dense.weight.data += 1


def replace_a_parameter(model):
    dense = model.encoder.layer[0].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.detach() * 2)


@pytest.mark.parametrize("change", [change_past_the_counter, replace_a_parameter])
def test_a_model_in_memory_is_named_by_its_parameters(model, tokenizer, change):
    before = fingerprint(Source(model, tokenizer=tokenizer))
    assert fingerprint(Source(model, tokenizer=tokenizer)) == before
    change(model)
    assert fingerprint(Source(model, tokenizer=tokenizer)) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_memory_has_a_fingerprint_in_every_format(model, tokenizer, dtype):
    source = Source(model.to(dtype), tokenizer=tokenizer)
    assert fingerprint(source) == fingerprint(source)


def test_a_model_without_weights_is_refused(tokenizer):
    with torch.device("meta"):
        empty = BertModel(BertConfig(**SIZES))
    with pytest.raises(ValueError, match="not in memory"):
        fingerprint(Source(empty, tokenizer=tokenizer))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
def test_an_adapter_is_part_of_a_model(model, tokenizer):
    peft = pytest.importorskip("peft")
    plain = fingerprint(Source(model, tokenizer=tokenizer))
    lora = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    source = Source(adapted := peft.get_peft_model(model, lora), tokenizer=tokenizer)
    switched_on = fingerprint(source)
    with adapted.disable_adapter():
        switched_off = fingerprint(source)
    assert len({plain, switched_on, switched_off}) == 3
    assert fingerprint(source) == switched_on
    assert len(load_backbone(source).anatomy.stacks[None].blocks) == 2
