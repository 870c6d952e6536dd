from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import ALL, MAMBA, MIXTURES, TINY
from torch import nn

from skspin._model.anatomy import find_anatomy
from skspin._model.blocks import find_sites

# PEFT asks transformers for what transformers is about to rename.
peft_warns = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def widths_of(anatomy):
    return {
        (stack.name, *place): tap.width
        for stack in anatomy.stacks.values()
        for place, tap in stack.taps.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_a_configuration_is_enough(name):
    with torch.device("meta"):
        skeleton = transformers.AutoModel.from_config(ALL[name].config())
    assert widths_of(find_anatomy(skeleton)) == widths_of(find_anatomy(ALL[name].build()))


EQUAL = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 24, "head_dim": 8}
# Shapes that tell nothing should mislead nobody.
AMBIGUOUS = [
    ("bert", {"intermediate_size": 24}),
    ("roberta", {"intermediate_size": 12}),
    ("modernbert", {"intermediate_size": 24}),
    ("gpt2", {"n_inner": 24}),
    ("llama", {**EQUAL, "num_key_value_heads": 3}),
    ("mistral", {"intermediate_size": 8}),
    ("phi3", {"intermediate_size": 12}),
    ("opt", {"ffn_dim": 24}),
    ("t5", {"d_ff": 24, "d_kv": 6}),
    ("flan-t5", {"d_ff": 12, "d_kv": 6}),
    ("bart", {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}),
]


@pytest.mark.parametrize(
    ("name", "changes"), [(name, {}) for name, tiny in ALL.items() if tiny.mlp] + AMBIGUOUS
)
def test_every_block_has_the_modules_that_its_authors_named(name, changes):
    model = ALL[name].build(**changes)
    for stack in find_anatomy(model).stacks.values():
        for (layer, site), tap in stack.taps.items():
            if site != "hidden" and getattr(ALL[name], site):
                assert tap.module is model.get_submodule(ALL[name].path(stack.name, site, layer))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert", "ForSequenceClassification"),
        ("gpt2", "LMHeadModel"),
        ("llama", "ForCausalLM"),
        ("t5", "ForConditionalGeneration"),
        ("bart", "ForConditionalGeneration"),
    ],
)
def test_a_head_changes_nothing(name, kind):
    headed = find_anatomy(TINY[name].build(kind))
    assert widths_of(headed) == widths_of(find_anatomy(TINY[name].build()))


def test_layers_are_counted():
    assert find_anatomy(TINY["bert"].build()).n_layers == 3
    assert find_anatomy(TINY["albert"].build()).n_layers == 4
    t5 = find_anatomy(TINY["t5"].build())
    assert t5.n_layers == 3
    assert [len(stack.blocks) for stack in t5.stacks.values()] == [2, 3]


def test_a_model_cut_short_has_the_layers_that_are_left():
    model = TINY["bert"].build()
    model.encoder.layer = model.encoder.layer[:2]
    assert find_anatomy(model).n_layers == 2


def test_half_of_a_model_has_one_stack():
    with torch.device("meta"):
        half = transformers.T5EncoderModel(TINY["t5"].config())
    (stack,) = find_anatomy(half).stacks.values()
    assert len(stack.blocks) == 2


def test_a_block_used_twice_has_two_turns():
    model = TINY["llama"].build()
    model.layers[2] = model.layers[1]
    stack = find_anatomy(model).stacks[None]
    assert [stack.tap(layer, "mlp").turn for layer in (1, 2, 3)] == [0, 0, 1]
    assert [stack.tap(layer, "hidden").turn for layer in (0, 1, 2)] == [0, 0, 1]


def test_blocks_may_differ_in_width():
    model = TINY["llama"].build()
    model.layers[1].mlp.down_proj = nn.Linear(56, 24)
    stack = find_anatomy(model).stacks[None]
    assert [stack.tap(layer, "mlp").width for layer in (1, 2, 3)] == [40, 56, 40]


