"""Every prefix has the score that the pipeline gives to its tokens, and one pass finds them all."""

import re

import numpy as np
import pytest
from extracted_rows import watching
from growing_texts import (
    LABELS,
    POOLINGS,
    TEXTS,
    cut,
    growing,
    letters,
    scores_by_hand,
    words,
)
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from sklearn.svm import SVC, LinearSVC
from tiny_models import ALL, tiny_tokenizer

from skspin import LLMActivationTransformer, PrefixScorer, prune, score_prefixes

NEW = ["word3 word30 word31 word7 word8 word1 word2", "word5 unknown word9"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def ids_of(spin, text):
    return spin["activations"].tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "head",
    [
        LinearSVC(C=0.01),
        MLPClassifier((4,), max_iter=500, random_state=0),
        RandomForestClassifier(20, random_state=0),
        SVC(),
        make_pipeline(MaxAbsScaler(), LogisticRegression(C=0.1)),
    ],
    ids=lambda head: type(head).__name__,
)
@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_any_head_scores_prefixes(head):
    spin = growing(head=head)
    prefixes = cut(ids_of(spin, NEW[0]), head=1)
    for scores in (score_prefixes(spin, NEW[:1]), score_prefixes(prune(spin), NEW[:1])):
        given = {"decision_function": scores.decision_values, "predict_proba": scores.probabilities}
        for method, values in given.items():
            assert (values is not None) == hasattr(head, method)
            if values is not None:
                expected = scores_by_hand(spin, prefixes, method)
                np.testing.assert_allclose(values[0], expected, **CLOSE)


def test_several_classes_and_outputs_have_a_column_each():
    three = growing(labels=list("abcabc") * 2)
    scores = score_prefixes(three, NEW)
    expected = scores_by_hand(three, cut(ids_of(three, NEW[0]), head=1))
    np.testing.assert_allclose(scores.decision_values[0], expected, **CLOSE)
    np.testing.assert_allclose(scores.for_class("b")[0], expected[:, 1], **CLOSE)
    with pytest.raises(
        ValueError, match=r"label=None must be one of.* \['a', 'b', 'c'\].*label='a'"
    ):
        scores.for_class()
    labels = np.array([LABELS, [0, 0, 0, 1, 1, 1] * 2]).T
    several = growing(labels=labels, head=MultiOutputClassifier(LogisticRegression(C=0.1)))
    found = score_prefixes(several, NEW)
    assert found.decision_values is None and found.classes.tolist() == [0, 1]
    whole = np.stack([part[:, 1] for part in several.predict_proba(NEW)], axis=1)
    last = [part[-1] for part in found.probabilities]
    np.testing.assert_allclose(last, whole, **CLOSE)
    rest = growing(labels=labels, head=OneVsRestClassifier(LogisticRegression(C=0.1)))
    last = [part[-1] for part in score_prefixes(rest, NEW).decision_values]
    np.testing.assert_allclose(last, rest.decision_function(NEW), **CLOSE)


def test_votes_of_pairs_are_refused():
    spin = growing(labels=list("abcdab") * 2, head=SVC(decision_function_shape="ovo"))
    with pytest.raises(ValueError, match="decision_function_shape='ovr'"):
        score_prefixes(spin, NEW)


def test_the_last_score_is_that_of_the_text_and_one_pass_gives_all():
    spin = growing("gpt2", site=("hidden", "mlp", "attention"), long_texts="windows")
    seen = []
    with watching(spin["activations"].model, lambda ids: seen.append(ids.numel())):
        scores = score_prefixes(spin, NEW + NEW[:1])
    assert sorted(seen[-2:]) == [4, 8]  # what was before tried whether it looks ahead
    last = [part[-1, 0] for part in scores.decision_values]
    np.testing.assert_allclose(last, spin.decision_function(NEW + NEW[:1]), **CLOSE)


@pytest.mark.parametrize("over", ["all", "text"])
def test_a_prompt_comes_before_every_prefix_and_has_no_score(over):
    spin = growing(prompt="word40 word41 {text}", pool_over=over)
    scores = score_prefixes(spin, NEW[:1])
    ids = ids_of(spin, f"word40 word41 {NEW[0]}")
    start = 0 if over == "all" else 3
    expected = scores_by_hand(spin, cut(ids, head=3, pooled_from=start))
    np.testing.assert_allclose(scores.decision_values[0], expected, **CLOSE)
    assert scores.tokens[0].surfaces() == NEW[0].split()


def test_what_comes_after_the_text_matters_only_if_it_is_pooled():
    spin = growing(prompt="word40 {text} word41", pool_over="text", tokenizer=tiny_tokenizer())
    part = score_prefixes(spin, NEW[:1]).decision_values[0]
    ids = ids_of(spin, f"word40 {NEW[0]}")[:-1]
    np.testing.assert_allclose(part, scores_by_hand(spin, cut(ids, 2, pooled_from=2)), **CLOSE)
    for params in ({"prompt": "word40 {text} word41"}, {"tokenizer": tiny_tokenizer()}):
        with pytest.raises(ValueError, match="pool_over='all' pools them"):
            score_prefixes(growing(**params), NEW)
    with pytest.raises(ValueError, match="repeats the text"):
        score_prefixes(growing(prompt="{text} {text}"), NEW)


