"""Whatever texts, containers and parameters: each text's own row, or an error that says why not.

A run draws 200 examples, 50 for each test. With ``--hypothesis-profile=nightly`` it draws 2,400.
"""

import warnings

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_models import TINY, byte_tokenizer

from skspin import LLMActivationTransformer, SalientNeuronSelector

fuzz = settings(
    max_examples=settings().max_examples // 2,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
POOLINGS = ("mean", "max", "first", "last")
N_POSITIONS = 48

MEGABYTE = "word" * 2**18
SPECIAL = [
    "",
    " ",
    "\n\t\u00a0\u2003\u3000\ufeff",  # nothing but white space
    "\x00",
    "a\x00b\x00",
    "\ud800",  # half a character
    "\udfff\ud83d",
    "a\ud83d\ude00b",  # two halves
    "שָׁלוֹם עולם",
    "\u202eمرحبا\u202c abc",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇩",
    "e\u0301" + "\u0301" * 30,
    "\U0010ffff\uffff\u200b",
    "<s></s><pad>",
    "{text} {0} %s \\",
    "word" * 100,
    MEGABYTE,
]
# A lone surrogate is a character of a str, though hypothesis leaves them out of its texts.
short_texts = st.text(st.characters(), max_size=20) | st.sampled_from(SPECIAL[:-1])
any_texts = st.text(st.characters(), max_size=60) | st.sampled_from(SPECIAL[:-1])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A model this small is slower with several."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def tiny():
    tokenizer = byte_tokenizer()
    model = TINY["bert"].build(vocab_size=len(tokenizer), num_hidden_layers=1)
    return {"model": model, "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-bert")
    for part in tiny.values():
        part.save_pretrained(folder)
    return str(folder)


def activations_of(tiny, text):
    """Pool a text's hidden states by hand: the plain model, one text at a time."""
    readable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    readable = readable[:N_POSITIONS]  # each character is a token at least
    inputs = tiny["tokenizer"](
        readable, truncation=True, max_length=N_POSITIONS, return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        layers = tiny["model"](**inputs, output_hidden_states=True).hidden_states
    pooled = [row for h in layers for row in (h[0].mean(0), h[0].max(0).values, h[0, 0], h[0, -1])]
    return torch.cat(pooled).numpy()


def transform(X, **params):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ texts are longer than max_length")
        return np.asarray(LLMActivationTransformer(**params).fit(X).transform(X))


def assert_rows(found, expected, atol=1e-4):
    assert found.dtype == np.float32 and found.shape == np.shape(expected)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


@fuzz
@given(texts=st.lists(any_texts, min_size=1, max_size=5))
@example(texts=[*SPECIAL, *SPECIAL[::-1]])
def test_any_texts_get_the_rows_that_the_plain_model_gives_them(tiny, texts):
    X = transform(texts, **tiny, pooling=POOLINGS, cache=None)
    of_text = {text: activations_of(tiny, text) for text in set(texts)}
    assert_rows(X, [of_text[text] for text in texts])


# Each makes a container of texts. Some hold no lone surrogates, and say so themselves.
CONTAINERS = {
    "tuple": tuple,
    "array of objects": lambda texts: np.array(texts, dtype=object),
    "column": lambda texts: np.array(texts, dtype=object)[:, None],
    "array of str": np.array,
    "every second of an array": lambda texts: np.repeat(np.array(texts, dtype=object), 2)[::2],
    "pandas objects": lambda texts: pd.Series(texts, dtype=object, index=[7] * len(texts)),
    "pandas str": lambda texts: pd.Series(texts, dtype="str"),
    "pandas string": lambda texts: pd.Series(texts, dtype="string[python]"),
    "pandas arrow": lambda texts: pd.Series(texts, dtype="string[pyarrow]"),
    "pandas categories": lambda texts: pd.Series(texts, dtype="category"),
    "pandas index": lambda texts: pd.Index(texts, dtype=object),
    "pandas array": lambda texts: pd.array(texts, dtype="string[python]"),
    "pandas frame": lambda texts: pd.DataFrame({"text": texts}, dtype=object),
    "polars": pl.Series,
    "polars categories": lambda texts: pl.Series(texts, dtype=pl.Categorical),
    "polars frame": lambda texts: pl.DataFrame({"text": texts}),
    "arrow": pa.array,
    "arrow large": lambda texts: pa.array(texts, pa.large_string()),
    "arrow dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "arrow chunks": lambda texts: pa.chunked_array([texts[:1], texts[1:]], pa.string()),
    "arrow table": lambda texts: pa.table({"text": texts}),
}
if hasattr(pa, "string_view"):  # from pyarrow 16 on
    CONTAINERS["arrow view"] = lambda texts: pa.array(texts, pa.string_view())
NO_TEXTS = [None, np.nan, pd.NA, pd.NaT, 7, 1.5, True, b"bytes", ["a"], ("a",), {"a": 1}, object()]
NO_CONTAINERS = [
    "one text",
    b"bytes",
    None,
    7,
    {"a": 1},
    {"a"},
    [],
    iter(["a"]),
    (text for text in "ab"),
    np.array("a"),
    np.array([["a", "b"]]),
    np.array([[["a"]]]),
    np.zeros(3),
    np.zeros((2, 0)),
    pd.DataFrame({"a": ["x"], "b": ["y"]}),
    pd.DataFrame(index=[0, 1]),
    pl.DataFrame({"a": ["x"], "b": ["y"]}),
    pa.table({"a": ["x"], "b": ["y"]}),
    pa.array([1, 2]),
]


@st.composite
def containers(draw):
    """Draw a container and the texts that are in it; None if it holds something else."""
    texts = draw(st.lists(short_texts, min_size=1, max_size=4))
    kind = draw(st.sampled_from(["good"] * 4 + ["spoilt", "none"]))
    if kind == "none":
        return draw(st.sampled_from(NO_CONTAINERS)), None
    if kind == "spoilt":
        items = [*texts]
        items.insert(draw(st.integers(0, len(texts))), draw(st.sampled_from(NO_TEXTS)))
        wrap = draw(st.sampled_from([list, tuple, lambda items: pd.Series(items, dtype=object)]))
        return wrap(items), None
    try:
        X = CONTAINERS[draw(st.sampled_from(list(CONTAINERS)))](texts)
    except UnicodeEncodeError:
        return texts, texts
    if isinstance(X, np.ndarray) and X.dtype.kind == "U":
        texts = X.tolist()  # without the NULs at their ends, which NumPy takes for padding
    return X, texts


@fuzz
@given(container=containers())
def test_any_container_gives_its_texts_rows_or_an_error_that_names_it(tiny, container):
    X, texts = container
    if texts is None:
        with pytest.raises((TypeError, ValueError), match=r"^X(\[\d+\])? (is|has|holds) "):
            transform(X, **tiny, cache=None)
        return
    of_text = {text: transform([text], **tiny, cache=None)[0] for text in set(texts)}
    assert_rows(transform(X, **tiny, cache=None), [of_text[text] for text in texts])


GOOD = {
    "site": ["hidden", "mlp", "attention", ("mlp", "hidden"), ["attention", "mlp"]],
    "layers": [None, 1, -1, [1], (-1, 0), np.array([0, 1]), [1, 1], range(2)],
    "pooling": [*POOLINGS, ("last", "mean"), ["max"]],
    "prompt": [None, "{text}", "so: {text} {0}", "{text}{text}", "\x00{text}\U0001f600"],
    "max_length": [7, 16, N_POSITIONS, 512, np.int64(20)],
    "batch_tokens": ["auto", 1, 17, 10**9],
    "device": [None, "cpu", ["cpu"]],
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "cache": [None, "memory"],
    "n_jobs": [None, 1],
    "verbose": [0, False],
    "revision": [None, "main"],
    "trust_remote_code": [False],
    "model_kwargs": [None, {}, {"attn_implementation": "eager"}],
    "stack": ["encoder", "decoder", ("encoder", "decoder")],  # BERT has no such choice
}
BAD = {
    "model": ["", "no/such-model", "/no/such/folder", "a b", 3, None, object()],
    "tokenizer": ["", "no/such-tokenizer", 3, object()],
    "site": ["neck", (), None, 3, ("hidden", None), ("hidden", "neck"), [["mlp"]]],
    "layers": [[], 2, -4, [0, 7], 0.5, "all", [None], [[0]], np.zeros((1, 1), int)],
    "pooling": ["sum", (), None, ("mean", 3)],
    "prompt": ["", "no place", 3, "{ text}"],
    "max_length": [0, -1, 2.5, "long", None, np.nan, 1],
    "batch_tokens": [0, -1, 0.5, "many", None],
    "device": ["abacus", "cuda:99", [], ["cpu", "abacus"], [None], ["cpu", 3], 3, "", "meta"],
    "dtype": ["int8", "float64", None, 32],
    "cache": [3, ["folder"], "", b"folder"],
    "output_folder": [3, "", b"folder", __file__],
    "n_jobs": [0, 1.5, "all", np.nan],
    "verbose": [-1, "loud", None],
    "revision": [3, b"main"],
    "trust_remote_code": [None, "yes", 2],
    "model_kwargs": [[], "eager", {"dtype": "float32"}, {"revision": "main"}, {3: 4}],
    "stack": ["left", (), None, ("encoder", 3)],
}
# Parameters that are fine each by itself, and not together.
TOGETHER = "asks for layer 0, the embeddings|leaves no room for text"


SPOILT = [(name, value) for name, values in BAD.items() for value in values]


@pytest.mark.parametrize(("name", "value"), SPOILT)
def test_a_bad_value_is_refused_by_the_name_of_its_parameter(folder, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        transform(["a"], **{"model": folder, "cache": None, name: value})


def one_of(table):
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in table.items()})


@fuzz
@given(
    params=one_of(GOOD),
    spoilt=st.none() | st.none() | st.none() | st.sampled_from(SPOILT),
    in_file=st.booleans(),
    texts=st.lists(short_texts, min_size=1, max_size=4),
)
def test_any_parameters_give_each_text_its_row_or_an_error_that_names_the_one_at_fault(
    folder, tmp_path_factory, params, spoilt, in_file, texts
):
    params = {"model": folder, **params}
    if in_file:
        params["output_folder"] = tmp_path_factory.mktemp("output")
    if spoilt is not None:
        name, value = spoilt
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b|{TOGETHER}"):
            transform(texts, **params | {name: value})
        return
    try:
        X = transform(texts, **params)
    except ValueError as error:
        assert any(said in str(error) for said in TOGETHER.split("|"))
        return
    alone = {**params, "cache": None, "batch_tokens": "auto", "output_folder": None}
    of_text = {text: transform([text], **alone)[0] for text in set(texts)}
    half = params["dtype"] in ("bfloat16", "float16", "auto")
    assert_rows(X, [of_text[text] for text in texts], atol=0.2 if half else 1e-4)


GOOD_SELECTION = {
    "sparsity": [0.0, 0, 0.3, 0.999, np.float32(0.5)],
    "criterion": ["salience", "count"],
    "C": [1e-3, 0.1, 1, 100.0, [0.01, 1], np.array([1, 2])],
    "penalty": ["l1", "l2"],
    "salience": ["squared", "absolute"],
    "max_layer": [None, 0, 1, 99],
    "layer_sizes": [None, 2, np.int32(1), "auto"],
    "standardize": [True, False],
    "class_weight": [None, "balanced"],
    "validation_fraction": [0.01, 0.2, 0.9],
    "tol": [1e-3, 0.1],
    "max_iter": [1, 200],
    "cache": [None, "memory"],
    "random_state": [None, 0, np.random.RandomState(0)],
}
BAD_SELECTION = {
    "sparsity": [-0.1, 1, 1.0, np.nan, None, "0.4", [0.1]],
    "criterion": ["best", None],
    "C": [0, -1, np.inf, np.nan, None, "1", [], [0.1, 0], [[1]], [None]],
    "penalty": ["l0", None],
    "salience": ["cubed", None],
    "max_layer": [-1, 0.5, "all"],
    "layer_sizes": [0, -1, 5, [], [4, 0], [3], [1.5, 2.5], "all", [[2, 2]]],
    "standardize": [None, "yes"],
    "class_weight": ["even", 3, [{0: 1}], {0: "a"}, {0: -1}, {0: np.nan}],
    "validation_fraction": [0, 1, 1.5, np.nan, None],
    "tol": [0, -1, np.nan, None],
    "max_iter": [0, 1.5, np.inf, None],
    "device": ["abacus", "cuda:99", "meta", 3, ""],
    "cache": ["folder", 3],
    "random_state": ["seed", -1, 0.5],
}
SPOILT_SELECTION = [(name, value) for name, values in BAD_SELECTION.items() for value in values]
X_OF_4 = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
Y_OF_2 = np.arange(12) % 2
SPOILT_DATA = {
    "nan": (np.where(np.eye(12, 4) > 0, np.nan, X_OF_4), Y_OF_2, None),
    "infinite": (np.where(np.eye(12, 4) > 0, np.inf, X_OF_4), Y_OF_2, None),
    "beyond float32": (X_OF_4.astype(float) * 1e60, Y_OF_2, None),
    "beyond its squares": (X_OF_4 * np.float32(1e30), Y_OF_2, None),
    "at its end": (X_OF_4 / np.abs(X_OF_4).max() * np.finfo(np.float32).max, Y_OF_2, None),
    "texts": ([["a"] * 4] * 12, Y_OF_2, None),
    "one column as a vector": (X_OF_4[:, 0], Y_OF_2, None),
    "three dimensions": (X_OF_4[:, None], Y_OF_2, None),
    "no rows": (X_OF_4[:0], Y_OF_2[:0], None),
    "no columns": (X_OF_4[:, :0], Y_OF_2, None),
    "nothing": (None, Y_OF_2, None),
    "labels short": (X_OF_4, Y_OF_2[1:], None),
    "labels none": (X_OF_4, None, None),
    "labels one class": (X_OF_4, Y_OF_2 * 0, None),
    "labels continuous": (X_OF_4, X_OF_4[:, 0], None),
    "labels nan": (X_OF_4, np.where(Y_OF_2, np.nan, 1), None),
    "labels several": (X_OF_4, np.stack([Y_OF_2, Y_OF_2 + 1, Y_OF_2 + 2], 1), None),
    "weights short": (X_OF_4, Y_OF_2, np.ones(3)),
    "weights negative": (X_OF_4, Y_OF_2, -np.ones(12)),
    "weights nan": (X_OF_4, Y_OF_2, np.full(12, np.nan)),
    "weights all zero": (X_OF_4, Y_OF_2, np.zeros(12)),
    "weights leave one class": (X_OF_4, Y_OF_2, 1.0 * Y_OF_2),
}


@pytest.mark.parametrize(("name", "value"), SPOILT_SELECTION)
def test_a_bad_value_of_the_selector_is_refused_by_the_name_of_its_parameter(name, value):
    params = {"layer_sizes": 2, "cache": None, name: value}
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        SalientNeuronSelector(**params).fit(X_OF_4, Y_OF_2)


@pytest.mark.parametrize(("X", "y", "sample_weight"), SPOILT_DATA.values(), ids=SPOILT_DATA)
def test_bad_data_of_the_selector_is_refused(X, y, sample_weight):
    with pytest.raises((TypeError, ValueError), match=r"\S+ \S+ \S+"):
        SalientNeuronSelector(layer_sizes=None).fit(X, y, sample_weight)


@st.composite
def labelled(draw):
    """Draw activations, labels of any kind, and weights."""
    n_rows = draw(st.integers(2, 24))
    shape = (n_rows, draw(st.sampled_from([2, 4, 6])))
    dtype = draw(st.sampled_from([np.float32, np.float64, np.float16, np.int8, np.bool_]))
    width = 8 * np.dtype(dtype).itemsize
    values = {"elements": {"allow_nan": False, "allow_infinity": False}} if width > 8 else {}
    X = draw(arrays(dtype, shape, **values))
    if draw(st.booleans()):  # something that can be learnt
        X = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape).astype(dtype)
    classes = draw(
        st.sampled_from([[0, 1], [-1, 1], ["a", "b"], [True, False], [0, 1, 2], list("abcde")])
    )
    y = np.array(classes)[draw(arrays(np.int8, n_rows, elements=st.integers(0, len(classes) - 1)))]
    if draw(st.integers(0, 4)) == 0:
        y = draw(arrays(np.int8, (n_rows, 3), elements=st.integers(0, 1)))
    weights = st.floats(0, 1e3, width=32)
    return X, y, draw(st.none() | arrays(np.float64, n_rows, elements=weights))


