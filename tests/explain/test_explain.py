"""Token contributions add up, go to the right tokens, and show as text."""

import warnings

import numpy as np
import pytest
import torch
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
from tiny_models import TINY, tiny_tokenizer
from transformers import AutoModel, AutoTokenizer, ByT5Tokenizer

from skspin import (
    LLMActivationTransformer,
    SalientNeuronSelector,
    explain_neurons,
    explain_tokens,
    prune,
)
from skspin.datasets import demo_model

TEXTS = ["A fine film.", "Lovely.", "What a joy.", "A bore.", "Dreadful.", "It drags on."] * 2
TWO = [1, 1, 1, 0, 0, 0] * 2
THREE = list("aabbcc") * 2
NEW = ["A lovely film, unbelievably dreadful.", "", "Bore!", "x" * 40]


def activations(**params):
    params = {"layers": [1, 2], "dtype": "float32", "device": "cpu"} | params
    return LLMActivationTransformer(demo_model(), **params)


def select(C=1.0):
    return SalientNeuronSelector(0.2, C=C, tol=0.05)


def spin(*steps, y=TWO, **params):
    return make_pipeline(activations(**params), select(), *steps).fit(TEXTS, y)


def assert_adds_up(pipeline, texts=NEW):
    explanation = explain_tokens(pipeline, texts)
    decision = pipeline.decision_function(texts).reshape(len(texts), -1)
    np.testing.assert_allclose(
        explanation.decision_values, decision, rtol=1e-4, atol=1e-4 * np.abs(decision).max()
    )
    np.testing.assert_array_equal(explanation.predicted_classes(), pipeline.predict(texts))
    return explanation


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "last"])
@pytest.mark.parametrize("site", ["hidden", "mlp", "attention"])
def test_contributions_add_up_to_the_decision_value(site, pooling):
    head = LogisticRegression()
    assert_adds_up(spin(StandardScaler(), head, site=site, pooling=pooling))


def test_they_add_up_with_all_sites_poolings_and_classes_at_once():
    every = {"site": ("hidden", "mlp", "attention"), "pooling": ("mean", "max", "first", "last")}
    assert_adds_up(spin(StandardScaler(), LogisticRegression(), y=THREE, **every))


