"""What the pictures say, read back from what matplotlib was told to draw."""

import builtins

import matplotlib
import numpy as np
import pandas as pd
import pytest
from growing_texts import growing
from scipy.stats import loguniform
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    RandomizedSearchCV,
    TunedThresholdClassifierCV,
)
from sklearn.pipeline import FeatureUnion, Pipeline

from skspin import (
    LayerSalienceDisplay,
    PrefixScoresDisplay,
    SalientNeuronSelector,
    SparsityPathDisplay,
    TokenContributionDisplay,
    score_prefixes,
)
from skspin._explain import TokenExplanation
from skspin._texts import TextTokens

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

SPARSITY = [0.8, 0.2, 0.5]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 60))
    return X, (X[:, 25] + X[:, 41] + 0.5 * rng.normal(size=200) > 0).astype(int)


@pytest.fixture(scope="module")
def selector(data):
    return SalientNeuronSelector(layer_sizes=20, C=0.3).fit(*data)


def spin(**params):
    select = SalientNeuronSelector(layer_sizes=20, C=0.3)
    return Pipeline([("select", select), ("classify", LogisticRegression())]).set_params(**params)


@pytest.fixture(scope="module")
def search(data):
    grid = {"select__sparsity": SPARSITY, "classify__C": [1e-6, 1.0]}
    return GridSearchCV(spin(), grid, scoring="accuracy").fit(*data)


def test_layers_are_drawn_with_their_scores_and_counts(selector):
    display = LayerSalienceDisplay.from_estimator(selector)
    (line,) = display.line_
    assert line.get_xdata().tolist() == [0, 1, 2]
    np.testing.assert_array_equal(line.get_ydata(), selector.layer_scores_)
    heights = [bar.get_height() for bar in display.count_ax_.patches]
    assert heights == selector.n_selected_.tolist()
    assert display.ax_.get_ylabel() and display.count_ax_.get_ylabel()
    assert display.count_ax_.get_xlabel() == "layer"
    assert display.ax_.get_legend() is None  # one curve needs no name


def test_the_selector_is_found_in_a_pipeline(data):
    whole = spin().fit(*data)
    columns = ColumnTransformer([("all", spin()[:1], slice(0, 60))]).fit(*data)
    for fitted in (whole, FrozenEstimator(whole), columns, Pipeline([("one", whole)])):
        display = LayerSalienceDisplay.from_estimator(fitted)
        np.testing.assert_array_equal(display.layer_scores, whole["select"].layer_scores_)
    two = FeatureUnion([("one", whole[0]), ("two", whole[0])])
    with pytest.raises(ValueError, match="FeatureUnion has 2 steps of type Salient.*Pass the one"):
        LayerSalienceDisplay.from_estimator(two)
    needed = "LogisticRegression has 0 steps of type Salient.*SalientNeuronSelector that.*Pipeline"
    with pytest.raises(ValueError, match=needed):
        LayerSalienceDisplay.from_estimator(whole["classify"])


def test_sites_and_stacks_are_told_apart_by_more_than_colour():
    names = [
        f"{stack}_layer{i}_{site}"
        for stack in ("encoder", "decoder")
        for i in (1, 2)
        for site in ("hidden", "mlp")
    ]
    display = LayerSalienceDisplay(
        layer_names=names, layer_scores=np.linspace(0.5, 0.9, 8), n_selected=np.arange(1, 9)
    ).plot()
    deep = LayerSalienceDisplay(
        layer_names=["layer9_deep__layer3_mlp"], layer_scores=np.ones(1), n_selected=np.ones(1, int)
    ).plot()
    assert deep.line_[0].get_xdata().tolist() == [3] and deep.line_[0].get_label() == "mlp"
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert labels == ["encoder, hidden", "encoder, mlp", "decoder, hidden", "decoder, mlp"]
    looks = {(line.get_color(), line.get_marker()) for line in display.line_}
    assert len(looks) == 4 and len({line.get_linestyle() for line in display.line_}) == 2
    tops = {bar.get_x(): bar.get_y() + bar.get_height() for bar in display.count_ax_.patches}
    assert sorted(tops.values()) == [1 + 2 + 5 + 6, 3 + 4 + 7 + 8]  # stacked, none hidden


