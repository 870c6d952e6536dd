"""Conversations are written by the tokenizer's chat template; which tokens are pooled."""

import copy
import json

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from bert_files import tiny
from transformers import AutoTokenizer

from skspin import LLMActivationTransformer, explain_tokens, make_spin_pipeline
from skspin._texts import open_texts
from skspin.datasets import demo_model

TEMPLATE = (
    "{% for message in messages %}"
    "<{{ message['role'] }}> {{ message['content'] | trim }} </s>\n"
    "{% endfor %}"
)


def say(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": said} for role, said in zip(roles, contents, strict=False)]


CONVERSATIONS = [
    say("Is it a good film?", "It is."),
    say("user"),  # as the template's own word
    say("  Is it? ", "No, it is a bore.", "Why?"),
    say("Is it a good film?", "It is."),  # again
    say("Is it? ", "No.\n"),  # the template writes a blank here, too
]


@pytest.fixture(scope="module")
def chat():
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokenizer.chat_template = TEMPLATE
    return {"model": tiny(), "tokenizer": tokenizer}


def transformer(chat, **params):
    return LLMActivationTransformer(
        **chat, **{"dtype": "float32", "cache": None, "pooling": ("mean", "last"), **params}
    )


def states_of(chat, text, **options):
    """The oracle: token-level hidden states (n_layers, n_tokens, n_neurons), and offsets."""
    tokens = chat["tokenizer"](
        text,
        return_offsets_mapping=True,
        return_tensors="pt",
        return_special_tokens_mask=True,
        **options,
    )
    offsets = tokens.pop("offset_mapping")[0].numpy()
    special = tokens.pop("special_tokens_mask")[0].numpy().astype(bool)
    with torch.no_grad():
        states = chat["model"](**tokens, output_hidden_states=True).hidden_states
    return np.concatenate([state.numpy() for state in states]), offsets, special


def pooled(states):
    return np.concatenate([part for layer in states for part in (layer.mean(0), layer[-1])])


def rendered(chat, conversation):
    return chat["tokenizer"].apply_chat_template(conversation, tokenize=False)


def test_a_conversation_is_what_the_chat_template_makes_of_it(chat):
    X = transformer(chat).fit_transform(CONVERSATIONS)
    for row, conversation in zip(X, CONVERSATIONS, strict=True):
        states, *_ = states_of(chat, rendered(chat, conversation), add_special_tokens=False)
        np.testing.assert_allclose(row, pooled(states), atol=1e-5)
    np.testing.assert_array_equal(X[0], X[3])


def as_object_array(items):
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def as_column_of_a_dataset(items):
    return pytest.importorskip("datasets").Dataset.from_dict({"talk": items})["talk"]


CONTAINERS = {
    "tuples": lambda items: tuple(tuple(item) for item in items),
    "object array": as_object_array,
    "pandas": pd.Series,
    "pandas of arrays": lambda items: pd.Series([np.array(item, dtype=object) for item in items]),
    "pandas frame": lambda items: pd.DataFrame({"talk": items}),
    "polars": pl.Series,
    "arrow": pa.array,
    "arrow table": lambda items: pa.table({"talk": items}),
    "dataset": lambda items: pytest.importorskip("datasets").Dataset.from_dict({"talk": items})[
        "talk"
    ],
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_every_container_gives_the_same_conversations(container):
    texts = open_texts(container(CONVERSATIONS))
    assert texts.conversations
    assert [json.loads(text) for text in texts.to_list()] == CONVERSATIONS


def test_a_rectangle_of_messages_is_conversations_of_equal_length():
    square = np.array([say("a", "b"), say("c", "d")], dtype=object)
    assert square.shape == (2, 2)
    assert json.loads(open_texts(square).to_list()[1]) == say("c", "d")


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (say("a", "b"), r"X\[0\] is a dict.*wrap it in a list"),
        ([say("a"), "a text"], r"X\[1\] is a str.*calls of their own"),
        (["a text", say("a")], r"X\[1\] is a list.*calls of their own"),
        ([say("a"), []], r"X\[1\] is an empty list.*at least one message"),
        ([[], say("a")], r"X\[0\] is an empty list.*at least one message"),
        ([say("a"), None], r"X\[1\] is a NoneType"),
        ([say("a"), [{"role": "user"}]], r"X\[1\]\[0\] is .*'role' and 'content'"),
        ([say("a", None)], r"X\[0\]\[1\] is .*'role' and 'content'"),
        ([[{"role": "user", "content": ["part"]}]], r"X\[0\]\[0\] is"),
        ([[{"role": "user", "content": "a", "at": object()}]], r"X\[0\] holds what can't.*JSON"),
    ],
)
def test_what_is_no_conversation_is_refused_by_position(X, message):
    with pytest.raises(ValueError, match=message):
        open_texts(X).to_list()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no') }}", r"roles \['user', 'assistant'\]: no"),
        (TEMPLATE.replace("trim", "upper"), "changes the messages"),
    ],
)
def test_a_template_that_does_not_do_is_refused(chat, template, says):
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    tokenizer.chat_template = template
    other = {**chat, "tokenizer": tokenizer}
    with pytest.raises(ValueError, match=says):
        transformer(other, pool_over="user").fit_transform(CONVERSATIONS)
    if "upper" in str(template):  # it can be pooled as a whole
        assert np.isfinite(transformer(other).fit_transform(CONVERSATIONS)).all()


