"""Token contributions add up, go to the right tokens, and show as text."""

import warnings

import numpy as np
import pytest
import torch
from films import LABELS, NEW, TEXTS, activations, select
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import LinearSVC
from tiny_models import TINY, tiny_reader, tiny_tokenizer
from transformers import AutoModel, AutoTokenizer, ByT5Tokenizer

from skspin import LLMActivationTransformer, explain_neurons, explain_tokens, prune
from skspin.datasets import demo_model

THREE = list("aabbcc") * 3
POOLINGS = ("mean", "max", "first", "last")


def spin(*steps, y=LABELS, **params):
    return make_pipeline(activations(**params), select(), *steps).fit(TEXTS, y)


def assert_adds_up(pipeline, texts=NEW):
    explanation = explain_tokens(pipeline, texts)
    decision = pipeline.decision_function(texts).reshape(len(texts), -1)
    np.testing.assert_allclose(
        explanation.decision_values, decision, rtol=1e-4, atol=1e-4 * np.abs(decision).max()
    )
    np.testing.assert_array_equal(explanation.predicted_classes(), pipeline.predict(texts))
    return explanation


@pytest.mark.parametrize("y", [LABELS, THREE], ids=["two", "three"])
def test_contributions_add_up_to_the_decision_values(y):
    every = {"site": ("hidden", "mlp", "attention"), "pooling": POOLINGS}
    assert_adds_up(spin(StandardScaler(), LogisticRegression(), y=y, **every))


@pytest.mark.parametrize(
    "step",
    [
        "passthrough",
        StandardScaler(with_mean=False),
        RobustScaler(),
        MinMaxScaler((-1, 2)),
        MaxAbsScaler(),
        PCA(3, whiten=True),
        # Of the components, some vary by less than whitening divides by.
        make_pipeline(MinMaxScaler((0, 0.01)), PCA(8, whiten=True)),
        TruncatedSVD(3),
        make_pipeline(StandardScaler(), PCA(4), StandardScaler()),
    ],
    ids=str,
)
def test_they_add_up_through_linear_steps(step):
    assert_adds_up(spin(step, RidgeClassifier(), y=THREE, pooling=("mean", "max")))


def test_they_add_up_in_half_precision_too():
    # Two passes through the model differ by more than 1e-4 there.
    assert_adds_up(spin(StandardScaler(), LogisticRegression(), dtype="bfloat16"))


def test_they_add_up_in_both_halves_of_an_encoder_decoder():
    model = LLMActivationTransformer(
        TINY["t5"].build(), tokenizer=tiny_tokenizer(), stack=("encoder", "decoder")
    )
    texts = ["word1 word2", "word3", "word4 word5 word6", "word7 word1"] * 3
    pipeline = make_pipeline(model, select(), StandardScaler(), LogisticRegression())
    assert_adds_up(pipeline.fit(texts, [0, 1, 1, 0] * 3), texts[:4])