def test_conversations_are_scored_by_the_tokens_that_are_pooled():
    tokenizer = letters()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    said = [
        {"role": "user", "content": "Is it?"},
        {"role": "assistant", "content": "No, it is not."},
    ]
    spin = growing(tokenizer=tokenizer, pool_over="assistant", fit=False)
    other = [said[0], {"role": "assistant", "content": "Yes."}]
    spin.fit([said, other] * 4, [0, 1] * 4)
    scores = score_prefixes(spin, [said])
    assert "".join(tokenizer.convert_ids_to_tokens(range(3))) == "<pad><s></s>"
    assert scores.tokens[0].tokens == [token.replace(" ", "Ġ") for token in said[1]["content"]]
    for part, end in zip(scores.decision_values[0], range(1, 15), strict=True):
        until = [said[0], {"role": "assistant", "content": said[1]["content"][:end]}]
        np.testing.assert_allclose(part, spin.decision_function([until]), **CLOSE)
    with pytest.raises(ValueError, match="pool_over='all' pools them"):
        score_prefixes(
            growing(tokenizer=tokenizer, fit=False).fit([said, other] * 4, [0, 1] * 4), [said]
        )


def test_an_empty_text_has_no_prefix():
    scores = score_prefixes(growing(), ["", NEW[0]])
    assert [len(part) for part in scores.decision_values] == [0, 7]
    assert scores.first_crossing(-np.inf)[0] is None
    assert score_prefixes(growing(), [""]).for_class(1)[0].shape == (0,)


def test_chunks_of_rows_and_frames_change_nothing(monkeypatch):
    spin = growing("gpt2", fit=False).set_output(transform="pandas").fit(TEXTS, LABELS)
    whole = score_prefixes(spin, NEW).decision_values
    last = [part[-1, 0] for part in whole]
    np.testing.assert_allclose(last, spin.decision_function(NEW), **CLOSE)
    monkeypatch.setattr("skspin._serving.prefixes._MOST_VALUES", 1000)
    chunked = score_prefixes(spin, NEW).decision_values
    for one, other in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "xlnet", "t5", "deberta-v2", "fnet"])
def test_a_model_that_looks_ahead_is_refused(name):
    spin = growing(name, stack="decoder") if name == "t5" else growing(name)
    with pytest.raises(ValueError, match="looks ahead"):
        score_prefixes(spin, NEW)


def test_positions_that_a_long_text_scales_need_a_max_length_that_none_reaches():
    for score in (PrefixScorer, lambda spin: score_prefixes(spin, NEW)):
        with pytest.raises(ValueError, match="Fit with max_length=16 or less, and long_texts='win"):
            score(growing("phi3-128k", max_length=17))
    spin = growing("phi3-128k", max_length=16, long_texts="windows")
    text = " ".join(NEW * 3)
    prefixes = [text[: token.end()] for token in re.finditer(r"\w+", text)]
    expected = spin.decision_function(prefixes)
    np.testing.assert_allclose(score_prefixes(spin, [text]).for_class(1)[0], expected, **CLOSE)
    scorer = PrefixScorer(spin)
    scorer.push(text, final=True)
    np.testing.assert_allclose(scorer.scores.for_class(1)[0], expected, **CLOSE)


def test_a_state_space_model_does_not_look_ahead():
    transformer = LLMActivationTransformer(
        ALL["mamba"].build(), tokenizer=words(), pooling=POOLINGS, cache=None
    )
    spin = make_pipeline(transformer, LogisticRegression()).fit(TEXTS, LABELS)
    last = [part[-1, 0] for part in score_prefixes(spin, NEW).decision_values]
    np.testing.assert_allclose(last, spin.decision_function(NEW), **CLOSE)


def test_crossings_and_frames_tell_where():
    spin = growing()
    scores = score_prefixes(spin, NEW)
    values = scores.for_class(1)[0]
    threshold = np.sort(values)[-2]
    first = int(np.flatnonzero(values >= threshold)[0])
    crossing = scores.first_crossing(threshold)[0]
    assert crossing == (first, scores.tokens[0].ends[first], values[first])
    assert NEW[0][: crossing.end].split() == NEW[0].split()[: first + 1]
    assert scores.first_crossing(np.inf) == [None, None]
    for wrong in (np.nan, "0.5", None):
        with pytest.raises(ValueError, match=f"threshold={wrong!r} must be a number"):
            scores.first_crossing(wrong)
    assert scores.first_crossing(0.9999, 0, response_method="predict_proba") == [None, None]
    frame = scores.to_frame()
    assert list(frame.columns) == ["text", "token", "start", "end", "class", "score"]
    assert frame["class"].unique().tolist() == [1] and len(frame) == 10
    np.testing.assert_array_equal(frame[frame.text == 0].score, values)
    both = scores.to_frame(response_method="predict_proba")
    np.testing.assert_allclose(both.groupby(["text", "end"]).score.sum(), 1)
    np.testing.assert_array_equal(scores.for_class(0)[0], -values)
    assert repr(scores) == (
        "<PrefixScores of 2 texts, 10 tokens: decision values and probabilities for the classes "
        "[0, 1]>"
    )
    with pytest.raises(ValueError, match=r"response_method='predict', .*\['decision_function'"):
        scores.to_frame(response_method="predict")


def test_pipelines_of_another_kind_are_refused():
    spin = growing()
    with pytest.raises(ValueError, match="ends in a Ridge"):
        score_prefixes(make_pipeline(spin["activations"], Ridge()).fit(TEXTS, LABELS), NEW)
    union = FeatureUnion([("activations", spin["activations"])])
    inside = make_pipeline(union, LogisticRegression()).fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match="a step by itself"):
        score_prefixes(inside, NEW)
    with pytest.raises(TypeError, match="score_prefixes takes a fitted Pipeline"):
        score_prefixes(spin["activations"], NEW)