@pytest.mark.parametrize(
    "step",
    [
        "passthrough",
        StandardScaler(with_mean=False),
        RobustScaler(),
        MinMaxScaler((-1, 2)),
        MaxAbsScaler(),
        PCA(3, whiten=True),
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


def test_a_pruned_pipeline_is_explained_the_same():
    whole = spin(
        StandardScaler(), LinearSVC(penalty="l1", C=0.1, random_state=0), pooling=("mean", "max")
    )
    for ours, theirs in zip(
        explain_tokens(prune(whole), NEW).contributions,
        explain_tokens(whole, NEW).contributions,
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_each_token_gets_its_share_of_the_mean_and_the_maximum():
    pipeline = make_pipeline(
        activations(layers=2, pooling=("mean", "max")), StandardScaler(), LogisticRegression()
    ).fit(TEXTS, TWO)
    model = AutoModel.from_pretrained(demo_model()).eval()
    inputs = AutoTokenizer.from_pretrained(demo_model())(NEW[0], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[2][0].double().numpy()
    _, scale, head = (step for _, step in pipeline.steps)
    weights = head.coef_[0] / scale.scale_  # (768,)
    expected = (hidden - scale.mean_[:384]) @ weights[:384] / len(hidden)
    for neuron, token in enumerate(hidden.argmax(axis=0)):
        column = 384 + neuron
        expected[token] += (hidden[token, neuron] - scale.mean_[column]) * weights[column]
    explanation = explain_tokens(pipeline, NEW[:1])
    np.testing.assert_allclose(explanation.contributions[0][:, 0], expected, atol=1e-5)
    own = AutoTokenizer.from_pretrained(demo_model())
    assert explanation.tokens[0].tokens == own.convert_ids_to_tokens(inputs["input_ids"][0])


@pytest.mark.parametrize(("pooling", "place"), [("first", 0), ("last", -1)])
def test_the_first_or_the_last_token_takes_all(pooling, place):
    part = explain_tokens(spin(LogisticRegression(), pooling=pooling), NEW[:1]).contributions[0]
    assert part[place, 0] != 0 and np.count_nonzero(part) == 1


def test_company_does_not_change_the_result():
    pipeline = spin(StandardScaler(), LogisticRegression())
    texts = TEXTS[:6] + NEW + TEXTS[:2]
    for text, values in zip(texts, explain_tokens(pipeline, texts).contributions, strict=True):
        alone = explain_tokens(pipeline, [text]).contributions[0]
        np.testing.assert_allclose(values, alone, atol=1e-5)


def tokens_of(text, **params):
    pipeline = make_pipeline(activations(layers=1, **params), LogisticRegression())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*longer than max_length")
        return explain_tokens(pipeline.fit(TEXTS, TWO), [text]).tokens[0]


@pytest.mark.parametrize("text", [*NEW, "Größe: 3 µm 😀!", "a\ud800b", "  two  spaces "])
def test_tokens_are_where_the_text_has_them(text, tokenizer):
    tokens = tokens_of(text)
    expected = tokenizer(text.replace("\ud800", "\ufffd"))
    assert tokens.tokens == tokenizer.convert_ids_to_tokens(expected["input_ids"])
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


def test_words_are_whole_and_add_up_to_the_same():
    explanation = explain_tokens(spin(StandardScaler(), LogisticRegression()), NEW)
    words = explanation.merge_words()
    expected = ["[CLS]", "A", "lovely", "film", ",", "unbelievably", "dreadful", ".", "[SEP]"]
    assert words.tokens[0].surfaces() == expected
    np.testing.assert_allclose(words.decision_values, explanation.decision_values)


def test_of_two_classes_one_is_the_other_turned_around():
    explanation = explain_tokens(spin(StandardScaler(), LogisticRegression()), NEW)
    for one, zero in zip(explanation.for_class(1), explanation.for_class(0), strict=True):
        np.testing.assert_array_equal(one, -zero)
    assert explanation.intercept_for_class(1) == -explanation.intercept_for_class(0)
    with pytest.raises(ValueError, match=r"label='good' must be one of the classes \[0, 1\]"):
        explanation.for_class("good")


def test_top_tokens_are_those_with_the_largest_sums():
    explanation = explain_tokens(spin(StandardScaler(), LogisticRegression()), TEXTS)
    frame = explanation.to_frame()
    sums = frame[frame.end > 0].groupby("token").contribution.agg(["sum", "size"])
    best = sums.sort_values("sum", ascending=False).head(3)
    top = explanation.top_tokens(1, n=3)
    assert [row.token for row in top] == best.index.tolist()
    np.testing.assert_allclose([row.total for row in top], best["sum"])
    assert [row.n_occurrences for row in top] == best["size"].tolist()
    assert {row.token for row in explanation.top_tokens(1, n=99)}.isdisjoint({"[CLS]", "[SEP]"})


def test_the_frame_holds_every_contribution():
    explanation = explain_tokens(spin(LogisticRegression(), y=THREE), NEW)
    frame = explanation.to_frame()
    assert frame.columns.tolist() == ["text", "token", "start", "end", "class", "contribution"]
    sums = frame.groupby(["text", "class"]).contribution.sum().unstack()
    np.testing.assert_allclose(sums + explanation.intercept, explanation.decision_values)
    for row in frame[frame.end > 0].itertuples():
        assert NEW[row.text][row.start : row.end] == row.token


def test_html_shows_markup_as_text_and_stops_somewhere():
    texts = ["<script>alert(1)</script> & 😀 \n more"] + [f"text {i}" for i in range(30)]
    shown = explain_tokens(spin(LogisticRegression()), texts)._repr_html_()
    assert "<script" not in shown and "&lt;" in shown and "&amp;" in shown and "😀" in shown
    assert "and 11 more" in shown
    assert "color:" not in shown.replace("background-color:", "")  # the page's own text colour


def test_texts_can_be_picked_out():
    explanation = explain_tokens(spin(LogisticRegression()), NEW)
    assert len(explanation) == 4 and len(explanation[1:3]) == 2
    assert explanation[-1].tokens[0].text == NEW[-1]
    assert repr(explanation[0]) == "<TokenExplanation of 1 texts for the classes [0, 1]>"


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
        explain_tokens(make_pipeline(union, LogisticRegression()).fit(TEXTS, TWO), NEW)
    with pytest.raises(TypeError, match="LogisticRegression, but explain_tokens takes"):
        explain_tokens(LogisticRegression(), NEW)
    with pytest.raises(NotFittedError):
        explain_tokens(make_pipeline(activations(), LogisticRegression()), NEW)
    with pytest.raises(ValueError, match="No step of the pipeline is an LLMActivation"):
        explain_tokens(make_pipeline(LogisticRegression()).fit([[0], [1]], [0, 1]), NEW)


def test_the_tokens_that_activate_a_neuron_most_are_found():
    transformer = activations(layers=1, site="hidden").fit(TEXTS)
    explanation = explain_neurons(
        transformer, TEXTS, ["layer1_hidden_mean_5", "layer1_hidden_mean_2"], n_top=3
    )
    model = AutoModel.from_pretrained(demo_model()).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    assert list(explanation.hits) == ["layer1_hidden_mean_5", "layer1_hidden_mean_2"]
    for neuron, hits in zip((5, 2), explanation.hits.values(), strict=True):
        values = []
        for text in TEXTS[:6]:
            with torch.no_grad():
                output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            values.append(output.hidden_states[1][0, 1:-1, neuron].max().item())
        best = np.argsort(values)[::-1][:3]
        assert [hit.text for hit in hits] == best.tolist()
        np.testing.assert_allclose(
            [hit.activation for hit in hits], np.array(values)[best], atol=1e-5
        )
        assert all(TEXTS[hit.text][hit.start : hit.end] == hit.token for hit in hits)


def test_selected_neurons_are_found_behind_any_classifier():
    pipeline = prune(spin(HistGradientBoostingClassifier(max_iter=1)))
    name = pipeline[:2].get_feature_names_out()[0]
    explanation = explain_neurons(pipeline, [*TEXTS, "", "<b>"], name)
    assert len(explanation.hits[name]) == 7  # every distinct text that has a token of its own
    frame = explanation.to_frame()
    assert frame.activation.is_monotonic_decreasing and set(frame.neuron) == {name}
    assert "<b>&" not in explanation._repr_html_() and "&lt;" in explanation._repr_html_()


def test_neurons_that_are_not_there_are_refused():
    transformer = activations(layers=1).fit(TEXTS)
    with pytest.raises(ValueError, match=r"\['layer9'\] are not among the transformer's 384"):
        explain_neurons(transformer, TEXTS, "layer9")
    with pytest.raises(ValueError, match="LogisticRegression has 0 steps"):
        explain_neurons(LogisticRegression().fit([[0], [1]], [0, 1]), TEXTS, "layer1")


def test_a_tokenizer_without_offsets_is_refused():
    model = TINY["bert"].build(vocab_size=400)
    transformer = LLMActivationTransformer(model, tokenizer=ByT5Tokenizer(), layers=1).fit(TEXTS)
    with pytest.raises(ValueError, match="fast tokenizer.*ByT5.* does not tell where in the text"):
        explain_neurons(transformer, TEXTS, transformer.get_feature_names_out()[:1])
