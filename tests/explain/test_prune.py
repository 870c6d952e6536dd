"""Pruning leaves predictions as they are and everything that is not used out."""

import numpy as np
import pandas as pd
import pytest
from reviews import reviews
from sklearn import config_context
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import SelectFromModel, SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import LinearSVC
from transformers import AutoModel, AutoTokenizer
from transformers.models.bert.modeling_bert import BertLayer

from skspin import LLMActivationTransformer, SalientNeuronSelector, make_spin_pipeline, prune
from skspin.datasets import demo_model


@pytest.fixture(scope="module")
def data():
    texts, kinds = reviews(30)
    return texts[:63], texts[63:], kinds[:63], kinds[63:]


def activations(**params):
    params = {
        "site": ("hidden", "mlp"),
        "pooling": ("mean", "max"),
        "layers": [0, 1, 2, 6],
    } | params
    return LLMActivationTransformer(demo_model(), dtype="float32", **params)


def select(**params):
    return SalientNeuronSelector(
        **({"C": 0.3, "sparsity": 0.6, "max_layer": 2, "tol": 1e-2} | params)
    )


def sparse_head(C=0.05):
    return LinearSVC(penalty="l1", C=C, random_state=0)


def spin(*between, head=None):
    return make_pipeline(
        activations(),
        select(),
        *between,
        LogisticRegression(max_iter=1000) if head is None else head,
    )


def assert_same_predictions(pruned, whole, texts):
    np.testing.assert_array_equal(pruned.predict(texts), whole.predict(texts))
    for method in ("decision_function", "predict_proba"):
        if hasattr(whole, method):
            np.testing.assert_allclose(
                getattr(pruned, method)(texts), getattr(whole, method)(texts), rtol=1e-5, atol=1e-5
            )


@pytest.fixture(scope="module")
def whole(data):
    """A fitted pipeline, the activations of which all come from a pass through the model."""
    pipeline = spin(StandardScaler()).set_params(llmactivationtransformer__cache=None)
    return pipeline.fit(data[0], data[2])


def test_only_what_the_selector_kept_is_computed(data, whole, monkeypatch):
    pruned = prune(whole)
    assert_same_predictions(pruned, whole, data[1])
    names = whole[0].get_feature_names_out()[whole[1].get_support()]
    assert pruned[0].get_feature_names_out().tolist() == names.tolist()
    assert pruned[1].get_support().all()
    assert pruned[1].n_selected_.tolist() == whole[1].n_selected_.tolist()
    ran, forward = set(), BertLayer.forward

    def counted(block, *args, **kwargs):
        ran.add(id(block))
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(BertLayer, "forward", counted)
    pruned.predict(data[1][:3])
    assert len(ran) == pruned[0].layout_.segments[-1].layer <= 2


def test_the_fitted_pipeline_stays_as_it_was(data, whole):
    train, test, y_train, _ = data
    whole = clone(whole).set_params(llmactivationtransformer__cache="memory")
    whole.set_output(transform="default").fit(train, y_train)
    before, n_columns = whole.decision_function(test), whole[0].layout_.n_columns
    pruned = prune(whole)
    prune(whole).set_output(transform="pandas")
    assert whole[0].layout_.n_columns == n_columns
    assert isinstance(whole[:-1].transform(test), np.ndarray)
    np.testing.assert_array_equal(whole.decision_function(test), before)
    pruned.fit(train, y_train)  # a refit starts from all layers, and leaves the other alone
    np.testing.assert_allclose(pruned.decision_function(test), before, atol=1e-6)
    np.testing.assert_array_equal(whole.decision_function(test), before)


