"""The files that describe the ONNX model in a folder: `labels.json` and `README.md`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline
from sklearn.utils import Bunch

from skspin._layout import Layout
from skspin._pipeline import flatten
from skspin._selector import SalientNeuronSelector
from skspin._version import __version__

_CARD = """\
---
library_name: onnx
pipeline_tag: text-classification
tags:
- skspin
---

# Text classifier on inner neurons of {settings[model]} ({settings[architecture]})

A text goes through the first {n_used} of {n_layers} blocks of the frozen language model
`{settings[model]}`. Activations of its neurons ({layout.n_columns:,} columns, pooled over the
text's tokens) are weighed and summed up to a decision value for each label. `model.onnx` holds all
of that, from token ids on.

- Labels: {labels}.
- Decision values: {values}.
- Texts: {texts}.
- Fingerprint of model and tokenizer: `{settings[fingerprint]}`.
- Written by [skspin](https://pypi.org/project/skspin/) {settings[skspin]}. The weights are the
  language model's, so its license holds for this file as well.

## How it was trained

The language model is frozen: nothing of it was trained. Its neurons were selected, and a linear
classifier was fitted on them, by these steps:

```python
{steps}
```

{facts}

| layer | neurons | pooling | in use |
| --- | --- | --- | --- |
{neurons}

## How to run it

`pip install numpy onnxruntime tokenizers`, then:

```python
{code}


classifier = {classifier}(".")  # this folder
texts = ["A first text.", "And another one."]
print(classifier.predict(texts))
print(classifier.decision_function(texts))
```

`model.onnx` takes {inputs}, each int64 of shape ({axes}) with axes of any length, padded
on the right, and gives `decision_values`. `labels.json` says how texts become tokens.

On {report.n_texts:,} texts its decision values differ from the pipeline's by at most
{report.difference:.1e}.
"""
_INT8 = """
`model.int8.onnx` is the same with weights of 8 bits. It gives {report.n_changed:,} of these
{report.n_texts:,} texts another label.
"""


def write_card(
    pipeline: Pipeline,
    layout: Layout,
    settings: Mapping[str, Any],
    score: Any,
    report: Bunch,
    classifier: type,
) -> str:
    """Write a model card.

    ``report`` is what `export_onnx` gives, and ``classifier`` the class whose code runs the folder.
    """
    activations, *steps = flatten(pipeline)
    labels, values = _labels(settings)
    facts = _facts(activations.layout_.n_columns, steps, layout, score)
    card = _CARD if report.n_changed is None else _CARD + _INT8
    return card.format(
        settings=settings,
        report=report,
        layout=layout,
        n_used=max(segment.layer for segment in layout.segments),
        n_layers=activations.n_layers_,
        labels=labels,
        values=values,
        texts=_texts(settings),
        steps="\n".join(" ".join(repr(step).split()) for step in steps),
        facts="\n".join(f"- {fact}." for fact in facts),
        neurons="\n".join(
            f"| {s.layer} | {s.site} | {s.pooling} | {s.n_columns:,} of {s.width:,} |"
            for s in layout.segments
        ),
        code=_code(classifier),
        classifier=classifier.__name__,
        inputs=", ".join(f"`{name}`" for name in settings["inputs"]),
        axes=", ".join(settings["inputs"]["input_ids"]),
    )


def _labels(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Say which labels there are, and what their decision values mean."""
    classes = settings["classes"]
    if settings["several_outputs"]:
        first = classes[0]
        if len(first) == 2 and classes == [first] * len(classes):
            each = f"{len(classes)} at once, each {first[0]} or {first[1]}"
            return each, f"one for each label; above 0 means {first[1]}"
        outputs = ["one of " + ", ".join(f"`{label}`" for label in own) for own in classes]
        return (
            f"{len(classes)} at once: {'; '.join(outputs)}",
            "in this order; one for two labels, above 0 for the second; else one for each label, "
            "of which the one with the largest is predicted",
        )
    labels = ", ".join(f"`{label}`" for label in classes)
    if len(classes) == 2:
        return labels, f"above 0 for `{classes[1]}`"
    return labels, "the label with the largest one is predicted"


def _texts(settings: Mapping[str, Any]) -> str:
    prompt = "" if settings["prompt"] is None else f"in the prompt `{settings['prompt']!r}`, "
    over = "" if settings["pool_over"] == "all" else ", pooled over the text's own tokens"
    limit = f"{settings['max_length']} tokens, special ones included"
    if settings["long_texts"] == "truncate":
        return f"{prompt}cut off after {limit}{over}"
    return f"{prompt}read in windows of {limit}, {settings['overlap']} in common{over}"


def _facts(n_columns: int, steps: list[Any], layout: Layout, score: Any) -> Iterator[str]:
    """List what is known of the training; ``n_columns`` is what the pipeline computes."""
    counts = (getattr(step, "n_samples_seen_", None) for step in steps)  # scalers count
    n_texts = next((count for count in counts if count is not None and not np.ndim(count)), None)
    if n_texts is not None:
        yield f"Training texts: {n_texts:,.0f}"
    for step in steps:
        if isinstance(step, SalientNeuronSelector):
            yield f"Sparsity: {step.sparsity_:.2%} of the columns were dropped by the selection"
    yield f"Columns in use: {layout.n_columns:,} of the {n_columns:,} that the pipeline computes"
    scores = score if isinstance(score, Mapping) else {} if score is None else {"Score": score}
    for name, value in scores.items():
        yield f"{name}: {value if isinstance(value, Integral) else f'{float(value):.4g}'}"


def _code(classifier: type) -> str:
    """Copy the code that runs the folder: what stands before the class for windows, or all."""
    module = inspect.getsource(inspect.getmodule(classifier))  # type: ignore[arg-type]
    code = module.split('"""', 2)[2]  # the module's own docstring is for those who read skspin
    if classifier.__base__ is object:
        code = code.partition("class WindowClassifier")[0]
    return code.strip()


def settings_of(pipeline: Pipeline, layout: Layout, encoder: Any, columns: Any) -> dict[str, Any]:
    """Gather labels and how texts are read; ``columns`` is what `cut_model` gives."""
    recipe = encoder.recipe
    classes, several = _classes_of(pipeline)
    in_windows = recipe.long_texts == "windows"
    axes = ["n_texts", "n_windows", "n_tokens"] if in_windows else ["n_texts", "n_tokens"]
    names = ["input_ids", "attention_mask"]
    names += ["token_type_ids"] if encoder.has_types and "token_type_ids" in columns.inputs else []
    names += ["pooled"] if in_windows or recipe.pool_over != "all" else []
    try:
        (nothing,) = encoder.encode([""])
        empty_text = nothing.windows[0].inputs["input_ids"].tolist()
    except ValueError:  # The tokenizer has no token that can stand for it.
        empty_text = []
    # Without the path to a folder on this machine.
    model = Path(recipe.model_name)
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
        "split_special_tokens": bool(getattr(encoder.tokenizer, "split_special_tokens", False)),
        "is_causal": encoder.is_causal,
        "empty_text": empty_text,
        "inputs": {name: axes for name in names},
        "output": "decision_values",
        "model": model.name if model.exists() else recipe.model_name,
        "architecture": type(columns.model).__name__,
        "fingerprint": recipe.fingerprint,
        "skspin": __version__,
    }


def _classes_of(pipeline: Pipeline) -> tuple[list, bool]:
    """List the classes, of each output where there are several; and say whether there are."""
    *_, head = flatten(pipeline)
    if isinstance(head.classes_, list):
        return [_as_json(classes) for classes in head.classes_], True
    with warnings.catch_warnings(action="ignore"):  # of columns that had names in fit
        predicted = head.predict(np.zeros((1, head.n_features_in_), dtype=np.float32))
    if np.ndim(predicted) == 2:
        return [[0, 1]] * predicted.shape[1], True
    return _as_json(head.classes_), False


def _as_json(classes: np.ndarray) -> list:
    """List one output's labels, all of which JSON and UTF-8 can hold."""
    labels = classes.tolist()  # of some datetimes they are int
    for label, plain in zip(classes, labels, strict=True):
        whole = str(plain).encode(errors="replace").decode() == str(plain)
        if classes.dtype.kind in "mM" or not (isinstance(plain, str | int | float) and whole):
            raise ValueError(
                f"y has the label {label!r}, a {type(label).__name__}, but labels that can be "
                "written are str (without lone surrogates), int, float and bool. Fit with other "
                "labels, e.g. y.astype(str)."
            )
    return labels