def test_a_prompt_is_for_texts(chat):
    with pytest.raises(ValueError, match="prompt=.*conversations"):
        transformer(chat, prompt="{text}").fit(CONVERSATIONS)


# Which tokens are pooled


def test_only_the_texts_own_tokens_are_pooled(chat):
    texts = ["a fine film", "no", "  so  it goes "]
    X = transformer(chat, prompt="Review: {text} It is", pool_over="text").fit_transform(texts)
    for row, text in zip(X, texts, strict=True):
        states, offsets, special = states_of(chat, f"Review: {text} It is")
        own = (offsets[:, 0] >= 8) & (offsets[:, 1] <= 8 + len(text)) & ~special
        np.testing.assert_allclose(row, pooled(states[:, own]), atol=1e-5)


def test_a_text_without_tokens_gets_those_around_it(chat):
    X, expected = (
        transformer(chat, pool_over=over).fit_transform(["", "fine"]) for over in ("text", "all")
    )
    np.testing.assert_allclose(X[0], expected[0], atol=1e-6)
    assert np.abs(X[1] - expected[1]).max() > 1e-3


def test_a_text_without_tokens_inside_a_token_gets_those_around_it(chat):
    chat = copy.deepcopy(chat)
    chat["tokenizer"].add_tokens(["()"])
    chat["model"].resize_token_embeddings(len(chat["tokenizer"]))
    X, expected = (
        transformer(chat, pool_over=over, prompt="Say ({text})").fit_transform([""])
        for over in ("text", "all")
    )
    np.testing.assert_allclose(X, expected, atol=1e-6)


@pytest.mark.parametrize("roles", ["user", "assistant", ("assistant", "user"), "text"])
def test_only_the_roles_asked_for_are_pooled(chat, roles):
    conversations = [c for c in CONVERSATIONS if len(c) > 1]
    X = transformer(chat, pool_over=roles).fit_transform(conversations)
    wanted = ("user", "assistant") if roles == "text" else roles
    for row, conversation in zip(X, conversations, strict=True):
        text = rendered(chat, conversation)
        states, offsets, _ = states_of(chat, text, add_special_tokens=False)
        own, at = np.zeros(len(offsets), bool), 0
        for message in conversation:
            said = message["content"].strip()
            at = text.index(f"> {said} </s>", at) + 2
            if message["role"] in wanted:
                own |= (offsets[:, 0] >= at) & (offsets[:, 1] <= at + len(said))
        np.testing.assert_allclose(row, pooled(states[:, own]), atol=1e-5)


@pytest.mark.parametrize("chosen", [["user"], [], 3, ("user", 3)])
def test_pool_over_that_fits_no_text_is_refused(chat, chosen):
    with pytest.raises((ValueError, TypeError), match="pool_over"):
        transformer(chat, pool_over=chosen).fit(["a text"])


