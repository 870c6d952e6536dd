"""Fingerprints: other numbers, another name; and no file is read for it twice."""

import copy
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from bert_files import COMMIT, CONFIG, save, tiny_bert
from transformers import BertConfig, BertModel

from skspin import LLMActivationTransformer
from skspin._model.files import Source
from skspin._model.fingerprint import fingerprint
from skspin._model.registry import load_backbone
from skspin.datasets import demo_model

# Files


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_a_folders_fingerprint_is_its_content_not_its_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "README.md").write_text("A copy.")
    assert fingerprint(Source(folder)) == fingerprint(Source(tmp_path / "other"))
    assert fingerprint(Source(folder)).startswith("folder:")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_changes_gets_a_new_fingerprint_and_new_weights(folder, name):
    before = load_backbone(Source(folder))
    if name == "config.json":
        rewrite(folder / name, lambda config: config | {"layer_norm_eps": 0.1})
    elif name == "tokenizer.json":
        rewrite(folder / name, lambda rules: rules | {"normalizer": {"type": "NFC"}})
    else:
        save(folder, other := tiny_bert(seed=1))
    after = load_backbone(Source(folder))
    assert after.fingerprint == fingerprint(Source(folder)) != before.fingerprint
    assert after is not before
    if name == "model.safetensors":
        torch.testing.assert_close(dict(after.model.state_dict()), dict(other.state_dict()))


def change_size_and_time(path):
    save(path.parent, tiny_bert(seed=1).half())


def change_neither_size_nor_time(path):
    before = os.stat(path)
    save(path.parent, tiny_bert(seed=1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size


def exchange_for_another_file(path):
    save(path.parent / "other", tiny_bert(seed=1))
    before = os.stat(path)
    os.utime(path.parent / "other" / path.name, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(path.parent / "other" / path.name, path)


@pytest.mark.parametrize(
    "change", [change_size_and_time, change_neither_size_nor_time, exchange_for_another_file]
)
def test_weights_that_change_under_the_same_path_give_new_activations(
    folder, tmp_path, monkeypatch, change
):
    module = sys.modules["skspin._model.fingerprint"]  # the door has a function of this name
    monkeypatch.setattr(module, "_YOUNG_NS", -(2**62))  # trust every file

    def activations(cache):
        transformer = LLMActivationTransformer(folder, cache=cache, dtype="float32")
        return transformer.fit_transform(["a film"])

    before = activations(tmp_path / "store")
    change(folder / "model.safetensors")
    after = activations(tmp_path / "store")
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, activations(None))


READ = """
import sys
from pathlib import Path
import skspin._model.fingerprint
from skspin import open_store
from skspin._model.files import Source

module = sys.modules["skspin._model.fingerprint"]
model, store, young, *calls = sys.argv[1:]
module._YOUNG_NS = int(young)
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
counts = []
for call in calls:
    del opened[:]
    name = module.fingerprint(Source(model), open_store(store) if call == "store" else None)
    counts.append(sum(Path(path).parent == Path(model) for path in opened))
print(*counts, name)
"""
OLD, YOUNG = "-4611686018427387904", "1000000000000000"


def read(folder, store, *calls, age=OLD):
    """Take fingerprints in a new process; return how many files each read, and the last one."""
    command = [sys.executable, "-W", "ignore", "-c", READ, str(folder), str(store), age, *calls]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *counts, name = run.stdout.split()
    return [int(count) for count in counts], name


def test_a_process_reads_a_file_once_and_a_store_knows_it_in_others(folder, tmp_path):
    store = tmp_path / "store"
    counts, name = read(folder, store, "alone", "alone", "store")  # the store learns what is known
    assert counts[1:] == [0, 0] and counts[0] >= 3
    assert read(folder, store, "alone", "store") == ([counts[0], 0], name)
    assert read(folder, store, "store", "alone") == ([0, 0], name)
    for path in store.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"a", b"b"))
    assert read(folder, store, "store") == ([counts[0]], name)


def test_a_file_that_was_just_written_is_not_trusted_to_stay(folder, tmp_path):
    for _ in range(2):
        [first, second], _ = read(folder, tmp_path / "store", "store", "store", age=YOUNG)
        assert first == second >= 3


def test_weights_are_not_opened_in_a_new_process_when_all_is_stored(tmp_path):
    code = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from skspin import LLMActivationTransformer