def test_the_text_part_of_a_model_with_other_senses():
    with torch.device("meta"):
        tiny = TINY["gemma3"]
        vision = {"hidden_size": 16, "num_hidden_layers": 5, "intermediate_size": 4000}
        vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        config = transformers.Gemma3Config(text_config=tiny.config(), vision_config=vision)
        model = transformers.AutoModel.from_config(config)
    anatomy = find_anatomy(model)
    assert widths_of(anatomy) == widths_of(find_anatomy(tiny.build()))
    assert anatomy.stacks[None].blocks[0] is model.language_model.layers[0]


class _Gated(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.attention = nn.Module()
        self.attention.wo = nn.Linear(8, 8)
        self.feed_forward = nn.Module()
        for name in names:
            setattr(self.feed_forward, name, nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("names", "down"),
    [("w1 w2 w3", "w2"), ("gate_proj up_proj down_proj", "down_proj"), ("fc1 fc2", "fc2")],
)
def test_a_feed_forward_part_is_understood_by_its_names_where_shapes_are_equal(names, down):
    block = _Gated(names.split())
    assert find_sites(block, 8, {})["mlp"].module is getattr(block.feed_forward, down)


@peft_warns
def test_adapted_linear_modules_are_linear_modules():
    peft = pytest.importorskip("peft")
    model = TINY["llama"].build("ForCausalLM")
    expected = widths_of(find_anatomy(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    anatomy = find_anatomy(adapted)
    assert widths_of(anatomy) == expected
    assert "lora" in type(anatomy.stacks[None].tap(1, "mlp").module).__module__


@peft_warns
def test_a_learned_prompt_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(TINY["gpt2"].build("LMHeadModel"), config)
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        find_anatomy(model)


class _EightBit(nn.Module):
    """What quantisers put in the place of a linear module: another class, the same attributes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", linear.weight.detach().to(torch.int8))


def test_quantised_linear_modules_are_linear_modules():
    model = TINY["llama"].build()
    expected = widths_of(find_anatomy(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, _EightBit(module))
    assert widths_of(find_anatomy(model)) == expected


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_has_no_neurons_to_compare(name):
    stack = find_anatomy(MIXTURES[name].build()).stacks[None]
    assert stack.tap(3, "hidden").width == 24
    with pytest.raises(ValueError, match=r"layer 1 .* no site='mlp': .* mixture of experts"):
        stack.tap(1, "mlp")


@pytest.mark.parametrize("site", ["mlp", "attention"])
def test_a_state_space_model_has_hidden_states_only(site):
    stack = find_anatomy(MAMBA.build()).stacks[None]
    assert stack.tap(3, "hidden").width == 24
    with pytest.raises(ValueError, match=rf"layer 1 \(MambaBlock\) has no site='{site}'"):
        stack.tap(1, site)


def test_what_is_not_there_is_named():
    stack = find_anatomy(TINY["bert"].build()).stacks[None]
    with pytest.raises(ValueError, match=r"layer 0 .* no site='mlp'.* from 1 to 3"):
        stack.tap(0, "mlp")


class _GatedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))


def test_a_network_inside_a_norm_is_not_the_blocks():
    model = TINY["llama"].build()
    for block in model.layers:
        block.late_layernorm = _GatedNorm()
    stack = find_anatomy(model).stacks[None]
    assert stack.tap(2, "mlp").module is model.layers[1].mlp.down_proj


def test_blocks_may_be_in_a_sequence():
    model = TINY["bert"].build()
    expected = widths_of(find_anatomy(model))
    model.encoder.layer = nn.Sequential(*model.encoder.layer)
    assert widths_of(find_anatomy(model)) == expected


def test_an_unknown_anatomy_names_the_parts():
    model = TINY["bert"].build()
    blocks = model.encoder.layer
    model.encoder.layer = nn.Module()
    for i, block in enumerate(blocks):
        model.encoder.layer.add_module(f"number{i}", block)
    with pytest.raises(ValueError, match=r"encoder \(BertEncoder of 1 x Module\)"):
        find_anatomy(model)


def test_an_ambiguous_anatomy_names_the_candidates():
    model = TINY["llama"].build()
    model.more_layers = TINY["llama"].build(num_hidden_layers=2).layers
    with pytest.raises(ValueError, match=r"layers \(3 x LlamaDecoderLayer\), more_layers \(2 x"):
        find_anatomy(model)