@fuzz
@given(data=labelled(), params=one_of(GOOD_SELECTION))
def test_any_numbers_give_a_finite_salience_that_is_kept_or_an_error_that_says_why(data, params):
    X, y, sample_weight = data
    selector = SalientNeuronSelector(**params)
    with warnings.catch_warnings():
        # Advice is fine. A division by zero is not.
        warnings.simplefilter("ignore", UserWarning)
        try:
            selected = selector.fit(X, y, sample_weight).transform(X)
        except ValueError as error:
            assert any(said in str(error) for said in NOT_FOR_PROBES), error
            return
    support, salience = selector.get_support(), selector.salience_
    assert np.isfinite(selector.coef_).all() and np.isfinite(salience).all()
    assert (salience >= 0).all() and support.any()
    assert ((selector.layer_scores_ >= 0) & (selector.layer_scores_ <= 1)).all()
    np.testing.assert_array_equal(selected, X[:, support])
    if params["criterion"] == "salience":
        for columns in selector.layer_columns_:
            held = salience[columns][support[columns]].sum()
            assert held >= (1 - selector.sparsity) * salience[columns].sum() * (1 - 1e-6)


# What random data may lack. (Labels that are all the same, and so on.)
NOT_FOR_PROBES = ["has one class", "as large as", "one non-zero number"]