def test_a_path_shows_the_folds_of_the_search_and_the_neurons_of_a_fit_at_that_sparsity(
    search, data
):
    display = SparsityPathDisplay.from_search(search)
    assert display.sparsity.tolist() == sorted(SPARSITY)
    best_C = search.best_params_["classify__C"]
    for k, sparsity in enumerate(display.sparsity):
        params = {"classify__C": best_C, "select__sparsity": sparsity}
        row = search.cv_results_["params"].index(params)
        assert display.score_mean[k] == search.cv_results_["mean_test_score"][row]
        assert display.score_std[k] == search.cv_results_["std_test_score"][row]
        fitted = spin(select__sparsity=sparsity).fit(*data)["select"]
        assert display.n_neurons[k] == fitted.n_selected_.sum()
    assert display.best_sparsity == search.best_params_["select__sparsity"]
    assert display.ax_.get_ylabel() == "accuracy"
    assert display.count_ax_.get_xlabel() == "sparsity"


def test_a_path_is_found_among_arrays_and_its_selector_inside_a_column_transformer(data):
    parts = ColumnTransformer([("all", spin()[:1], slice(0, 60))])
    model = Pipeline([("parts", parts), ("classify", LogisticRegression())])
    sizes = [[20, 20, 20], np.array([30, 30]), np.array([15] * 4)]
    name = "parts__all__select__"
    grid = {f"{name}layer_sizes": sizes, f"{name}sparsity": SPARSITY}
    search = GridSearchCV(model, grid, cv=2).fit(*data)
    display = SparsityPathDisplay.from_search(search)
    assert display.sparsity.tolist() == sorted(SPARSITY)
    fitted = model.set_params(**{**search.best_params_, f"{name}sparsity": 0.5}).fit(*data)
    selector = fitted["parts"].named_transformers_["all"]["select"]
    assert display.n_neurons[1] == selector.n_selected_.sum()


def test_of_a_random_search_the_best_candidate_of_each_sparsity_is_drawn(data):
    distributions = {"select__sparsity": SPARSITY, "classify__C": loguniform(1e-6, 1)}
    search = RandomizedSearchCV(spin(), distributions, n_iter=9, random_state=0).fit(*data)
    display = SparsityPathDisplay.from_search(search)
    frame = pd.DataFrame(search.cv_results_)
    best = frame.groupby("param_select__sparsity").mean_test_score.max()
    assert display.sparsity.tolist() == best.index.tolist() and len(best) > 1
    np.testing.assert_array_equal(display.score_mean, best)
    assert display.score_mean[display.sparsity == display.best_sparsity] == search.best_score_


def test_one_layer_has_one_whole_number_for_a_tick(data):
    selector = SalientNeuronSelector(layer_sizes=None, C=0.3).fit(*data)
    display = LayerSalienceDisplay.from_estimator(selector)
    low, high = display.count_ax_.get_xlim()
    assert [tick for tick in display.count_ax_.get_xticks() if low <= tick <= high] == [0]


def test_of_several_scores_one_is_drawn_and_without_a_refit_in_one_panel(data):
    grid, scores = {"select__sparsity": SPARSITY}, ["accuracy", "roc_auc"]
    search = GridSearchCV(spin(), grid, scoring=scores, refit="roc_auc").fit(*data)
    assert SparsityPathDisplay.from_search(search).ax_.get_ylabel() == "roc_auc"
    with pytest.raises(ValueError, match="metric='f1' is not among.*'accuracy', 'roc_auc'"):
        SparsityPathDisplay.from_search(search, metric="f1")
    search = clone(search).set_params(refit=False).fit(*data)
    with pytest.raises(ValueError, match="Pass one, e.g. metric='accuracy'"):
        SparsityPathDisplay.from_search(search)
    display = SparsityPathDisplay.from_search(search, metric="accuracy")
    means = search.cv_results_["mean_test_accuracy"]
    np.testing.assert_allclose(np.sort(display.score_mean), np.sort(means))
    assert display.n_neurons is None and display.count_ax_ is None
    assert display.ax_.get_xlabel() == "sparsity"


