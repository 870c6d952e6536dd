"""What is saved is small, holds no model, and runs only with the model it was fitted with."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skops.io
import torch
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import InconsistentVersionWarning
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from tiny_models import save_parts, tiny_reader
from transformers import BitsAndBytesConfig

import skspin
from skspin import (
    TRUSTED_TYPES,
    LLMActivationTransformer,
    ModelMismatchError,
    SalientNeuronSelector,
    make_spin_pipeline,
    prune,
)
from skspin.datasets import demo_model

TEXTS = ["A fine film.", "Lovely.", "What a joy.", "A bore.", "Dreadful.", "It drags."] * 2
LABELS = [1, 1, 1, 0, 0, 0] * 2


def fitted(model, **params):
    pipeline = make_spin_pipeline(model, **params).set_params(select__C=10, select__tol=0.01)
    return pipeline.fit(TEXTS, LABELS)


def reload(estimator):
    return pickle.loads(pickle.dumps(estimator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(save_parts(tiny_reader(), tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def pipeline(folder):
    return fitted(folder)


@pytest.fixture
def tiny():
    return tiny_reader()


def test_a_pickle_gives_the_same_predictions(pipeline):
    loaded = reload(pipeline)
    np.testing.assert_array_equal(
        loaded.decision_function(TEXTS), pipeline.decision_function(TEXTS)
    )
    for name in ("coef_", "salience_", "support_", "n_selected_"):
        np.testing.assert_array_equal(
            getattr(loaded["select"], name), getattr(pipeline["select"], name)
        )
    assert loaded["activations"].layout_ == pipeline["activations"].layout_


def test_a_pickle_opens_without_torch_and_without_a_device(pipeline):
    code = (
        "import pickle, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('torch', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "pickle.load(sys.stdin.buffer)\n"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(pipeline), check=True)


def test_a_pickle_of_many_classes_is_small():
    pipeline = make_spin_pipeline(demo_model()).set_params(select__C=0.3, select__tol=0.05)
    pipeline.fit(TEXTS, list("abcdef") * 2)
    saved = len(pickle.dumps(pipeline))
    assert saved < pipeline["select"].coef_.nbytes / 2  # nearly all of it zero
    assert saved < 2_000_000


def with_other_weights(parts):
    with torch.no_grad():
        parts["model"].embeddings.word_embeddings.weight += 1


def with_another_token(parts):
    parts["tokenizer"].add_tokens(["film"])


@pytest.mark.parametrize("change", [with_other_weights, with_another_token])
def test_other_weights_or_another_tokenizer_are_refused(tiny, tmp_path, change):
    loaded = reload(fitted(Path(save_parts(tiny, tmp_path))))
    known = loaded["activations"].model_fingerprint_
    loaded.predict(TEXTS)
    change(tiny)
    save_parts(tiny, tmp_path)
    with pytest.raises(ModelMismatchError, match="Give it the model.*or fit again") as refusal:
        loaded.predict(TEXTS)
    assert str(refusal.value).count("folder:") == 2 and known in str(refusal.value)


def test_a_model_in_memory_stays_out_and_comes_back_by_hand(tiny):
    pipeline = fitted(**tiny)
    expected = pipeline.decision_function(TEXTS)
    loaded = reload(pipeline)
    with pytest.raises(ValueError, match=r"set_params\(model=...\)"):
        loaded.predict(TEXTS)
    other = tiny_reader()
    with_other_weights(other)
    with pytest.raises(ModelMismatchError, match="model='BertModel'") as refusal:
        loaded.set_params(activations__model=other["model"]).predict(TEXTS)
    known = pipeline["activations"].model_fingerprint_
    assert known in str(refusal.value) and len(str(refusal.value)) < 500
    loaded.set_params(activations__model=tiny_reader()["model"])
    np.testing.assert_allclose(loaded.decision_function(TEXTS), expected, rtol=1e-5)


def test_joblib_memory_tells_models_in_memory_apart(tiny, tmp_path):
    other = tiny_reader()
    with_other_weights(other)
    heads = []
    for parts in (tiny, other):
        steps = (LLMActivationTransformer(**parts), SalientNeuronSelector(C=10, tol=0.01))
        pipeline = make_pipeline(*steps, LogisticRegression(), memory=str(tmp_path))
        heads.append(pipeline.fit(TEXTS, LABELS)[-1].coef_)
    assert not np.array_equal(*heads)


def test_a_copy_shares_the_model_in_memory(tiny):
    pipeline = fitted(**tiny)
    expected = pipeline.decision_function(TEXTS)
    for copied in (copy.copy(pipeline), copy.deepcopy(pipeline)):
        assert copied["activations"].model is tiny["model"]
        np.testing.assert_array_equal(copied.decision_function(TEXTS), expected)
    for twin in (copy.copy(pipeline["activations"]), copy.deepcopy(pipeline["activations"])):
        assert twin is not pipeline["activations"]
        assert twin.model is tiny["model"] and twin.tokenizer is tiny["tokenizer"]
    twin.set_params(site="hidden", layers=[1]).fit(TEXTS)
    np.testing.assert_array_equal(pipeline.decision_function(TEXTS), expected)


def test_skops_loads_what_it_saved_and_trusts_no_more_than_it_needs(folder, pipeline, tiny):
    select = SelectFromModel(LogisticRegression())  # pruning puts what is left of it in a step
    other = make_pipeline(LLMActivationTransformer(str(folder), layers=range(2)), select)
    found = {"pathlib.PosixPath", "pathlib.WindowsPath"}  # one of them on each system
    for estimator, method in [
        (pipeline, "decision_function"),
        (prune(fitted(str(folder))), "decision_function"),
        (prune(other.fit(TEXTS, LABELS)), "transform"),
        (LLMActivationTransformer(tiny["model"], tokenizer=str(folder)).fit(TEXTS), None),
    ]:
        saved = skops.io.dumps(estimator)
        found.update(skops.io.get_untrusted_types(data=saved))
        loaded = skops.io.loads(saved, trusted=TRUSTED_TYPES)
        if method is not None:  # a model in memory stays out
            expected = getattr(estimator, method)(TEXTS)
            np.testing.assert_array_equal(getattr(loaded, method)(TEXTS), expected)
    assert sorted(found) == TRUSTED_TYPES


DOCUMENTED = [
    *[("layers", value) for value in (range(2), range(0, -2, -1), np.arange(2), [0, -1], (1,), 1)],
    *[("layers", value) for value in (np.int64(1), [np.int64(0), np.int64(1)])],
    ("site", ("hidden", "mlp")),
    ("site", ["hidden"]),
    ("pooling", ("mean", "max")),
    ("pooling", np.array(["mean", "last"]).tolist()),
    ("stack", ("encoder",)),
    ("prompt", "Review: {text} Good?"),
    ("device", ["cpu"]),
    ("device", ("cpu", "cpu")),
    ("batch_tokens", np.int64(512)),
    *[("cache", value) for value in (None, Path("store"), "store")],
    ("output_folder", Path("output")),
    ("model_kwargs", {"attn_implementation": "eager", "device_map": "cpu", "token": False}),
    ("model_kwargs", {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}),
    *[("C", value) for value in ([3.0, 10.0], (3, 10), np.array([3.0, 10.0]), np.float64(10))],
    *[("layer_sizes", value) for value in (48, [24, 24], np.array([16, 32]), range(48, 49), None)],
    *[("class_weight", value) for value in ("balanced", {0: 1, 1: 2.5}, {np.int64(1): 2.0})],
    *[("sparsity", value) for value in (np.float64(0.5), np.float32(0.5))],
    ("max_layer", np.int64(0)),
    ("max_layer", range(1, 7)[0]),
    ("random_state", np.random.RandomState(0)),
    ("device", None),
]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # of old bitsandbytes
@pytest.mark.parametrize(("name", "value"), DOCUMENTED, ids=str)
def test_skops_loads_every_value_that_a_parameter_may_have(
    name, value, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if name in LLMActivationTransformer().get_params():
        estimator, X = LLMActivationTransformer(folder, **{name: value}), TEXTS
    else:
        estimator = SalientNeuronSelector(**{"C": 10.0, "layer_sizes": 24, name: value})
        X = LLMActivationTransformer(folder, layers=range(2)).fit_transform(TEXTS)  # 48 columns
    unfitted = skops.io.loads(skops.io.dumps(estimator), trusted=TRUSTED_TYPES)
    expected, given = estimator.get_params()[name], unfitted.get_params()[name]
    if name == "random_state":
        assert given.randint(9999) == clone(estimator).random_state.randint(9999)
    elif "quantization_config" not in str(value):
        assert type(given) is type(expected) and np.array_equal(given, expected)
    fitted = estimator.fit(X, LABELS)
    loaded = skops.io.loads(skops.io.dumps(fitted), trusted=TRUSTED_TYPES)
    for one in (loaded, clone(loaded).fit(X, LABELS), unfitted.fit(X, LABELS)):
        np.testing.assert_array_equal(one.transform(X), fitted.transform(X))


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (LinearSVC(random_state=0), False),
        (RidgeClassifier(), False),
        (SGDClassifier(random_state=0), False),
        (OneVsRestClassifier(LogisticRegression()), False),
        (HistGradientBoostingClassifier(max_iter=2), True),
        (MLPClassifier((2,), max_iter=300, tol=0.1), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_some_heads_need_types_of_scikit_learn_to_be_trusted_too(head, more, folder):
    pipeline = prune(fitted(folder, head=head))
    saved = skops.io.dumps(pipeline)
    beyond = set(skops.io.get_untrusted_types(data=saved)).difference(TRUSTED_TYPES)
    # How many depends on the versions of skops and scikit-learn.
    assert bool(beyond) == more and all(name.startswith("sklearn.") for name in beyond)
    loaded = skops.io.loads(saved, trusted=[*TRUSTED_TYPES, *beyond])
    np.testing.assert_array_equal(loaded.predict(TEXTS), pipeline.predict(TEXTS))


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_a_pickle_of_another_version_warns(version, monkeypatch):
    selector = SalientNeuronSelector()
    if version is None:  # from before versions were written
        state = selector.__getstate__()
        del state["_skspin_version"]
        with pytest.warns(InconsistentVersionWarning, match="unknown of skspin"):
            selector.__setstate__(state)
        return
    with monkeypatch.context() as past:
        past.setattr("skspin._pickling.__version__", version)
        saved = pickle.dumps([selector, LLMActivationTransformer()])
    expected = f"from version 0.0.1 of skspin when using version {skspin.__version__} of skspin"
    with pytest.warns(InconsistentVersionWarning, match=expected) as warned:
        pickle.loads(saved)
    assert len(warned) == 2
    assert not hasattr(reload(selector), "_skspin_version")  # and the same version is silent
    assert isinstance(reload(LogisticRegression()), LogisticRegression)
