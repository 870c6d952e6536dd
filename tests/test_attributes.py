"""The page of fitted attributes, compared with estimators that were really fitted."""

import re
from pathlib import Path

import numpy as np
import pytest

import skspin
from skspin import SalientNeuronSelector, make_spin_pipeline
from skspin.datasets import demo_model

PAGE = (Path(__file__).parents[1] / "docs/attributes.rst").read_text()
TEXTS = ["A fine film.", "Lovely.", "What a joy.", "A bore.", "Dreadful.", "It drags."] * 2
TYPES = {"int": int, "float": float, "str": str, "dict": dict, "Layout": object}


def attributes_on_the_page(title):
    """Read the rows under a title: names, and their types or shapes."""
    section = PAGE.partition(f"\n{title}\n---")[2].partition("\n---")[0]
    return dict(re.findall(r"\* - ``(\w+)``\n     - (.+)", section))


def learnt(estimator):
    return {name for name in vars(estimator) if name.endswith("_") and not name.startswith("_")}


def matches(value, written, sizes):
    """Whether a value is what the page says of it."""
    if written.startswith("("):
        names = [name.strip() for name in written.strip("()").split(",") if name.strip()]
        return np.shape(value) == tuple(sizes[name] for name in names)
    if written.startswith("list of "):
        return isinstance(value, list) and len(value) == sizes[written.removeprefix("list of ")]
    kind, _, other = written.partition(" or ")
    return isinstance(value, TYPES[kind]) or (other == "None" and value is None)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_page_lists_what_fit_assigns_with_its_shape(n_classes):
    spin = make_spin_pipeline(demo_model(), site=("hidden", "mlp"), pooling="mean", layers=[1, 2])
    spin.set_params(select__C=1.0).fit(TEXTS, np.arange(12) // 3 % n_classes)
    selector, transformer = spin["select"], spin["activations"]
    sizes = {
        "n_features": transformer.layout_.n_columns,
        "n_layers": 4,
        "n_classes": n_classes,
        "n_problems": 1 if n_classes == 2 else n_classes,
    }
    for step in (transformer, selector):
        listed = attributes_on_the_page(type(step).__name__)
        given = learnt(step)
        assert given <= set(listed) <= given | {"feature_names_in_"}
        wrong = [name for name in given if not matches(getattr(step, name), listed[name], sizes)]
        assert wrong == []


def test_a_selector_that_was_fitted_on_a_frame_has_its_names():
    pd = pytest.importorskip("pandas")
    X = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 6))).add_prefix("layer0_mlp_mean_")
    selector = SalientNeuronSelector(C=1.0).fit(X, X.iloc[:, 0] > 0)
    listed = attributes_on_the_page("SalientNeuronSelector")
    assert set(listed) == learnt(selector)
    assert matches(selector.feature_names_in_, listed["feature_names_in_"], {"n_features": 6})


def test_the_page_lists_what_displays_and_streamers_document():
    rows = re.findall(r"\* - :class:`~skspin\.(\w+)`\n     - (.+)", PAGE)
    listed = {name: set(re.findall(r"\w+_\b", attributes)) for name, attributes in rows}
    documented = {
        name: set(re.findall(r"^    (\w+_) :", getattr(skspin, name).__doc__, re.MULTILINE))
        for name in skspin.__all__
        if name.endswith(("Display", "Streamer"))
    }
    assert listed == documented
