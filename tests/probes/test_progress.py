"""Whoever wants to know how far a fit has come is told."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from skspin import SalientNeuronSelector

X = np.random.default_rng(0).normal(size=(60, 12))
Y = (X[:, 0] > 0).astype(int)
SELECTOR = {"layer_sizes": 4, "cache": None}


def search_over_pipeline(n_jobs=None):
    pipeline = make_pipeline(SalientNeuronSelector(**SELECTOR), LogisticRegression())
    grid = {"salientneuronselector__sparsity": [0.1, 0.5]}
    return GridSearchCV(pipeline, grid, cv=2, n_jobs=n_jobs)


class Diary:
    """A callback that writes down which tasks began and ended."""

    max_propagation_depth = None

    def __init__(self):
        self.began, self.ended = [], []

    def setup(self, estimator, context): ...

    def teardown(self, estimator, context): ...

    def on_fit_task_begin(self, estimator, context):
        self.began.append(context.task_name)

    def on_fit_task_end(self, estimator, context):
        self.ended.append(context.task_name)


def test_callbacks_hear_of_every_layer_in_a_search_too():
    pytest.importorskip("sklearn.callback")
    diary, of_search = Diary(), Diary()
    SalientNeuronSelector(**SELECTOR).set_callbacks(diary).fit(X, Y)
    layers = ["layer0_input", "layer1_input", "layer2_input"]
    assert diary.began == ["fit", *layers]
    assert diary.ended == [*layers, "fit"]
    search_over_pipeline().set_callbacks(of_search).fit(X, Y)
    assert of_search.ended.count("layer0_input") == 2 * 2 + 1


@pytest.mark.parametrize(
    "estimator",
    [
        SalientNeuronSelector(**SELECTOR),
        search_over_pipeline().estimator,
        search_over_pipeline(),
        search_over_pipeline(2),
    ],
    ids=["selector", "pipeline", "search", "search in two processes"],
)
def test_scikit_learns_progress_bar_shows_the_selector_to_its_end(estimator, capfd, monkeypatch):
    callback = pytest.importorskip("sklearn.callback")
    monkeypatch.setenv("COLUMNS", "200")  # narrower bars leave the figure out
    clone(estimator).set_callbacks(callback.ProgressBar(max_propagation_depth=None)).fit(X, Y)
    bars = [line for line in capfd.readouterr().out.splitlines() if "SalientNeuron" in line]
    assert bars and all("100%" in bar for bar in bars)


def test_a_bar_is_shown_when_asked_for(capfd):
    SalientNeuronSelector(**SELECTOR).fit(X, Y)
    assert capfd.readouterr() == ("", "")
    SalientNeuronSelector(**SELECTOR, verbose=1).fit(X, Y)
    assert "3/3" in capfd.readouterr().err
