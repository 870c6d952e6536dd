"""Hooks on a model: they stop it early, share it with others, and are gone afterwards."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from forward_pass import segments_of
from tiny_models import TINY, tiny_batch

from skspin._layout import Segment
from skspin._model.anatomy import Tap, find_anatomy
from skspin._model.forward import pooled_forward
from skspin._model.hooks import as_texts


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
