"""Texts come in any container, and are refused with the position at fault."""

import enum

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from skspin._texts import open_texts

TEXTS = ["one", "two, zwei", "三"]
Number = enum.Enum("Number", [(f"N{i}", text) for i, text in enumerate(TEXTS)], type=str)
CONTAINERS = {
    "list": TEXTS,
    "tuple": tuple(TEXTS),
    "array": np.array(TEXTS),
    "members of an Enum": list(Number),
    "object array": np.array(TEXTS, dtype=object),
    "column": np.array(TEXTS, dtype=object)[:, None],
    "pandas": pd.Series(TEXTS, index=[7, 7, 1]),
    "pandas string": pd.Series(TEXTS, dtype="string"),
    "pandas categorical": pd.Series(TEXTS, dtype="category"),
    "pandas frame": pd.DataFrame({"text": TEXTS}),
    "polars": pl.Series(TEXTS),
    "polars frame": pl.DataFrame({"text": TEXTS}),
    "arrow": pa.array(TEXTS),
    "arrow chunks": pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
    "arrow table": pa.table({"text": TEXTS}),
}


def read(X):
    return [text for chunk in open_texts(X) for text in chunk]


@pytest.mark.parametrize("X", CONTAINERS.values(), ids=CONTAINERS)
def test_every_container_gives_the_same_texts(X):
    texts = read(X)
    assert texts == TEXTS
    assert {type(text) for text in texts} == {str}


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ("one text", TypeError, r"Wrap one text in a list: \[text\]"),
        (b"bytes", TypeError, "X is a single bytes"),
        (None, TypeError, "X is a NoneType"),
        (7, TypeError, "X is a int"),
        ({"a": 1}, TypeError, "X is a dict"),
        ({"a"}, TypeError, "X is a set"),
        (iter(["a"]), TypeError, r"X is a list_iterator.*list\(X\)"),
        ((text for text in "ab"), TypeError, r"X is a generator.*list\(X\)"),
        ([], ValueError, "X holds no text"),
        (pd.Series([], dtype=object), ValueError, "X holds no text"),
        (["a", None], ValueError, r"X\[1\] is a NoneType \(None\).*fillna"),
        (pd.Series(["a", np.nan]), ValueError, r"X\[1\] is a float \(nan\).*fillna"),
        (pd.Series(["a", pd.NA], dtype=object), ValueError, r"X\[1\] is a NAType.*fillna"),
        (pl.Series(["a", None]), ValueError, r"X\[1\] is a NoneType.*fillna"),
        (["a", "b", 3], ValueError, r"X\[2\] is a int \(3\).*str\(text\)"),
        ([b"a"], ValueError, r"X\[0\] is a bytes.*decode"),
        ([["a"]], ValueError, r"X\[0\]\[0\] is 'a'.*'role' and 'content'.*as a str"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), ValueError, r"shape \(1, 2\).*one column"),
        (np.array([["a", "b"]]), ValueError, r"shape \(1, 2\)"),
        (np.array("a"), ValueError, r"shape \(\)"),
    ],
)
def test_what_is_no_text_is_refused_by_name(X, error, message):
    with pytest.raises(error, match=message):
        read(X)
