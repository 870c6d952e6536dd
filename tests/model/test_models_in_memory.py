"""Loaded models that a caller passes in: named by their parameters, and left alone."""

import copy
import gc
import weakref

import pytest
import torch
from bert_files import CONFIG, tiny_bert
from transformers import BertConfig, BertModel

from skspin._model.fingerprint import fingerprint
from skspin._model.registry import load_backbone, resolve_placement
from skspin._model.source import Source


@pytest.fixture
def model():
    return tiny_bert()


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


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's own
def test_an_adapter_is_part_of_a_model(model, tokenizer):
    peft = pytest.importorskip("peft")
    plain = fingerprint(Source(model, tokenizer=tokenizer))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    )
    source = Source(adapted, tokenizer=tokenizer)
    switched_on = fingerprint(source)
    with adapted.disable_adapter():
        switched_off = fingerprint(source)
    assert len({plain, switched_on, switched_off}) == 3
    assert fingerprint(source) == switched_on
    assert load_backbone(source).anatomy.n_layers == 2


def test_a_model_passed_in_is_used_as_it_is(model, tokenizer):
    model.train().to(torch.bfloat16)
    backbone = load_backbone(Source(model, tokenizer=tokenizer))
    assert backbone.model is model and backbone.tokenizer is tokenizer
    assert backbone.dtype == "bfloat16" and str(backbone.device) == "cpu"
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_passed_in_is_not_kept(tokenizer):
    model = BertModel(BertConfig(**CONFIG))
    load_backbone(Source(model, tokenizer=tokenizer))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_model_passed_in_is_not_moved(model, tokenizer):
    source = Source(model, tokenizer=tokenizer)
    assert resolve_placement(source) == ("cpu", "float32")
    assert resolve_placement(source, "cpu", "float32") == ("cpu", "float32")
    with pytest.raises(ValueError, match="dtype='bfloat16'.*'float32' and stays so"):
        load_backbone(source, dtype="bfloat16")
    with pytest.raises(ValueError, match="device='meta'.*'cpu' and stays there"):
        load_backbone(source, device="meta")


def test_a_model_without_weights_is_refused(tokenizer):
    with torch.device("meta"):
        empty = BertModel(BertConfig(**CONFIG))
    with pytest.raises(ValueError, match="not in memory"):
        fingerprint(Source(empty, tokenizer=tokenizer))
