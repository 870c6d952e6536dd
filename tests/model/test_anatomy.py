from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import ALL, TINY
from torch import nn

from skspin._model.anatomy import find_anatomy

# PEFT asks transformers for what transformers is about to rename.
peft_warns = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def widths_of(model):
    return {
        (stack.name, *place): tap.width
        for stack in find_anatomy(model).stacks.values()
        for place, tap in stack.taps.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_a_configuration_is_enough(name):
    with torch.device("meta"):
        skeleton = transformers.AutoModel.from_config(ALL[name].config())
    assert widths_of(skeleton) == widths_of(ALL[name].build())


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


def test_up_projections_that_are_numbered_are_told_from_the_down_projection():
    model = TINY["llama"].build()
    for block in model.layers:
        block.mlp = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("w1", "w2", "w3")})
    stack = find_anatomy(model).stacks[None]
    assert stack.tap(2, "mlp").module is model.layers[1].mlp["w2"]


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
    assert widths_of(TINY[name].build(kind)) == widths_of(TINY[name].build())


class _EightBit(nn.Module):
    """What quantisers put in the place of a linear module: another class, the same attributes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", linear.weight.detach().to(torch.int8))


class _GatedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))


def quantised(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, _EightBit(module))


def with_a_network_in_a_norm(model):
    for block in model.layers:
        block.late_layernorm = _GatedNorm()


def with_blocks_in_a_sequence(model):
    model.layers = nn.Sequential(*model.layers)


@pytest.mark.parametrize("change", [quantised, with_a_network_in_a_norm, with_blocks_in_a_sequence])
def test_what_blocks_are_made_of_and_kept_in_changes_nothing(change):
    model = TINY["llama"].build()
    expected = widths_of(model)
    change(model)
    assert widths_of(model) == expected
    tap = find_anatomy(model).stacks[None].tap(2, "mlp")
    assert tap.module is model.get_submodule("layers.1.mlp.down_proj")


@peft_warns
def test_adapted_linear_modules_are_linear_modules():
    peft = pytest.importorskip("peft")
    model = TINY["llama"].build("ForCausalLM")
    expected = widths_of(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert widths_of(adapted) == expected
    assert "lora" in type(find_anatomy(adapted).stacks[None].tap(1, "mlp").module).__module__


def test_a_router_of_something_else_makes_no_mixture_of_experts():
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_shared_layers": 0}
    sizes |= {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "vocab_size": 60}
    sparsity = {"activation_sparsity_pattern": [0.0, 0.0], "vocab_size_per_layer_input": 60}
    layers = {"layer_types": ["full_attention"] * 2}
    config = transformers.Gemma3nTextConfig(**sizes, **heads, **sparsity, **layers)
    with torch.device("meta"):
        model = transformers.Gemma3nTextModel(config)
    tap = find_anatomy(model).stacks[None].tap(2, "mlp")
    assert tap.module is model.layers[1].mlp.down_proj and tap.width == 40


@peft_warns
@pytest.mark.parametrize("disabled", [False, True])
def test_of_several_copies_of_a_module_the_one_that_runs_is_read(disabled):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    model = peft.get_peft_model(TINY["llama"].build(), config)
    model.add_adapter("other", config)
    if disabled:
        model.base_model.disable_adapter_layers()
    copies = model.base_model.model.layers[1].mlp
    in_use = copies.original_module if disabled else copies.modules_to_save["default"]
    assert find_anatomy(model).stacks[None].tap(2, "mlp").module is in_use.down_proj


@peft_warns
def test_a_learned_prompt_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(TINY["gpt2"].build("LMHeadModel"), config)
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        find_anatomy(model)


def test_blocks_are_counted_as_they_run():
    cut_short = TINY["bert"].build()
    cut_short.encoder.layer = cut_short.encoder.layer[:2]
    half = transformers.T5EncoderModel(TINY["t5"].config())
    models = [TINY[name].build() for name in ("bert", "albert", "t5")] + [cut_short, half]
    counts = [
        [len(stack.blocks) for stack in find_anatomy(model).stacks.values()] for model in models
    ]
    assert counts == [[3], [4], [2, 3], [2], [2]]


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
    assert widths_of(model) == widths_of(tiny.build())
    assert find_anatomy(model).stacks[None].blocks[0] is model.language_model.layers[0]


@pytest.mark.parametrize(
    ("name", "layer", "site", "reason"),
    [
        ("bert", 0, "mlp", r"layer 0 .* no site='mlp'.* from 1 to 3"),
        ("mixtral", 1, "mlp", r"layer 1 .* no site='mlp': .* mixture of experts"),
        ("qwen3-moe", 1, "mlp", r"layer 1 .* no site='mlp': .* mixture of experts"),
        ("mamba", 1, "mlp", r"layer 1 \(MambaBlock\) has no site='mlp'"),
        ("mamba", 1, "attention", r"layer 1 \(MambaBlock\) has no site='attention'"),
    ],
)
def test_a_site_that_a_layer_does_not_have_is_named_with_the_reason(name, layer, site, reason):
    stack = find_anatomy(ALL[name].build()).stacks[None]
    assert stack.tap(3, "hidden").width == 24
    with pytest.raises(ValueError, match=reason):
        stack.tap(layer, site)


def test_blocks_that_can_not_be_told_are_refused_with_what_there_is():
    model = TINY["bert"].build()
    blocks = model.encoder.layer
    model.encoder.layer = nn.Module()
    for i, block in enumerate(blocks):
        model.encoder.layer.add_module(f"number{i}", block)
    with pytest.raises(ValueError, match=r"encoder \(BertEncoder of 1 x Module\)"):
        find_anatomy(model)
    model = TINY["llama"].build()
    model.more_layers = TINY["llama"].build(num_hidden_layers=2).layers
    with pytest.raises(ValueError, match=r"layers \(3 x LlamaDecoderLayer\), more_layers \(2 x"):
        find_anatomy(model)