transformer = LLMActivationTransformer(sys.argv[1], cache=sys.argv[2], dtype="float32").fit(["a"])
X = transformer.transform(["a"])
print(sum(path.endswith("model.safetensors") for path in opened))
print(transformer.model_fingerprint_, float(X.sum()))
"""
    command = [sys.executable, "-c", code, str(demo_model()), str(tmp_path)]
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n", 1)
        for _ in range(2)
    ]
    assert int(runs[0][0]) > 0 and runs[1] == ["0", runs[0][1]]


def test_the_fingerprint_needs_no_torch(folder, cache):
    code = f"""
import sys
from skspin._model.fingerprint import fingerprint
from skspin._model.device import resolve_device, resolve_dtype
from skspin._model.files import Source
fingerprint(Source({str(folder)!r}))
fingerprint(Source("org/tiny", model_kwargs={cache!r}))
has_driver = resolve_device() != "cpu"
resolve_dtype("auto", "cpu")
assert has_driver or not {{"torch", "transformers"}} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# The hub, options, tokenizers


def test_a_hub_models_fingerprint_is_its_commit(cache):
    source = Source("org/tiny", model_kwargs=cache)
    assert source.commit == COMMIT
    assert fingerprint(source) == f"hub:org/tiny@{COMMIT}"
    pinned = Source("org/tiny", revision=COMMIT, model_kwargs=cache)
    assert fingerprint(pinned) == fingerprint(source)


def test_options_that_change_no_number_are_not_in_the_fingerprint(folder):
    plain = fingerprint(Source(folder))
    neutral = {"attn_implementation": "eager", "device_map": "cpu", "low_cpu_mem_usage": True}
    assert fingerprint(Source(folder, model_kwargs=neutral)) == plain
    assert fingerprint(Source(folder, model_kwargs={"quantization_config": {"bits": 4}})) != plain
    assert fingerprint(Source(folder, trust_remote_code=True)) != plain


def test_the_tokenizer_and_what_it_does_are_in_the_fingerprint(model, tokenizer):
    def with_settings(**settings):
        other = copy.deepcopy(tokenizer)
        for name, value in settings.items():
            setattr(other, name, value)
        return fingerprint(Source(model, tokenizer=other))

    plain = fingerprint(Source(model, tokenizer=tokenizer))
    assert with_settings() == plain
    assert with_settings(padding_side="left") == plain
    assert with_settings(truncation_side="left") != plain
    assert with_settings(cls_token="[SEP]") != plain
    used = copy.deepcopy(tokenizer)
    used(["a", "a b c"], padding=True, truncation=True, max_length=4)
    assert fingerprint(Source(model, tokenizer=used)) == plain
    used.add_tokens(["spin"])
    assert fingerprint(Source(model, tokenizer=used)) != plain


def test_a_folder_of_a_tokenizer_is_named_by_its_content(folder, tmp_path, tokenizer):
    source = Source(folder, tokenizer=save(tmp_path / "words", tokenizer))
    assert fingerprint(source) != fingerprint(Source(folder))
    assert len(load_backbone(source).tokenizer) == len(tokenizer)


# Models in memory


def change_in_place(model):
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] += 1


def change_past_the_counter(model):
    model.encoder.layer[0].output.dense.weight.data += 1


def replace_a_parameter(model):
    dense = model.encoder.layer[0].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.detach() * 2)


def change_a_setting(model):
    model.config.hidden_act = "relu"


@pytest.mark.parametrize(
    "change", [change_in_place, change_past_the_counter, replace_a_parameter, change_a_setting]
)
def test_a_model_in_memory_is_named_by_its_parameters(model, tokenizer, change):
    before = fingerprint(Source(model, tokenizer=tokenizer))
    assert fingerprint(Source(copy.deepcopy(model), tokenizer=tokenizer)) == before
    assert fingerprint(Source(model, tokenizer=tokenizer)) == before
    change(model)
    assert fingerprint(Source(model, tokenizer=tokenizer)) != before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_memory_has_a_fingerprint_in_every_format(model, tokenizer, dtype):
    source = Source(model.to(dtype), tokenizer=tokenizer)
    assert fingerprint(source) == fingerprint(source)


def test_a_model_without_weights_is_refused(tokenizer):
    with torch.device("meta"):
        empty = BertModel(BertConfig(**CONFIG))
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
    assert load_backbone(source).anatomy.n_layers == 2