@pytest.mark.parametrize(
    "between",
    [
        StandardScaler(with_mean=False),
        MinMaxScaler(),
        MaxAbsScaler(),
        RobustScaler(with_centering=False),
        QuantileTransformer(n_quantiles=10),
        "passthrough",
        PCA(5),
        Normalizer(),
    ],
    ids=str,
)
def test_columns_without_weight_are_pruned_through_steps_that_do_not_mix_them(between, data):
    train, test, y_train, _ = data
    whole = spin(between, head=OneVsRestClassifier(sparse_head(C=0.03))).fit(train, y_train)
    pruned = prune(whole)
    n_used = np.any([part.coef_[0] != 0 for part in whole[-1].estimators_], axis=0).sum()
    n_selected = whole[1].n_selected_.sum()
    mixes = isinstance(between, PCA | Normalizer)
    assert mixes or 0 < n_used < n_selected
    assert pruned[0].layout_.n_columns == (n_selected if mixes else n_used)
    assert_same_predictions(pruned, whole, test)
    assert prune(pruned)[0].layout_ == pruned[0].layout_  # twice changes nothing


def test_sparse_weights_are_pruned_too_and_one_column_is_always_left(data):
    train, test, y_train, _ = data
    whole = spin(head=sparse_head()).fit(train, y_train)
    whole[-1].sparsify()
    pruned = prune(whole)
    assert pruned[0].layout_.n_columns < whole[1].n_selected_.sum()
    assert_same_predictions(pruned, whole, test)
    whole = spin(head=OneVsRestClassifier(sparse_head(C=1e-9))).fit(train, y_train)
    pruned = prune(whole)
    assert pruned[0].layout_.n_columns == 1
    assert_same_predictions(pruned, whole, test)


def test_inside_a_feature_union(data):
    train, test, y_train, _ = data
    union = FeatureUnion(
        [("spin", make_pipeline(activations(), select())), ("words", TfidfVectorizer())]
    )
    for head in (LogisticRegression(max_iter=1000), sparse_head()):
        whole = make_pipeline(union, head).fit(train, y_train)
        pruned = prune(whole)
        assert_same_predictions(pruned, whole, test)
        assert pruned[0].transformer_list[0][1][0].layout_.n_columns < 2000
    # With a head that uses all columns of both no member was dropped, so a new fit has them again.
    whole = make_pipeline(union, LogisticRegression(max_iter=1000)).fit(train, y_train)
    assert_same_predictions(
        prune(whole).fit(train[:40], y_train[:40]), whole.fit(train[:40], y_train[:40]), test
    )


def test_inside_a_column_transformer_whose_only_sparse_columns_are_not_used(data):
    train, test, y_train, _ = data
    train, test = (pd.DataFrame({"text": texts}) for texts in (train, test))
    columns = ColumnTransformer(
        [
            ("spin", make_pipeline(activations(), select()), "text"),
            ("words", TfidfVectorizer(), "text"),
        ],
        sparse_threshold=1,
    )
    whole = make_pipeline(columns, SelectKBest(k=3), LogisticRegression()).fit(train, y_train)
    pruned = prune(whole)
    assert pruned[0].named_transformers_["words"] == "drop"
    np.testing.assert_allclose(pruned.decision_function(test), whole.decision_function(test))
    again = clone(pruned).fit(train, y_train)
    np.testing.assert_allclose(again.decision_function(test), whole.decision_function(test))


def lengths(texts):
    return [[len(text)] for text in texts]


def test_one_member_of_a_union_need_not_name_its_columns(data):
    train, test, y_train, _ = data
    members = [("spin", make_pipeline(activations(), select()))]
    members += [(name, FunctionTransformer(lengths)) for name in ("length", "again")]
    head = make_pipeline(SelectKBest(k=3), LogisticRegression())
    whole = make_pipeline(FeatureUnion(members[:2]), *head).fit(train, y_train)
    assert_same_predictions(prune(whole), whole, test)
    whole = make_pipeline(FeatureUnion(members), *head).fit(train, y_train)
    with pytest.raises(ValueError, match=r"\['length', 'again'\].* get_feature_names_out"):
        prune(whole)


class Centred(BaseEstimator, TransformerMixin):
    """Adds something in training that it does not add later, as target encoders do."""

    def fit(self, X, y, sample_weight):
        self.weight_ = sample_weight.sum()
        return self

    def fit_transform(self, X, y, sample_weight):
        return self.fit(X, y, sample_weight).transform(X) + y[:, None] * self.weight_

    def transform(self, X):
        return np.asarray(X)


