"""What is found out of a model by trying: whether a text's company or history changes it."""

from __future__ import annotations

import pytest
import torch
from forward_pass import CLOSE, alone, columns, read, segments_of, tried
from tiny_models import ALL, TINY, tiny_batch, tiny_tokenizer

from skspin import LLMActivationTransformer
from skspin._model.anatomy import most_tokens
from skspin._model.files import Source
from skspin._model.registry import load_backbone

CHANGED_BY_PADDING = {"big-bird", "convbert", "fnet", "mobilebert"}


def only(batch, row):
    real = batch["attention_mask"][row].bool()
    return {key: values[[row]][:, real] for key, values in batch.items()}


@pytest.mark.parametrize("name", ALL)
def test_a_row_depends_neither_on_company_nor_on_history(name):
    model = ALL[name].build()
    batch = tiny_batch([40, 7, 20, 2, 16, 7])
    segments = segments_of(model, ["hidden"])
    X = read(model, segments, batch)
    for row in (0, 1, 2, 3, 4, 5, 0):
        output = alone(ALL[name].build(), batch, row)  # a model that has read nothing before
        again = read(model, segments, only(batch, row))
        for segment, where in columns(segments):
            stack = "" if segment.stack is None else f"{segment.stack}_"
            if segment.layer < len(output[f"{stack}hidden_states"]) - 1:
                expected = output[f"{stack}hidden_states"][segment.layer][0].mean(0)
                torch.testing.assert_close(X[row, where], expected, **CLOSE)
        torch.testing.assert_close(again[0], X[row], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_padding_is_found_to_change_a_text_only_where_it_does(name, dtype):
    if (name, dtype) in [("fnet", torch.bfloat16), ("fnet", torch.float16)]:
        pytest.skip("torch has no such Fourier transform")
    model = ALL[name].build().to(dtype)
    assert (tried(model).mixes_beyond == 0) == (name in CHANGED_BY_PADDING)


def test_blocks_that_run_in_hidden_loops_are_refused():
    model = TINY["gpt2"].build()
    model.h[2].register_forward_hook(lambda block, args, output: model.h[1](*args) and None)
    with pytest.raises(RuntimeError, match="GPT2Block more often than its structure shows"):
        tried(model)


def test_hidden_states_that_the_model_does_not_return_are_refused():
    model = TINY["gpt2"].build()

    def change(model, args, output):
        if output.hidden_states:
            states = output.hidden_states
            return output | {"hidden_states": (states[0], states[1] + 1, *states[2:])}

    model.register_forward_hook(change)
    anatomy = tried(model)
    with pytest.raises(ValueError, match=r"layer 1 \(GPT2Block\) has no site='hidden': .* returns"):
        read(model, segments_of(model, ["hidden"]), anatomy=anatomy)
    assert anatomy.mixes_beyond > 0 and anatomy.is_causal
    assert read(model, segments_of(model, ["hidden"], layers=[0, 2, 3]), anatomy=anatomy).all()
    assert read(model, segments_of(model, ["mlp"]), anatomy=anatomy).isfinite().all()


def test_a_model_is_not_changed_by_what_it_is_asked_for():
    model = TINY["llama"].build()
    tried(model)
    hooks = [module._forward_hooks for module in model.modules()]
    assert not any(hooks)
    states = alone(model, tiny_batch(), 0).hidden_states
    assert len(states) == 4


class _Around(torch.nn.Module):
    """A feed-forward part with something before it that no list of names knows of."""

    def __init__(self, inside, change):
        super().__init__()
        self.inside, self.change = inside, change

    def forward(self, hidden_states):
        return self.inside(self.change(hidden_states))


@pytest.mark.parametrize("average", [False, True])
def test_an_architecture_that_nobody_knows_is_tried_as_well(average):
    model = TINY["gpt2"].build().train()
    change = (lambda x: x - x.mean(1, keepdim=True)) if average else (lambda x: x + x.roll(-1, 1))
    model.h[1].mlp = _Around(model.h[1].mlp, change)
    assert tried(model).mixes_beyond == 0
    assert all(module.training for module in model.modules())
    batch = tiny_batch()
    X = read(model, batch=batch)
    for row in range(len(X)):
        torch.testing.assert_close(read(model, batch=only(batch, row))[0], X[row], **CLOSE)


@pytest.mark.filterwarnings("ignore")
def test_rounding_to_8_bits_is_not_taken_for_padding():
    quantisation = pytest.importorskip("torchao.quantization")
    model = TINY["bert"].build(hidden_size=64, intermediate_size=128)
    quantisation.quantize_(model, quantisation.Int8DynamicActivationInt8WeightConfig())
    assert tried(model).mixes_beyond > 0


def test_a_model_that_can_not_be_padded_reads_texts_of_one_length():
    model = TINY["gpt2"].build()

    def refuse(module, args, kwargs):
        if not kwargs["attention_mask"].all():
            raise ValueError("no padding, please")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert read(model).isfinite().all()


def test_a_model_that_draws_random_numbers_is_refused():
    model = TINY["gpt2"].build()
    model.h[1].mlp = _Around(model.h[1].mlp, lambda x: x + torch.rand(()))
    with pytest.raises(ValueError, match="GPT2Model gives a text other activations .* again"):
        read(model)


def test_a_model_in_memory_is_tried_once_as_long_as_its_weights_stay(tokenizer):
    model = TINY["gpt2"].build()
    n_passes = 0

    def count(*_):
        nonlocal n_passes
        n_passes += 1

    model.register_forward_pre_hook(count)
    for _ in range(3):
        load_backbone(Source(model, tokenizer=tokenizer))
    assert n_passes == 4
    with torch.no_grad():
        model.wte.weight += 1
    load_backbone(Source(model, tokenizer=tokenizer))
    assert n_passes == 8


# Positions


@pytest.mark.parametrize("name", ALL)
def test_a_text_beyond_the_models_positions_is_cut(name):
    model = ALL[name].build()
    bound = most_tokens(model, 60)
    text = " ".join(f"word{i % 56}" for i in range(100))
    cut = " ".join(text.split()[: bound - 2])  # beside the start and the end
    settings = {"tokenizer": tiny_tokenizer(), "max_length": 60, "cache": None}
    if model.config.is_encoder_decoder:
        settings["stack"] = ("encoder", "decoder")
    transformer = LLMActivationTransformer(model, **settings)
    with pytest.warns(UserWarning, match="truncated"):
        X = transformer.fit_transform([text])
    torch.testing.assert_close(torch.tensor(X), torch.tensor(transformer.transform([cut])))


TABLES = {"bert": 48, "roberta": 47, "mpnet": 46, "gpt2": 48, "opt": 48, "bart": 48, "mpt": 48}


@pytest.mark.parametrize("name", [*TABLES, "led", "longformer", "marian", "mobilebert", "gptj"])
def test_no_position_is_left_out(name):
    model = ALL[name].build()
    bound = most_tokens(model, 60)
    assert bound == TABLES.get(name, bound)
    read(model, batch=tiny_batch([bound]))
    with pytest.raises((IndexError, RuntimeError)):
        read(model, batch=tiny_batch([bound + 1]))


def test_the_half_with_the_fewest_positions_bounds_a_text():
    assert most_tokens(TINY["led"].build(), 60) == 40
    assert most_tokens(TINY["t5"].build(), 10_000) == 10_000
