"""One forward pass: every layer, site and pooling, as transformers itself returns them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from forward_pass import BY_HAND, CLOSE, alone, assert_pooled, columns, n_blocks, read, segments_of
from tiny_models import ALL, TINY, tiny_batch

from skspin._layout import Segment
from skspin._model.anatomy import find_anatomy


def states_of(output, stack):
    prefix = "" if stack is None else f"{stack}_"
    return [state[0] for state in output[f"{prefix}hidden_states"]]


def place_of(segment):
    return segment.stack, segment.layer, segment.site


@contextmanager
def inputs_of(model, paths):
    """Keep what goes into some linear modules, with plain PyTorch."""
    kept = {}
    handles = []
    for key, path in paths.items():
        module = model.get_submodule(path)

        def keep(module, args, key=key):
            kept[key] = args[0].reshape(-1, args[0].shape[-1])

        handles.append(module.register_forward_pre_hook(keep))
    yield kept
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ALL)
def test_hidden_states_equal_those_that_the_model_returns(name):
    model = ALL[name].build()
    stacks = find_anatomy(model).stacks
    batch = tiny_batch()
    segments = segments_of(model, ["hidden"], BY_HAND)
    X = read(model, segments, batch)
    assert X.dtype == torch.float32 and len(X) == len(batch["input_ids"])
    for row in range(len(X)):
        output = alone(model, batch, row)
        states = {stack: states_of(output, stack) for stack in stacks}
        for stack in states:
            assert len(states[stack]) == len(stacks[stack].blocks) + 1
        assert_pooled(X[row], segments, lambda s, states=states: states[s.stack][s.layer])


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].mlp or ALL[name].attention])
def test_neurons_are_what_goes_into_the_named_linear_module(name):
    model = ALL[name].build()
    batch = tiny_batch()
    sites = [site for site in ("mlp", "attention") if getattr(ALL[name], site)]
    segments = segments_of(model, sites, BY_HAND)
    layers = range(1, n_blocks(model) + 1)
    assert {(s.layer, s.site) for s in segments} == set(product(layers, sites))
    X = read(model, segments, batch)
    paths = {place_of(s): ALL[name].path(s.stack, s.site, s.layer) for s in segments}
    for row, real in enumerate(batch["attention_mask"].sum(1)):
        with inputs_of(model, paths) as kept:
            alone(model, batch, row)
        # Longformer's has more tokens.
        assert_pooled(X[row], segments, lambda s, kept=kept, real=real: kept[place_of(s)][:real])


def xlnets_heads(model, vectors):
    for block in model.layer:
        core = block.rel_attn.rel_attn_core

        def record(*args, core=core, **kwargs):
            given = core(*args, **kwargs)  # (n_tokens, 1, n_heads, head_width)
            vectors.append(given[:, 0].flatten(1))
            return given

        block.rel_attn.rel_attn_core = record


def alberts(path):
    def record(model, vectors):
        for group in model.encoder.albert_layer_groups:
            module = group.albert_layers[0].get_submodule(path)
            module.register_forward_pre_hook(lambda _, args: vectors.append(args[0][0]))

    return record


@pytest.mark.parametrize(
    ("name", "site", "record"),
    [
        # What a parameter is multiplied with, and blocks that have two turns each.
        ("xlnet", "attention", xlnets_heads),
        ("albert", "mlp", alberts("ffn_output")),
        ("albert", "attention", alberts("attention.dense")),
    ],
)
def test_neurons_that_no_one_linear_module_takes(name, site, record):
    model = TINY[name].build()
    batch = tiny_batch()
    segments = segments_of(model, [site], ["max", "last"])
    X = read(model, segments, batch)
    vectors = []  # by block
    record(model, vectors)
    for row in range(len(X)):
        vectors.clear()
        alone(model, batch, row)
        assert len(vectors) == n_blocks(model) == len(segments) / 2
        assert_pooled(X[row], segments, lambda segment: vectors[segment.layer - 1])


def test_a_decoder_taken_out_of_its_model():
    model, batch = TINY["bart"].build("ForCausalLM"), tiny_batch()
    segments = segments_of(model, ["hidden"])
    X = read(model, segments, batch)
    for row in range(len(X)):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][real][None]
        states = model(ids, output_hidden_states=True).hidden_states
        assert_pooled(X[row], segments, lambda segment, states=states: states[segment.layer][0])


@pytest.mark.parametrize("name", ["bert", "xlnet", "gpt2", "distilbert"])
def test_whatever_else_the_model_takes_by_token_is_passed_on(name):
    model = TINY[name].build()
    batch = tiny_batch()
    types = torch.arange(7).expand(5, 7) % 2 * batch["attention_mask"]
    segments = segments_of(model, ["hidden"], BY_HAND)
    X = read(model, segments, {**batch, "token_type_ids": types})
    takes_types = name != "distilbert"
    assert takes_types != torch.allclose(X, read(model, segments, batch), atol=1e-3)
    for row in range(len(X)):
        output = alone(model, {**batch, "token_type_ids": types} if takes_types else batch, row)
        states = output.hidden_states
        assert_pooled(X[row], segments, lambda segment, states=states: states[segment.layer][0])


def test_chosen_neurons_in_any_order_equal_those_columns_of_all_to_the_bit():
    model = TINY["llama"].build()
    segments = segments_of(model, poolings=BY_HAND)
    X = read(model, segments)
    chosen = {s: (0, 7, s.width - 1) for s in segments}
    some = [replace(segment, neurons=chosen[segment]) for segment in segments[::-1]]
    expected = [X[:, where][:, chosen[segment]] for segment, where in columns(segments)]
    assert torch.equal(read(model, some), torch.cat(expected[::-1], dim=1))


def test_two_models_in_one_encoder_decoder():
    bert = TINY["bert"].config(is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig(
        encoder=TINY["bert"].config().to_dict(),
        decoder=bert.to_dict(),
        decoder_start_token_id=1,
    )
    model = transformers.EncoderDecoderModel(config).eval()
    batch = tiny_batch()
    segments = segments_of(model, ["hidden"])
    X = read(model, segments, batch)
    output = alone(model, batch, 1)
    assert_pooled(X[1], segments, lambda s: output[f"{s.stack}_hidden_states"][s.layer][0])


# PEFT asks transformers for what transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_an_adapter_is_in_effect():
    peft = pytest.importorskip("peft")
    plain = TINY["gpt2"].build("LMHeadModel")
    segments = segments_of(plain, ("hidden", "mlp"))
    X = read(plain, segments)
    config = peft.LoraConfig(
        target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )
    adapted = peft.get_peft_model(plain, config)
    assert not torch.allclose(read(adapted, segments), X, atol=1e-3)
    with adapted.disable_adapter():
        torch.testing.assert_close(read(adapted, segments), X)


def test_weights_may_be_elsewhere_until_they_are_needed():
    accelerate = pytest.importorskip("accelerate")
    model = TINY["llama"].build()
    segments = segments_of(model)
    X = read(model, segments)
    model = accelerate.cpu_offload(model, execution_device="cpu")
    for wanted in (segments, segments[:3]):
        early = read(model, wanted)
        torch.testing.assert_close(early, X[:, : early.shape[1]])
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_way_attention_is_computed_changes_nothing(implementation):
    model = TINY["llama"].build()
    segments = segments_of(model, ("hidden", "attention"), BY_HAND)
    X = read(model, segments)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(read(model, segments), X, **CLOSE)


def test_a_decoder_reads_the_text_behind_the_token_that_generation_starts_with():
    model = TINY["t5"].build()
    embeddings = model.shared.weight
    batch = tiny_batch()
    first, last = (Segment("decoder", 0, "hidden", pooling, 24) for pooling in ("first", "last"))
    torch.testing.assert_close(
        read(model, [first])[0], embeddings[model.config.decoder_start_token_id]
    )
    # As many tokens as the text has: its own last one is only there to be told.
    torch.testing.assert_close(read(model, [last])[0], embeddings[batch["input_ids"][0, -2]])
    model.config.decoder_start_token_id = model.config.bos_token_id = None
    torch.testing.assert_close(read(model, [first])[0], embeddings[model.config.pad_token_id])
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        read(model, [first])


def test_a_bfloat16_model_is_pooled_in_float32():
    model = TINY["llama"].build()
    segments = segments_of(model, poolings=BY_HAND)
    X = read(model, segments)
    half = read(model.bfloat16(), segments)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(X, half).min() > 0.999