def test_neither_pruning_nor_company_changes_a_tokens_contribution():
    head = LinearSVC(penalty="l1", C=0.1, random_state=0)
    whole = spin(StandardScaler(), head, pooling=("mean", "max"))
    texts = TEXTS[:6] + NEW + TEXTS[:2]
    pruned = explain_tokens(prune(whole), texts).contributions
    together = explain_tokens(whole, texts).contributions
    for text, one, other in zip(texts, together, pruned, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        np.testing.assert_allclose(one, explain_tokens(whole, [text]).contributions[0], atol=1e-5)


def test_each_token_gets_what_the_pooling_takes_from_it():
    pipeline = make_pipeline(
        activations(layers=2, pooling=POOLINGS), StandardScaler(), LogisticRegression()
    ).fit(TEXTS, LABELS)
    model = AutoModel.from_pretrained(demo_model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    inputs = tokenizer(NEW[0], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[2][0].double().numpy()
    _, scale, head = (step for _, step in pipeline.steps)
    weights = np.split(head.coef_[0] / scale.scale_, 4)  # by pooling, (384,)
    centers = np.split(scale.mean_, 4)
    expected = (hidden - centers[0]) @ weights[0] / len(hidden)
    tokens = (hidden.argmax(axis=0), np.zeros(384, int), np.full(384, len(hidden) - 1))
    for token, center, weight in zip(tokens, centers[1:], weights[1:], strict=True):
        values = hidden[token, np.arange(384)]
        np.add.at(expected, token, (values - center) * weight)
    explanation = explain_tokens(pipeline, NEW[:1])
    digits = 1e-6 * np.abs(expected).max()  # of float32, in a sum
    np.testing.assert_allclose(explanation.contributions[0][:, 0], expected, atol=digits)
    names = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert explanation.tokens[0].tokens == names


def tokens_of(text, **params):
    pipeline = make_pipeline(activations(layers=1, **params), LogisticRegression())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*longer than max_length")
        return explain_tokens(pipeline.fit(TEXTS, LABELS), [text]).tokens[0]


@pytest.mark.parametrize("text", [*NEW, "Größe: 3 µm 😀!", "a\ud800b", "  two  spaces "])
def test_tokens_are_where_the_text_has_them(text, tokenizer):
    tokens = tokens_of(text)
    expected = tokenizer(text.replace("\ud800", "\ufffd"))
    assert tokens.tokens == tokenizer.convert_ids_to_tokens(expected["input_ids"])
    assert tokens.tokens[0] == "[CLS]" and not tokens.in_text[[0, -1]].any()
    for name, surface, inside in zip(tokens.tokens, tokens.surfaces(), tokens.in_text, strict=True):
        if inside and name != "[UNK]" and surface.isascii():
            assert surface.lower() == name.removeprefix("##")


@pytest.mark.parametrize("prompt", ["Review: {text} Good?", "{text} and {text}"])
def test_the_prompt_is_not_the_text(prompt, tokenizer):
    tokens = tokens_of("A fine film", prompt=prompt)
    inside = [s for s, i in zip(tokens.surfaces(), tokens.in_text, strict=True) if i]
    assert inside == ["A", "fine", "film"]
    ids = tokenizer(prompt.format(text="A fine film"))["input_ids"]
    assert tokens.tokens == tokenizer.convert_ids_to_tokens(ids)


def test_a_text_that_is_cut_loses_its_last_tokens():
    tokens = tokens_of("one two three four five six", prompt="Read {text} now", max_length=7)
    assert tokens.surfaces() == ["[CLS]", "read", "one", "two", "three", "now", "[SEP]"]


def test_an_explanation_is_read_by_words_classes_and_texts():
    explanation = explain_tokens(spin(StandardScaler(), LogisticRegression()), NEW)
    words = explanation.merge_words()
    expected = ["[CLS]", "A", "lovely", "film", ",", "unbelievably", "dreadful", ".", "[SEP]"]
    assert words.tokens[0].surfaces() == expected
    np.testing.assert_allclose(words.decision_values, explanation.decision_values)
    for one, zero in zip(explanation.for_class(1), explanation.for_class(0), strict=True):
        np.testing.assert_array_equal(one, -zero)
    assert explanation.intercept_for_class(1) == -explanation.intercept_for_class(0)
    with pytest.raises(ValueError, match=r"label='good' must be one of the classes \[0, 1\]"):
        explanation.for_class("good")
    assert explanation[4:].decision_values.shape == (0, 1)
    assert explanation[4:].predicted_classes().tolist() == []
    assert len(explanation) == 4 and len(explanation[1:3]) == 2
    assert explanation[-1].tokens[0].text == NEW[-1]
    assert [one.tokens[0].text for one in explanation] == NEW
    with pytest.raises(IndexError):
        explanation[len(NEW)]
    assert repr(explanation[0]) == "<TokenExplanation of 1 texts for the classes [0, 1]>"


def test_frames_hold_every_contribution_and_top_tokens_the_largest_sums():
    texts = [*TEXTS[:6], *NEW]
    explanation = explain_tokens(spin(LogisticRegression(), y=THREE), texts)
    frame = explanation.to_frame()
    assert frame.columns.tolist() == ["text", "token", "start", "end", "class", "contribution"]
    sums = frame.groupby(["text", "class"]).contribution.sum().unstack()
    np.testing.assert_allclose(sums + explanation.intercept, explanation.decision_values)
    for row in frame[frame.end > 0].itertuples():
        assert texts[row.text][row.start : row.end] == row.token
    own = frame[(frame.end > 0) & (frame["class"] == "b")]
    sums = own.groupby("token").contribution.agg(["sum", "size"])
    best = sums.sort_values("sum", ascending=False).head(3)
    top = explanation.top_tokens("b", n=3)
    assert [row.token for row in top] == best.index.tolist()
    np.testing.assert_allclose([row.total for row in top], best["sum"])
    assert [row.n_occurrences for row in top] == best["size"].tolist()
    assert {row.token for row in explanation.top_tokens("b", n=99)} == {*own.token}
    with pytest.raises(ValueError, match="n == 0, must be >= 1"):
        explanation.top_tokens("b", n=0)


def test_html_shows_markup_as_text_and_stops_somewhere():
    texts = ["<script>alert(1)</script> & 😀 \n more"] + [f"text {i}" for i in range(30)]
    shown = explain_tokens(spin(LogisticRegression()), texts)._repr_html_()
    assert "<script" not in shown and "&lt;" in shown and "&amp;" in shown and "😀" in shown
    assert "and 11 more" in shown
    assert "color:" not in shown.replace("background-color:", "")  # the page's own text colour


def test_html_writes_a_character_that_windows_share_once():
    text = "ab日本語cd"
    for max_length in (4, 5, 6):
        parts = tiny_reader(max_position_embeddings=64)
        fitted = make_pipeline(
            LLMActivationTransformer(**parts, max_length=max_length, long_texts="windows"),
            LogisticRegression(),
        ).fit(TEXTS, LABELS)
        shown = explain_tokens(fitted, [text])._repr_html_()
        assert [shown.count(character) for character in text[2:-2]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Normalizer(), LogisticRegression()], "Normalizer.*is not known to be linear"),
        ([MinMaxScaler(clip=True), LogisticRegression()], "MinMaxScaler.*not known to be linear"),
        ([StandardScaler()], "ends in a StandardScaler, but a linear classifier is needed"),
    ],
    ids=str,
)
def test_what_is_no_sum_over_tokens_is_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        explain_tokens(spin(*steps), NEW)


