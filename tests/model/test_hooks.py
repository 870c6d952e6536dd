"""Hooks on a model: they stop it early, share it with others, and are gone afterwards."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from forward_pass import read, segments_of, tried
from tiny_models import TINY, tiny_batch

from skspin._layout import Segment
from skspin._model.anatomy import find_anatomy


def count_calls(modules):
    """Count the calls of modules."""
    counts = [0] * len(modules)
    for i, module in enumerate(modules):

        def called(*_, i=i):
            counts[i] += 1

        module.register_forward_pre_hook(called)
    return counts


@pytest.mark.parametrize(
    ("layer", "site", "n_blocks_run"),
    [(0, "hidden", 0), (1, "mlp", 1), (1, "hidden", 1), (3, "mlp", 3)],
)
def test_the_pass_stops_after_the_deepest_layer(layer, site, n_blocks_run):
    model = TINY["llama"].build("ForCausalLM")
    blocks = model.model.layers
    tried(model)
    counts = count_calls([*(b.mlp.up_proj for b in blocks), model.model.norm, model.lm_head])
    read(model, segments_of(model, [site], layers=[layer]))
    assert counts == [1] * n_blocks_run + [0] * (5 - n_blocks_run)


def test_the_encoder_runs_without_the_decoder_and_logits_are_never_computed():
    model = TINY["t5"].build("ForConditionalGeneration")
    tried(model)
    counts = count_calls([model.decoder, model.lm_head])
    both = segments_of(model)
    read(model, [segment for segment in both if segment.stack == "encoder"])
    assert counts == [0, 0]
    read(model, both)
    assert counts == [1, 0]


def contents_of(model):
    """List what a model is made of: its modules, and what each of them holds and is told."""
    return model.config.to_dict(), [
        (
            name,
            {key: value for key, value in vars(module).items() if key[0] != "_"},
            [*module.children()],
            [*module._forward_pre_hooks, *module._forward_hooks],
        )
        for name, module in model.named_modules()
    ]


# The last two change themselves as they read.
@pytest.mark.parametrize("name", ["xlnet", "big-bird", "phi3-128k"])
def test_the_model_comes_back_as_it_was(name):
    expected = [read(TINY[name].build(), batch=tiny_batch(n)) for n in [(7,), (40,), (16, 17)]]
    outputs = {"output_hidden_states": True, "output_attentions": name == "xlnet"}
    model = TINY[name].build(**outputs).train()
    next(model.children()).eval()
    before = contents_of(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for lengths, rows in zip([(7,), (40,), (16, 17)], expected, strict=True):
        torch.testing.assert_close(read(model, batch=tiny_batch(lengths)), rows)  # no dropout
        assert contents_of(model) == before
        torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    output = model(tiny_batch()["input_ids"])
    output.last_hidden_state.sum().backward()  # nothing in it has become untrainable


def test_a_failed_pass_leaves_no_trace():
    model = TINY["bert"].build().train()

    def fail(*_):
        raise FloatingPointError("the model's own")

    model.encoder.layer[1].register_forward_hook(fail)
    before = contents_of(model)
    with pytest.raises(FloatingPointError, match="own"):
        read(model)
    assert contents_of(model) == before


def test_no_activations_are_kept_behind_the_reader():
    model = TINY["llama"].build()
    anatomy = find_anatomy(model)
    seen = []
    alive = []

    def watch(module, args):
        alive.append(sum(activations() is not None for activations in seen))
        seen.append(weakref.ref(args[0]))

    for block in model.layers:
        block.mlp.down_proj.register_forward_pre_hook(watch)
    gc.disable()  # on a GPU, waiting for the collector is running out of memory
    try:
        pooled = weakref.ref(read(model, anatomy=anatomy))
        alive.append(sum(activations() is not None for activations in seen))
        assert pooled() is None
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]


def test_a_pass_of_the_owner_in_another_thread_is_neither_read_nor_stopped():
    model = TINY["gpt2"].build()
    segments = [Segment(None, 1, "hidden", "mean", 24), Segment(None, 1, "mlp", "max", 40)]
    expected = read(model, segments)
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
    X = read(model, segments)
    handle.remove()
    torch.testing.assert_close(X, expected)
    torch.testing.assert_close(seen[0], states)


@pytest.mark.parametrize("name", ["xlnet", "big-bird"])  # which takes turns, as it changes itself
def test_threads_share_a_model(name):
    model = TINY[name].build().train()
    jobs = [
        (segments_of(model, [site]), tiny_batch([length]))
        for site, length in [("hidden", 7), ("mlp", 40), ("attention", 9)]
    ]
    expected = [read(model, *job) for job in jobs]

    def work(i):
        return all(torch.allclose(read(model, *jobs[i]), expected[i], atol=1e-6) for _ in range(20))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))
    assert all(module.training for module in model.modules())


class _Around(torch.nn.Module):
    """A feed-forward part inside of something that changes what it is given."""

    def __init__(self, inside, run):
        super().__init__()
        self.inside, self.run = inside, run

    def forward(self, hidden_states):
        return self.run(self.inside, hidden_states)


def packed(inside, hidden_states):
    """Do as flash attention does, for which a GPU is needed: only real tokens, in one row."""
    mask = tiny_batch()["attention_mask"].bool()
    output = torch.zeros_like(hidden_states)
    output[mask] = inside(hidden_states[mask])
    return output


def in_one_row(inside, hidden_states):
    return inside(hidden_states.flatten(0, 1)).unflatten(0, hidden_states.shape[:2])


@pytest.mark.parametrize("run", [packed, in_one_row])
def test_tokens_in_one_row_go_back_to_their_texts(run):
    model = TINY["gpt2"].build()
    segments = segments_of(model, ["mlp"], ["mean", "max", "first", "last"])
    expected = read(model, segments)
    for block in model.h:
        block.mlp = _Around(block.mlp, run)
    torch.testing.assert_close(read(model, segments), expected)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda inside, x: inside(torch.cat([x, x[:, :1]], 1)),
            r"Conv1D has .* \(5, 8, 40\), but \(5, 7, 40\)",
        ),
        (
            lambda inside, x: inside(inside(x)),
            "Conv1D more often .* Choose another site or model",
        ),
        (lambda inside, x: x, "without these layers: .*2/mlp/mean"),
    ],
    ids=["other shapes", "hidden loops", "modules replaced"],
)
def test_a_model_that_does_not_do_as_its_structure_shows_is_an_error(run, message):
    model = TINY["gpt2"].build()
    anatomy, segments = find_anatomy(model), segments_of(model, ["mlp"])
    model.h[1].mlp = _Around(model.h[1].mlp, run)
    with pytest.raises(RuntimeError, match=message):
        read(model, segments, anatomy=anatomy)


def test_what_is_not_read_may_run_in_hidden_loops():
    model = TINY["gpt2"].build()
    model.h[1].mlp = _Around(model.h[1].mlp, lambda inside, x: inside(inside(x)))
    read(model, segments_of(model, ["mlp"], layers=[3]))