def explained(tokens, values, classes=(0, 1)):
    """Explain a text of given tokens, as if a model had."""
    text = " ".join(tokens)
    ends = np.cumsum([len(token) + 1 for token in tokens]) - 1
    starts = ends - [len(token) for token in tokens]
    located = TextTokens(text, list(tokens), starts, ends, np.where(ends > starts, 0, -1))
    return TokenExplanation(
        [located], [np.array(values)[:, None]], np.array([0.5]), np.array(classes)
    )


def test_tokens_are_drawn_in_reading_order_with_their_contributions():
    explanation = explained(["costs", "$5", "or", "$6"], [0.5, -0.25, 0.0, 1.0])
    display = TokenContributionDisplay.from_explanation(explanation)
    assert [bar.get_width() for bar in display.bars_] == [0.5, -0.25, 0.0, 1.0]
    labels = [label.get_text() for label in display.ax_.get_yticklabels()]
    assert labels == ["costs", "$5", "or", "$6"]
    bottom, top = display.ax_.get_ylim()
    assert bottom > top  # the first token is on top
    assert display.ax_.get_xlabel() == "contribution to the decision value for 1"
    assert "+1.75 = tokens +1.25, intercept +0.50" in display.ax_.get_title(loc="left")
    assert not any(label.get_parse_math() for label in display.ax_.get_yticklabels())
    turned = TokenContributionDisplay.from_explanation(explanation, label=0)
    assert [bar.get_width() for bar in turned.bars_] == [-0.5, 0.25, 0.0, -1.0]
    assert turned.intercept == -0.5


def test_a_long_word_leaves_room_for_the_bars():
    display = TokenContributionDisplay.from_explanation(explained(["x" * 99, "y"], [1.0, 2.0]))
    labels = [label.get_text() for label in display.ax_.get_yticklabels()]
    assert labels == ["x" * 27 + "…", "y"]
    assert display.tokens[0] == "x" * 99
    display.figure_.draw_without_rendering()
    assert display.ax_.get_position().width > 0.5


def test_of_a_long_text_the_largest_contributions_are_drawn():
    values = np.arange(50.0)
    display = TokenContributionDisplay.from_explanation(explained(["w"] * 50, values))
    assert [bar.get_width() for bar in display.bars_] == values[10:].tolist()
    assert "10 small ones not shown" in display.ax_.get_title(loc="left")
    axes = plt.figure().add_axes((0, 0, 1, 1))
    assert display.plot(ax=axes).ax_ is axes


def test_given_axes_are_used_if_they_have_a_place_in_a_grid(selector, search):
    figure, (left, right) = plt.subplots(1, 2)
    path = SparsityPathDisplay.from_search(search, ax=left)
    layers = LayerSalienceDisplay.from_estimator(selector, ax=right)
    assert path.ax_ is left and layers.ax_ is right
    assert path.figure_ is layers.figure_ is figure
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match=r"plt.subplots\(\)"):
        LayerSalienceDisplay.from_estimator(selector, ax=figure.add_axes((0, 0, 1, 1)))