def test_what_is_no_fitted_pipeline_over_texts_is_refused():
    union = FeatureUnion([("one", activations())])
    with pytest.raises(ValueError, match="FeatureUnion.*not known to be linear"):
        explain_tokens(make_pipeline(union, LogisticRegression()).fit(TEXTS, LABELS), NEW)
    with pytest.raises(TypeError, match="LogisticRegression, but explain_tokens takes"):
        explain_tokens(LogisticRegression(), NEW)
    with pytest.raises(NotFittedError):
        explain_tokens(make_pipeline(activations(), LogisticRegression()), NEW)
    with pytest.raises(ValueError, match="No step of the pipeline is an LLMActivation"):
        explain_tokens(make_pipeline(LogisticRegression()).fit([[0], [1]], [0, 1]), NEW)


def test_the_tokens_that_activate_a_neuron_most_are_found():
    transformer = activations(layers=1, site="hidden").fit(TEXTS)
    names = ["layer1_hidden_mean_5", "layer1_hidden_mean_2"]
    explanation = explain_neurons(transformer, TEXTS, names, n_top=3)
    model = AutoModel.from_pretrained(demo_model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    assert list(explanation.hits) == names
    for neuron, hits in zip((5, 2), explanation.hits.values(), strict=True):
        values = []
        for text in TEXTS[:6]:
            with torch.no_grad():
                output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            values.append(output.hidden_states[1][0, 1:-1, neuron].max().item())
        best = np.argsort(values)[::-1][:3]
        assert [hit.text for hit in hits] == best.tolist()
        found = [hit.activation for hit in hits]
        np.testing.assert_allclose(found, np.array(values)[best], atol=1e-5)
        assert all(TEXTS[hit.text][hit.start : hit.end] == hit.token for hit in hits)


def test_selected_neurons_are_found_behind_any_classifier():
    pipeline = prune(spin(HistGradientBoostingClassifier(max_iter=1)))
    name = pipeline[:2].get_feature_names_out()[0]
    explanation = explain_neurons(pipeline, [*TEXTS, "", "<b>"], name)
    assert len(explanation.hits[name]) == 7  # every distinct text that has a token of its own
    frame = explanation.to_frame()
    assert frame.activation.is_monotonic_decreasing and set(frame.neuron) == {name}
    assert "<b>&" not in explanation._repr_html_() and "&lt;" in explanation._repr_html_()


def test_neurons_that_can_not_be_found_are_refused():
    transformer = activations(layers=1).fit(TEXTS)
    with pytest.raises(ValueError, match=r"\['layer9'\] are not among the transformer's 384"):
        explain_neurons(transformer, TEXTS, "layer9")
    for neurons, message in [
        (5, r"neurons=\['5'\] are not among"),
        (["layer1_hidden_mean_3", 3, None], r"neurons=\['3', 'None'\] are not among"),
        (np.array(["b", "a"]), r"neurons=\['a', 'b'\] are not among"),
        ([], r"neurons=\[\] must name some of the transformer's 384 columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            explain_neurons(transformer, TEXTS, neurons)
    with pytest.raises(ValueError, match="LogisticRegression has 0 steps"):
        explain_neurons(LogisticRegression().fit([[0], [1]], [0, 1]), TEXTS, "layer1")
    model = TINY["bert"].build(vocab_size=400)
    transformer = LLMActivationTransformer(model, tokenizer=ByT5Tokenizer(), layers=1).fit(TEXTS)
    with pytest.raises(ValueError, match="fast tokenizer.*ByT5.* does not tell where in the text"):
        explain_neurons(transformer, TEXTS, transformer.get_feature_names_out()[:1])


def test_a_number_of_tokens_to_find_must_be_whole_and_positive():
    transformer = activations(layers=1).fit(TEXTS)
    for n_top, error, message in [
        (0, ValueError, "n_top == 0, must be >= 1"),
        (1.5, TypeError, "n_top must be an instance of int, not float"),
        ("3", TypeError, "n_top must be an instance of int, not str"),
    ]:
        with pytest.raises(error, match=message):
            explain_neurons(transformer, TEXTS, "layer1_hidden_mean_3", n_top=n_top)
