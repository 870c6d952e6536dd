"""What a program needs to know of a folder with an ONNX model: `labels.json`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline

from skspin._layout import Layout
from skspin._pipeline import flatten
from skspin._version import __version__


def settings_of(pipeline: Pipeline, layout: Layout, encoder: Any, columns: Any) -> dict[str, Any]:
    """Gather labels and how texts are read; ``columns`` is what `cut_model` gives."""
    recipe = encoder.recipe
    classes, several = _classes_of(pipeline)
    axes = ["n_texts", *["n_windows"] * (recipe.long_texts == "windows"), "n_tokens"]
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] * (encoder.has_types and "token_type_ids" in columns.inputs)
    names += ["pooled"] * (recipe.long_texts == "windows" or recipe.pool_over != "all")
    return {
        "classes": classes,
        "several_outputs": several,
        "prompt": recipe.prompt,
        "max_length": encoder.max_length,
        "long_texts": recipe.long_texts,
        "overlap": recipe.overlap,
        "pool_over": recipe.pool_over,
        "pooling": list(dict.fromkeys(segment.pooling for segment in layout.segments)),
        "truncation_side": getattr(encoder.tokenizer, "truncation_side", "right"),
        "is_causal": encoder.is_causal,
        "empty_text": _ids_of_nothing(encoder),
        "inputs": {name: axes for name in names},
        "output": "decision_values",
        "model": _name(recipe.model_name),
        "architecture": type(columns.model).__name__,
        "fingerprint": recipe.fingerprint,
        "skspin": __version__,
    }


def _classes_of(pipeline: Pipeline) -> tuple[list, bool]:
    """List the classes, of each output where there are several; and say whether there are."""
    *_, head = flatten(pipeline)
    if isinstance(head.classes_, list):
        return [classes.tolist() for classes in head.classes_], True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that columns had names
        predicted = head.predict(np.zeros((1, head.n_features_in_), dtype=np.float32))
    if np.ndim(predicted) == 2:
        return [[0, 1]] * predicted.shape[1], True
    return head.classes_.tolist(), False


def _ids_of_nothing(encoder: Any) -> list[int]:
    """Tokenize an empty text; none where no token of the tokenizer can stand for it."""
    try:
        (text,) = encoder.encode([""])
    except ValueError:
        return []
    return text.windows[0].inputs["input_ids"].tolist()


def _name(model: str) -> str:
    """Name a model without the folders of the machine that it was on."""
    return Path(model).name if Path(model).exists() else model
