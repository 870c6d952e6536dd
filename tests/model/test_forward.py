"""One forward pass: every layer, site and pooling, as transformers itself returns them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import transformers
from forward_pass import BY_HAND, CLOSE, alone, columns, read, segments_of
from tiny_models import ALL, TINY, tiny_batch

from skspin._layout import Segment
from skspin._model.anatomy import find_anatomy


def states_of(output, stack):
    prefix = "" if stack is None else f"{stack}_"
    states = [state[0] for state in output[f"{prefix}hidden_states"]]
    # transformers 4 leaves ModernBERT's final norm out of the last of them.
    last = "encoder_last_hidden_state" if stack == "encoder" else "last_hidden_state"
    if transformers.__version__ < "5":
        states[-1] = output[last][0]
    torch.testing.assert_close(states[-1], output[last][0])
    return states


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
        for segment, where in columns(segments):
            expected = BY_HAND[segment.pooling](states[segment.stack][segment.layer])
            torch.testing.assert_close(X[row, where], expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "site"),
    [(name, site) for name in ALL for site in ("mlp", "attention") if getattr(ALL[name], site)],
)
def test_neurons_are_what_goes_into_the_named_linear_module(name, site):
    model = ALL[name].build()
    batch = tiny_batch()
    segments = segments_of(model, [site], BY_HAND)
    n_layers = find_anatomy(model).n_layers
    assert {segment.layer for segment in segments} == set(range(1, n_layers + 1))
    X = read(model, segments, batch)
    paths = {(s.stack, s.layer): ALL[name].path(s.stack, site, s.layer) for s in segments}
    for row, real in enumerate(batch["attention_mask"].sum(1)):
        with inputs_of(model, paths) as kept:
            alone(model, batch, row)
        for segment, where in columns(segments):
            tokens = kept[segment.stack, segment.layer][:real]  # Longformer's has more
            assert tokens.shape[1] == segment.width
            torch.testing.assert_close(X[row, where], BY_HAND[segment.pooling](tokens), **CLOSE)


def test_attention_of_xlnet_is_what_its_parameter_is_multiplied_with(monkeypatch):
    model = TINY["xlnet"].build()
    batch = tiny_batch()
    segments = segments_of(model, ["attention"], ["mean", "last"])
    X = read(model, segments, batch)
    heads = []
    for block in model.layer:
        core = block.rel_attn.rel_attn_core

        def record(*args, core=core, **kwargs):
            vectors = core(*args, **kwargs)  # (n_tokens, 1, n_heads, head_width)
            heads.append(vectors[:, 0].flatten(1))
            return vectors

        monkeypatch.setattr(block.rel_attn, "rel_attn_core", record)
    for row in range(len(X)):
        heads.clear()
        alone(model, batch, row)
        for segment, where in columns(segments):
            expected = BY_HAND[segment.pooling](heads[segment.layer - 1])
            torch.testing.assert_close(X[row, where], expected, **CLOSE)


@pytest.mark.parametrize("site", ["mlp", "attention"])
def test_a_shared_block_has_neurons_at_each_of_its_turns(site):
    model = TINY["albert"].build()
    batch = tiny_batch()
    segments = segments_of(model, [site], ["max"])
    assert [segment.layer for segment in segments] == [1, 2, 3, 4]
    X = read(model, segments, batch)
    calls = []
    for group in model.encoder.albert_layer_groups:
        block = group.albert_layers[0]
        module = block.ffn_output if site == "mlp" else block.attention.dense
        module.register_forward_pre_hook(lambda _, args: calls.append(args[0][0]))
    for row in range(len(X)):
        calls.clear()
        alone(model, batch, row)
        torch.testing.assert_close(X[row], torch.cat([t.amax(0) for t in calls]), **CLOSE)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_the_order_of_texts_and_their_company_change_nothing(name):
    model = TINY[name].build()
    segments = segments_of(model, poolings=BY_HAND)
    X = read(model, segments)
    for rows in ([4, 2, 0, 3, 1], [1, 2]):
        batch = {key: values[rows] for key, values in tiny_batch().items()}
        torch.testing.assert_close(read(model, segments, batch), X[rows])


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
        for segment, where in columns(segments):
            expected = BY_HAND[segment.pooling](output.hidden_states[segment.layer][0])
            torch.testing.assert_close(X[row, where], expected, **CLOSE)


@pytest.mark.parametrize("pooling", BY_HAND)
@pytest.mark.parametrize("site", ["hidden", "mlp", "attention"])
def test_chosen_neurons_equal_those_columns_of_all_to_the_bit(site, pooling):
    model = TINY["llama"].build()
    (whole,) = segments_of(model, [site], [pooling], [2])
    chosen = (0, 7, whole.width - 1)
    some = Segment(None, 2, site, pooling, whole.width, chosen)
    assert torch.equal(read(model, [some]), read(model, [whole])[:, list(chosen)])


def test_columns_come_in_the_order_asked_for():
    model = TINY["bert"].build()
    segments = segments_of(model, ("hidden", "mlp"), ("mean", "max"))
    X = read(model, segments)
    parts = [X[:, where] for _, where in columns(segments)]
    torch.testing.assert_close(read(model, segments[::-1]), torch.cat(parts[::-1], dim=1))


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
    for segment, where in columns(segments):
        expected = output[f"{segment.stack}_hidden_states"][segment.layer][0].mean(0)
        torch.testing.assert_close(X[1, where], expected, **CLOSE)


def test_a_bfloat16_model_is_pooled_in_float32():
    model = TINY["llama"].build()
    segments = segments_of(model, poolings=BY_HAND)
    X = read(model, segments)
    half = read(model.bfloat16(), segments)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(X, half).min() > 0.999


# PEFT asks transformers for what transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("site", ["hidden", "mlp"])
def test_an_adapter_is_in_effect(site):
    peft = pytest.importorskip("peft")
    plain = TINY["gpt2"].build("LMHeadModel")
    segments = segments_of(plain, [site])
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