def test_what_is_not_fitted_or_no_search_is_refused(data, search):
    for unfitted in (SalientNeuronSelector(), spin(), clone(search)):
        with pytest.raises(NotFittedError):
            LayerSalienceDisplay.from_estimator(unfitted)
    with pytest.raises(ValueError, match="GridSearchCV has 0 steps.*Pass its best_estimator_"):
        LayerSalienceDisplay.from_estimator(search)
    with pytest.raises(
        TypeError, match="search is a Pipeline, but from_search takes.*GridSearchCV"
    ):
        SparsityPathDisplay.from_search(search.best_estimator_)
    tuned = TunedThresholdClassifierCV(spin(), cv=2, store_cv_results=True).fit(*data)
    with pytest.raises(TypeError, match="search is a TunedThreshold.*takes a fitted search"):
        SparsityPathDisplay.from_search(tuned)
    with pytest.raises(NotFittedError):
        SparsityPathDisplay.from_search(GridSearchCV(spin(), {"select__sparsity": SPARSITY}))
    other = GridSearchCV(spin(), {"classify__C": [0.1, 1.0]}).fit(*data)
    with pytest.raises(ValueError, match=r"tried \['classify__C'\].*one selector"):
        SparsityPathDisplay.from_search(other)


def test_missing_matplotlib_comes_with_its_fix(selector, monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r'pip install "skspin\[plot\]"'):
        LayerSalienceDisplay.from_estimator(selector)


def test_scores_are_drawn_over_the_text():
    text, spin = "word3 word30 word31 word7 word8", growing()
    display = PrefixScoresDisplay.from_estimator(spin, text, threshold=0.25)
    values = score_prefixes(spin, [text]).for_class(1)[0]
    np.testing.assert_allclose(display.line_.get_ydata(), values, rtol=1e-5)
    assert [label.get_text() for label in display.ax_.get_xticklabels()] == text.split()
    assert display.ax_.get_ylabel() == "decision value for 1"
    assert set(display.threshold_line_.get_ydata()) == {0.25}
    scores = score_prefixes(spin, ["word1", text])
    _, ax = plt.subplots()
    other = PrefixScoresDisplay.from_scores(
        scores, text=1, label=0, response_method="predict_proba", ax=ax
    )
    assert other.ax_ is ax and other.figure_ is ax.figure and other.threshold_line_ is None
    assert ax.get_ylabel() == "probability of 0"
    np.testing.assert_allclose(other.line_.get_ydata(), scores.probabilities[1][:, 0])


def test_the_first_token_that_reaches_the_threshold_is_marked():
    display = PrefixScoresDisplay(
        tokens=["a", "$b$", "c"], scores=np.array([0, 2, 3]), threshold=2
    ).plot()
    assert display.ax_.get_title("left") == "threshold 2: reached at token 2, “$b$”"
    assert not display.ax_.get_xticklabels()[1].get_parse_math()
    mark = display.ax_.lines[-1]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (1, 2)
    display.threshold = 4
    assert display.plot().ax_.get_title("left") == "threshold 4: not reached"
    for wrong in (np.nan, "0.5"):
        with pytest.raises(ValueError, match=f"threshold={wrong!r} must be a number"):
            PrefixScoresDisplay(tokens=["a"], scores=np.array([0]), threshold=wrong)


def test_of_a_long_text_tokens_are_counted():
    display = PrefixScoresDisplay(tokens=["a"] * 300, scores=np.arange(300)).plot()
    assert display.ax_.get_xlabel() == "tokens so far"
    assert len(display.ax_.get_xticks()) < 20


def test_legends_leave_room_for_titles_and_fit_narrow_axes(search):
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.5), layout="constrained")
    for ax in axes:
        SparsityPathDisplay.from_search(search, ax=ax)
        ax.set_title("SPIN")
    figure.canvas.draw()  # warns if there is no room
    for ax in axes:
        assert not ax.get_legend().get_window_extent().overlaps(ax.title.get_window_extent())


@pytest.mark.parametrize("texts", [["word3 word30"], np.array(["a", "b"]), pd.Series(["a"])])
def test_of_several_texts_none_is_drawn(texts):
    for display in (PrefixScoresDisplay, TokenContributionDisplay):
        with pytest.raises(TypeError, match=f"text is a {type(texts).__name__}, but one str"):
            display.from_estimator(growing(), texts)