def test_a_role_that_says_nothing_is_refused(chat):
    fitted = transformer(chat, pool_over="system").fit(CONVERSATIONS)
    with pytest.raises(ValueError, match=r"no token of pool_over=.*'system'.*\['user'"):
        fitted.transform(CONVERSATIONS)


def test_a_long_message_is_cut_and_the_template_stays(chat):
    long = [say("so it goes " * 30, "fine")]
    with pytest.warns(UserWarning, match="1 of 1 texts.*long_texts='windows'"):
        X = transformer(chat, max_length=40).fit_transform(long)
    assert np.isfinite(X).all()
    windows = transformer(chat, max_length=40, long_texts="windows").fit_transform(long)
    assert np.abs(windows - X).max() > 1e-3


def test_many_short_turns_are_cut_with_their_template(chat):
    many = say(*["ok", "no"] * 20)
    ids = chat["tokenizer"](rendered(chat, many), add_special_tokens=False)["input_ids"]

    def read(first, last):
        with torch.no_grad():
            output = chat["model"](torch.tensor([ids[first:last]]), output_hidden_states=True)
        return np.concatenate([state.numpy() for state in output.hidden_states])

    with pytest.warns(UserWarning, match="1 of 1 texts"):
        cut = transformer(chat, max_length=30).fit_transform([many])
    np.testing.assert_allclose(cut[0], pooled(read(0, 30)), atol=1e-5)
    windows = transformer(chat, max_length=30, long_texts="windows").fit_transform([many])
    states = [read(first, first + 30) for first in range(0, len(ids), 30)]
    np.testing.assert_allclose(windows[0], pooled(np.concatenate(states, axis=1)), atol=1e-5)


def test_a_template_that_leaves_no_message_is_refused(chat):
    chat = copy.deepcopy(chat)
    chat["tokenizer"].chat_template = "so it goes " * 20 + TEMPLATE
    with pytest.raises(ValueError, match="max_length=30 leaves no room for text"):
        transformer(chat, max_length=30).fit_transform([say("a", "b")])


@pytest.mark.parametrize(
    ("max_length", "says"),
    [
        (40, "max_length=40 cuts off .* Use a larger max_length or long_texts='windows'"),
        (99_999, "The model's limit of .* tokens cuts off .* Use long_texts='windows'"),
    ],
)
def test_what_the_limit_cuts_off_is_named_with_advice_that_can_help(chat, max_length, says):
    fitted = transformer(chat, max_length=max_length, pool_over="assistant").fit(CONVERSATIONS)
    with pytest.raises(ValueError, match=says) as refused:
        fitted.transform([say("so it goes " * 200, "fine")])
    assert "'<user> so it goes" in str(refused.value)


# Around them


def test_texts_and_conversations_are_stored_apart(chat, tmp_path):
    fitted = transformer(chat, cache=tmp_path / "store").fit(CONVERSATIONS)
    talk = fitted.transform(CONVERSATIONS)
    written = open_texts(CONVERSATIONS).to_list()
    assert np.abs(fitted.transform(written) - talk).max() > 1e-3
    np.testing.assert_array_equal(fitted.transform(CONVERSATIONS), talk)


def test_contributions_add_up_and_say_which_message_a_token_is_of(chat):
    texts = [say(f"{a} film", b) for a in ("fine", "bad", "good", "dull") for b in ("yes", "no")]
    y = [1, 1, 0, 0] * 2
    spin = make_spin_pipeline(**chat, cache=None, site="hidden").set_params(
        select__C=100.0, classify__C=1.0
    )
    spin.fit(texts, y)
    explanation = explain_tokens(spin, texts[:3])
    np.testing.assert_allclose(
        explanation.decision_values[:, 0], spin.decision_function(texts[:3]), rtol=1e-4, atol=1e-4
    )
    tokens = explanation.tokens[0]
    assert tokens.text == rendered(chat, texts[0])
    assert set(tokens.messages) == {-1, 0, 1}
    for start, end, number in zip(tokens.starts, tokens.ends, tokens.messages, strict=True):
        if number >= 0:
            assert tokens.text[start:end] in texts[0][number]["content"]
