"""What people pass as texts, turned into a list of str or refused with the position at fault."""

from __future__ import annotations

from typing import Any

import numpy as np

_ALLOWED = (
    "a list, tuple, 1-D array, pandas, polars or pyarrow Series of str, or a one-column frame"
)


def check_texts(X: Any) -> list[str]:
    """Turn a container of texts into a list.

    Parameters
    ----------
    X : list, tuple, array of shape (n_texts,) or (n_texts, 1), Series or one-column frame of str
        The texts.

    Returns
    -------
    list of str
        The same texts in the same order.

    Raises
    ------
    TypeError
        If ``X`` is a single text, or no container whose order and length are known.
    ValueError
        If ``X`` has no text or several columns, or one of its texts is missing or no str.
    """
    if isinstance(X, str | bytes):
        raise TypeError(
            f"X is a single {type(X).__name__}, but {_ALLOWED} is needed. Wrap one text in a list: "
            "[text]."
        )
    texts = _as_list(_only_column(X))
    if not texts:
        raise ValueError("X holds no text (0 samples), but at least one is needed.")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"X[{position}] is a {type(text).__name__} ({_shorten(text)}), but every text must "
                f"be a str. {_advice(text)}"
            )
    return [str(text) for text in texts]  # numpy.str_ is a str, but not the tokenizers' kind


def _only_column(X: Any) -> Any:
    """Take the column out of a frame or a 2-D array that has just one."""
    shape = getattr(X, "shape", None)
    if not isinstance(shape, tuple) or len(shape) == 1:
        return X
    if len(shape) != 2 or shape[1] != 1:
        raise ValueError(
            f"X has shape {shape}, but texts are one column. Select it, e.g. X['text'], or give "
            "each text column a transformer of its own in a ColumnTransformer."
        )
    if isinstance(X, np.ndarray):
        return X[:, 0]
    if hasattr(X, "iloc"):  # pandas
        return X.iloc[:, 0]
    if hasattr(X, "columns") and hasattr(X.columns[0], "to_pylist"):  # pyarrow
        return X.columns[0]
    return X[X.columns[0]]  # polars


def _as_list(X: Any) -> list[Any]:
    for method in ("tolist", "to_pylist", "to_list"):  # numpy and pandas, pyarrow, polars
        if hasattr(X, method):
            return getattr(X, method)()
    if isinstance(X, dict | set | frozenset) or not (
        hasattr(X, "__len__") and hasattr(X, "__iter__")
    ):
        raise TypeError(f"X is a {type(X).__name__}, but {_ALLOWED} is needed.")
    return list(X)


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _advice(text: Any) -> str:
    if isinstance(text, bytes):
        return 'Decode it first, e.g. text.decode("utf-8").'
    missing = text is None or type(text).__name__ in ("NAType", "NaTType")
    if missing or (isinstance(text, float) and text != text):
        return 'Drop or fill missing texts, e.g. X.fillna("").'
    return "Convert it first, e.g. with str(text)."
