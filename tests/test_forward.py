from __future__ import annotations

import gc
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
import transformers
from tiny_models import MAMBA, MIXTURES, TINY, tiny_batch

from skspin._extraction.anatomy import Tap, find_anatomy
from skspin._extraction.forward import pooled_forward
from skspin._extraction.listening import as_texts
from skspin._layout import Segment

BY_HAND = {
    "mean": lambda tokens: tokens.mean(0),
    "max": lambda tokens: tokens.amax(0),
    "first": lambda tokens: tokens[0],
    "last": lambda tokens: tokens[-1],
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def segments_of(anatomy, sites=("hidden",), poolings=("mean",), layers=None):
    return [
        Segment(stack.name, layer, site, pooling, tap.width)
        for stack in anatomy.stacks.values()
        for (layer, site), tap in sorted(stack.taps.items())
        if site in sites and (layers is None or layer in layers)
        for pooling in poolings
    ]


def alone(model, batch, row):
    """Run one text without padding, as transformers documents it."""
    real = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row][real][None]
    inputs = {"input_ids": ids, "output_hidden_states": True}
    if model.config.is_encoder_decoder:
        start = torch.full((1, 1), model.config.decoder_start_token_id)
        inputs["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], 1)
        inputs["use_cache"] = False
    with torch.no_grad():
        return model(**inputs)


def states_of(output, stack):
    prefix = "" if stack is None else f"{stack}_"
    states = [state[0] for state in output[f"{prefix}hidden_states"]]
    # transformers 4 leaves ModernBERT's final norm out of the last of them.
    last = "encoder_last_hidden_state" if stack == "encoder" else "last_hidden_state"
    if transformers.__version__ < "5":
        states[-1] = output[last][0]
    torch.testing.assert_close(states[-1], output[last][0])
    return states


def columns(segments):
    start = 0
    for segment in segments:
        yield segment, slice(start, start + segment.n_columns)
        start += segment.n_columns


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


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("name", [*TINY, *MIXTURES, "mamba"])
def test_hidden_states_equal_those_that_the_model_returns(name, padding_side):
    model = {**TINY, **MIXTURES, "mamba": MAMBA}[name].build()
    anatomy = find_anatomy(model)
    batch = tiny_batch(padding_side)
    segments = segments_of(anatomy, poolings=BY_HAND)
    X = pooled_forward(model, anatomy, batch, segments)
    assert X.dtype == torch.float32 and len(X) == len(batch["input_ids"])
    for row in range(len(X)):
        output = alone(model, batch, row)
        states = {stack: states_of(output, stack) for stack in anatomy.stacks}
        for stack in states:
            assert len(states[stack]) == len(anatomy.stacks[stack].blocks) + 1
        for segment, where in columns(segments):
            expected = BY_HAND[segment.pooling](states[segment.stack][segment.layer])
            torch.testing.assert_close(X[row, where], expected, **CLOSE)


@pytest.mark.parametrize("site", ["mlp", "attention"])
@pytest.mark.parametrize(
    "name", [name for name, tiny in TINY.items() if tiny.mlp] + ["mixtral", "qwen3-moe"]
)
def test_neurons_are_what_goes_into_the_named_linear_module(name, site):
    tiny = {**TINY, **MIXTURES}[name]
    if getattr(tiny, site) is None:
        pytest.skip("the architecture has no such module")
    model = tiny.build()
    anatomy = find_anatomy(model)
    batch = tiny_batch("left")
    segments = segments_of(anatomy, [site], BY_HAND)
    assert {segment.layer for segment in segments} == set(range(1, anatomy.n_layers + 1))
    X = pooled_forward(model, anatomy, batch, segments)
    paths = {(s.stack, s.layer): tiny.path(s.stack, site, s.layer) for s in segments}
    for row, real in enumerate(batch["attention_mask"].sum(1)):
        with inputs_of(model, paths) as kept:
            alone(model, batch, row)
        for segment, where in columns(segments):
            tokens = kept[segment.stack, segment.layer][:real]  # Longformer's has more
            assert tokens.shape[1] == segment.width
            torch.testing.assert_close(X[row, where], BY_HAND[segment.pooling](tokens), **CLOSE)


def test_attention_of_xlnet_is_what_its_parameter_is_multiplied_with(monkeypatch):
    model = TINY["xlnet"].build()
    anatomy = find_anatomy(model)
    batch = tiny_batch()
    segments = segments_of(anatomy, ["attention"], ["mean", "last"])
    X = pooled_forward(model, anatomy, batch, segments)
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
    anatomy = find_anatomy(model)
    batch = tiny_batch()
    segments = segments_of(anatomy, [site], ["max"])
    assert [segment.layer for segment in segments] == [1, 2, 3, 4]
    X = pooled_forward(model, anatomy, batch, segments)
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
    anatomy = find_anatomy(model)
    segments = segments_of(anatomy, ("hidden", "mlp", "attention"), BY_HAND)
    batch = tiny_batch()
    X = pooled_forward(model, anatomy, batch, segments)
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = {key: values[order] for key, values in batch.items()}
    torch.testing.assert_close(pooled_forward(model, anatomy, shuffled, segments), X[order])
    pair = {key: values[1:3] for key, values in batch.items()}
    torch.testing.assert_close(pooled_forward(model, anatomy, pair, segments), X[1:3])


def test_neurons_choose_columns():
    model = TINY["llama"].build()
    anatomy = find_anatomy(model)
    whole = Segment(None, 2, "mlp", "max", 40)
    some = Segment(None, 2, "mlp", "max", 40, neurons=(0, 7, 39))
    X = pooled_forward(model, anatomy, tiny_batch(), [whole])
    assert torch.equal(pooled_forward(model, anatomy, tiny_batch(), [some]), X[:, [0, 7, 39]])


def test_columns_come_in_the_order_asked_for():
    model = TINY["bert"].build()
    anatomy = find_anatomy(model)
    segments = segments_of(anatomy, ("hidden", "mlp"), ("mean", "max"))
    X = pooled_forward(model, anatomy, tiny_batch(), segments)
    backwards = pooled_forward(model, anatomy, tiny_batch(), segments[::-1])
    parts = [X[:, where] for _, where in columns(segments)]
    torch.testing.assert_close(backwards, torch.cat(parts[::-1], dim=1))


def count_calls(modules):
    """Count the calls of modules; give the counts and the hooks to remove."""
    counts = [0] * len(modules)
    handles = []
    for i, module in enumerate(modules):

        def called(*_, i=i):
            counts[i] += 1

        handles.append(module.register_forward_pre_hook(called))
    return counts, handles


@pytest.mark.parametrize(
    ("layer", "site", "n_blocks_run"), [(0, "hidden", 0), (1, "mlp", 1), (1, "hidden", 1)]
)
def test_the_pass_stops_after_the_deepest_layer(layer, site, n_blocks_run):
    model = TINY["llama"].build("ForCausalLM")
    anatomy = find_anatomy(model)
    block = model.model.layers
    counts, _ = count_calls([*(b.mlp.up_proj for b in block), model.model.norm, model.lm_head])
    width = anatomy.stacks[None].width(layer, site)
    pooled_forward(model, anatomy, tiny_batch(), [Segment(None, layer, site, "mean", width)])
    assert counts == [1] * n_blocks_run + [0] * (5 - n_blocks_run)


def test_logits_are_never_computed():
    for name, kind in [("llama", "ForCausalLM"), ("t5", "ForConditionalGeneration")]:
        model = TINY[name].build(kind)
        anatomy = find_anatomy(model)
        counts, _ = count_calls([model.lm_head])
        pooled_forward(model, anatomy, tiny_batch(), segments_of(anatomy))
        assert counts == [0]


def test_the_encoder_runs_without_the_decoder():
    model = TINY["t5"].build()
    anatomy = find_anatomy(model)
    counts, _ = count_calls([model.decoder])
    both = segments_of(anatomy)
    pooled_forward(model, anatomy, tiny_batch(), [s for s in both if s.stack == "encoder"])
    assert counts == [0]
    pooled_forward(model, anatomy, tiny_batch(), both)
    assert counts == [1]


def hooks_of(model):
    return [
        (name, list(module._forward_pre_hooks), list(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def test_the_model_comes_back_as_it_was():
    model = TINY["xlnet"].build(output_hidden_states=True, output_attentions=True).train()
    model.layer[1].eval()
    modes = [module.training for module in model.modules()]
    before, settings = hooks_of(model), model.config.to_dict()
    anatomy = find_anatomy(model)
    segments = segments_of(anatomy, ("hidden", "mlp", "attention"))
    pooled_forward(model, anatomy, tiny_batch(), segments)
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == before
    assert model.config.to_dict() == settings
    output = model(tiny_batch()["input_ids"])
    output.last_hidden_state.sum().backward()  # nothing in it has become untrainable


def test_a_failed_pass_leaves_no_trace():
    model = TINY["bert"].build().train()
    anatomy = find_anatomy(model)

    def fail(*_):
        raise FloatingPointError("the model's own")

    model.encoder.layer[1].register_forward_hook(fail)
    before = hooks_of(model)
    with pytest.raises(FloatingPointError, match="own"):
        pooled_forward(model, anatomy, tiny_batch(), segments_of(anatomy))
    assert hooks_of(model) == before
    assert all(module.training for module in model.modules())


def test_no_activations_are_kept_behind_the_reader():
    model = TINY["llama"].build()
    anatomy = find_anatomy(model)
    segments = segments_of(anatomy, ("hidden", "mlp", "attention"))
    seen = []
    alive = []

    def watch(module, args):
        alive.append(sum(activations() is not None for activations in seen))
        seen.append(weakref.ref(args[0]))

    for block in model.layers:
        block.mlp.down_proj.register_forward_pre_hook(watch)
    gc.disable()  # on a GPU, waiting for the collector is running out of memory
    try:
        pooled_forward(model, anatomy, tiny_batch(), segments)
        alive.append(sum(activations() is not None for activations in seen))
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]


def test_two_models_in_one_encoder_decoder():
    bert = TINY["bert"].config(is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig(
        encoder=TINY["bert"].config().to_dict(),
        decoder=bert.to_dict(),
        decoder_start_token_id=1,
    )
    model = transformers.EncoderDecoderModel(config).eval()
    anatomy = find_anatomy(model)
    batch = tiny_batch("left")
    segments = segments_of(anatomy)
    X = pooled_forward(model, anatomy, batch, segments)
    output = alone(model, batch, 1)
    for segment, where in columns(segments):
        expected = output[f"{segment.stack}_hidden_states"][segment.layer][0].mean(0)
        torch.testing.assert_close(X[1, where], expected, **CLOSE)


def test_dropout_is_off():
    model = TINY["bert"].build().train()
    anatomy = find_anatomy(model)
    first, second = (
        pooled_forward(model, anatomy, tiny_batch(), segments_of(anatomy)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_a_pass_of_the_owner_in_another_thread_is_neither_read_nor_stopped():
    model = TINY["gpt2"].build()
    anatomy = find_anatomy(model)
    segments = [Segment(None, 1, "hidden", "mean", 24), Segment(None, 1, "mlp", "max", 40)]
    expected = pooled_forward(model, anatomy, tiny_batch(), segments)
    ids = tiny_batch()["input_ids"][:1]
    states = model(ids, output_hidden_states=True).hidden_states
    seen = []

    def owners_pass():
        seen.append(model(ids, output_hidden_states=True).hidden_states)

    def meanwhile(*_):
        if threading.current_thread() is threading.main_thread():
            owner = threading.Thread(target=owners_pass)
            owner.start()
            owner.join()

    handle = model.h[0].register_forward_pre_hook(meanwhile)
    X = pooled_forward(model, anatomy, tiny_batch(), segments)
    handle.remove()
    torch.testing.assert_close(X, expected)
    torch.testing.assert_close(seen[0], states)


def test_two_threads_share_a_model():
    model = TINY["xlnet"].build().train()
    anatomy = find_anatomy(model)
    jobs = [segments_of(anatomy, [site], ["mean"]) for site in ("hidden", "mlp", "attention")]
    expected = [pooled_forward(model, anatomy, tiny_batch(), job) for job in jobs]
    failures = []

    def work(i):
        for _ in range(20):
            X = pooled_forward(model, anatomy, tiny_batch(), jobs[i])
            if not torch.allclose(X, expected[i], atol=1e-6):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(module.training for module in model.modules())


def test_a_bfloat16_model_is_pooled_in_float32():
    model = TINY["llama"].build()
    anatomy = find_anatomy(model)
    segments = segments_of(anatomy, ("hidden", "mlp", "attention"), BY_HAND)
    X = pooled_forward(model, anatomy, tiny_batch(), segments)
    half = pooled_forward(model.bfloat16(), anatomy, tiny_batch(), segments)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(X, half).min() > 0.999


# PEFT asks transformers for what transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("site", ["hidden", "mlp"])
def test_an_adapter_is_in_effect(site):
    peft = pytest.importorskip("peft")
    plain = TINY["gpt2"].build("LMHeadModel")
    anatomy = find_anatomy(plain)
    segments = segments_of(anatomy, [site])
    X = pooled_forward(plain, anatomy, tiny_batch(), segments)
    config = peft.LoraConfig(
        target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
    )
    adapted = peft.get_peft_model(plain, config)
    anatomy = find_anatomy(adapted)
    adapted_X = pooled_forward(adapted, anatomy, tiny_batch(), segments)
    assert not torch.allclose(adapted_X, X, atol=1e-3)
    with adapted.disable_adapter():
        torch.testing.assert_close(pooled_forward(adapted, anatomy, tiny_batch(), segments), X)


def test_weights_may_be_elsewhere_until_they_are_needed():
    accelerate = pytest.importorskip("accelerate")
    model = TINY["llama"].build()
    anatomy = find_anatomy(model)
    segments = segments_of(anatomy, ("hidden", "mlp", "attention"))
    X = pooled_forward(model, anatomy, tiny_batch(), segments)
    model = accelerate.cpu_offload(model, execution_device="cpu")
    anatomy = find_anatomy(model)
    for wanted in (segments, segments[:3]):
        early = pooled_forward(model, anatomy, tiny_batch(), wanted)
        torch.testing.assert_close(early, X[:, : early.shape[1]])
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_way_attention_is_computed_changes_nothing(implementation):
    model = TINY["llama"].build()
    anatomy = find_anatomy(model)
    segments = segments_of(anatomy, ("hidden", "attention"), BY_HAND)
    X = pooled_forward(model, anatomy, tiny_batch("left"), segments)
    model.set_attn_implementation(implementation)
    again = pooled_forward(model, anatomy, tiny_batch(), segments)
    torch.testing.assert_close(again, X, **CLOSE)


def test_packed_tokens_go_back_to_their_texts():
    # What attn_implementation="flash_attention_2" needs a GPU for: only real tokens, in one row.
    mask = tiny_batch()["attention_mask"].bool()
    tap = Tap(torch.nn.Identity(), width=3)
    texts = torch.randn(*mask.shape, 3) * mask[..., None]
    assert torch.equal(as_texts(texts[mask], mask, tap), texts)
    assert torch.equal(as_texts(texts.flatten(0, 1), mask, tap), texts)


def test_a_model_that_was_changed_after_all_is_an_error():
    model = TINY["bert"].build()
    anatomy = find_anatomy(model)
    model.encoder.layer[2] = TINY["bert"].build().encoder.layer[2]
    with pytest.raises(RuntimeError, match="3/mlp/mean"):
        pooled_forward(model, anatomy, tiny_batch(), segments_of(anatomy, ["mlp"]))


class _Twice(torch.nn.Module):
    """A block that runs what is inside of it two times."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, hidden_states, *args, **kwargs):
        return self.inside(self.inside(hidden_states, *args, **kwargs), *args, **kwargs)


def test_blocks_that_run_in_hidden_loops_are_an_error():
    model = TINY["gpt2"].build()
    model.h[1].mlp = _Twice(model.h[1].mlp)
    anatomy = find_anatomy(model)
    twice = [Segment(None, layer, "mlp", "mean", 40) for layer in (2, 3)]
    with pytest.raises(RuntimeError, match="Conv1D more often .* Choose another site or model"):
        pooled_forward(model, anatomy, tiny_batch(), twice)
    pooled_forward(model, anatomy, tiny_batch(), twice[1:])


def test_unexpected_shapes_are_an_error():
    tap = Tap(torch.nn.Identity(), width=3)
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"Identity has .* \(2, 5, 3\), but \(2, 4, 3\)"):
        as_texts(torch.zeros(2, 5, 3), mask, tap)


def test_a_decoder_starts_with_the_token_that_generation_starts_with():
    model = TINY["t5"].build()
    anatomy = find_anatomy(model)
    wanted = [Segment("decoder", 0, "hidden", "first", 24)]
    X = pooled_forward(model, anatomy, tiny_batch("left"), wanted)
    torch.testing.assert_close(X[0], model.shared.weight[model.config.decoder_start_token_id])
    model.config.decoder_start_token_id = model.config.bos_token_id = None
    X = pooled_forward(model, anatomy, tiny_batch(), wanted)
    torch.testing.assert_close(X[0], model.shared.weight[model.config.pad_token_id])
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        pooled_forward(model, anatomy, tiny_batch(), wanted)


def test_a_decoder_sees_as_many_tokens_as_the_text_has():
    model = TINY["t5"].build()
    anatomy = find_anatomy(model)
    batch = tiny_batch("left")
    wanted = [Segment("decoder", 0, "hidden", "last", 24)]
    X = pooled_forward(model, anatomy, batch, wanted)
    # The last of them is the text's last but one: its last is only there to be told.
    torch.testing.assert_close(X[0], model.shared.weight[batch["input_ids"][0, -2]])