@config_context(enable_metadata_routing=True)
def test_a_wrapped_step_is_fitted_again_as_it_was(data):
    train, test, y_train, _ = data
    weights = np.arange(len(train)) % 4
    centred = Centred().set_fit_request(sample_weight=True)
    whole = make_pipeline(activations(layers=2), select(), centred, SelectKBest(k=3))
    whole = make_pipeline(*whole, LogisticRegression())
    for step in whole:
        if hasattr(step, "set_fit_request") and step is not centred:
            step.set_fit_request(sample_weight=False)
    whole.fit(train, y_train, sample_weight=weights)
    pruned = prune(whole)
    assert isinstance(pruned[2].step, Centred)
    again = clone(pruned).fit(train, y_train, sample_weight=weights)
    assert again[2].weight_ == whole[2].weight_
    np.testing.assert_allclose(again[-1].coef_, whole[-1].coef_)


def test_frames_keep_their_names(data):
    train, test, y_train, _ = data
    whole = spin(StandardScaler(), head=OneVsRestClassifier(sparse_head()))
    whole.set_output(transform="pandas").fit(train, y_train)
    pruned = prune(whole)
    frame = pruned[:-1].transform(test)
    pd.testing.assert_frame_equal(frame, whole[:-1].transform(test)[frame.columns])
    assert_same_predictions(pruned, whole, test)


def test_other_selectors_select_all_that_is_left(data):
    train, test, y_train, _ = data
    choose = SelectFromModel(sparse_head())
    whole = make_pipeline(activations(layers=2), choose, LogisticRegression(max_iter=1000))
    whole.fit(train, y_train)
    pruned = prune(whole)
    assert pruned[1].get_support().all()
    assert pruned[0].layout_.n_columns == choose.get_support().sum()
    assert_same_predictions(pruned, whole, test)
    assert_same_predictions(prune(pruned), whole, test)
    names = whole[:-1].get_feature_names_out()
    assert pruned[:-1].get_feature_names_out().tolist() == names.tolist()
    # Fitted again, they select again.
    assert_same_predictions(clone(pruned).fit(train, y_train), whole, test)
    assert_same_predictions(prune(pruned.fit(train, y_train)), whole, test)


def test_a_scaler_before_the_selector_is_narrowed(data):
    train, test, y_train, _ = data
    choose = select(layer_sizes=None, max_layer=None)
    whole = make_pipeline(activations(layers=2), StandardScaler(), choose, LogisticRegression())
    whole.fit(train, y_train)
    pruned = prune(whole)
    assert pruned[1].mean_.size == pruned[0].layout_.n_columns == whole[2].n_selected_.sum()
    assert_same_predictions(pruned, whole, test)


def test_what_can_not_be_pruned_is_refused_with_the_reason(data):
    train, _, y_train, _ = data
    with pytest.raises(NotFittedError):
        prune(make_spin_pipeline(demo_model()))
    with pytest.raises(ValueError, match="None of the steps.*is an LLMActivationTransformer"):
        prune(make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(train, y_train))
    dense = make_pipeline(activations(layers=1, site="hidden"), LogisticRegression(max_iter=1000))
    with pytest.raises(ValueError, match="LogisticRegression needs all.*SalientNeuronSelector"):
        prune(dense.fit(train, y_train))
    mixed = make_pipeline(
        activations(layers=1), PCA(10), select(layer_sizes=None), LogisticRegression()
    )
    with pytest.raises(ValueError, match="because PCA needs all of them"):
        prune(mixed.fit(train, y_train))


def test_a_model_in_memory_is_shared(data):
    train, test, y_train, _ = data
    model = AutoModel.from_pretrained(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    transformer = LLMActivationTransformer(model, tokenizer=tokenizer, layers=[1, 2])
    whole = make_pipeline(transformer, select(), LogisticRegression()).fit(train, y_train)
    assert prune(whole)[0].model is model
    assert_same_predictions(prune(whole), whole, test)
