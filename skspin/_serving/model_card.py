"""The files that describe the ONNX model in a folder: `labels.json` and `README.md`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline

from skspin._layout import Layout
from skspin._pipeline import flatten
from skspin._selector import SalientNeuronSelector
from skspin._transformer import LLMActivationTransformer
from skspin._version import __version__

_CARD = """\
---
library_name: onnx
pipeline_tag: text-classification
tags:
- skspin
---

# Text classifier on inner neurons of {model} ({architecture})

A text goes through the first {n_used} of {n_layers} blocks of the frozen language model `{model}`.
Activations of its neurons ({n_columns:,} columns, pooled over the text's tokens) are weighed and
summed up to a decision value for each label. `model.onnx` holds all of that, from token ids on.

- Labels: {labels}.
- Decision values: {values}.
- Texts: {texts}.
- Fingerprint of model and tokenizer: `{fingerprint}`.
- Written by [skspin](https://pypi.org/project/skspin/) {version}. The weights are the language
  model's, so its license holds for this file as well.

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

On {n_texts:,} texts its decision values differ from the pipeline's by at most {difference:.1e}.
{int8}
"""
_INT8 = """
`model.int8.onnx` is the same with weights of 8 bits. It gives {n_changed:,} of these {n_texts:,}
texts another label.
"""


def write_card(
    pipeline: Pipeline,
    layout: Layout,
    settings: Mapping[str, Any],
    score: Any,
    report: Mapping[str, Any],
    classifier: type,
) -> str:
    """Write a model card.

    ``report`` is what `export_onnx` gives, and ``classifier`` the class whose code runs the folder.
    """
    activations, *steps = flatten(pipeline)
    return _CARD.format(
        model=settings["model"],
        architecture=settings["architecture"],
        n_used=max(segment.layer for segment in layout.segments),
        n_layers=activations.n_layers_,
        n_columns=layout.n_columns,
        labels=_labels(settings),
        values=_values(settings),
        texts=_texts(settings),
        fingerprint=settings["fingerprint"],
        version=settings["skspin"],
        steps="\n".join(" ".join(repr(step).split()) for step in steps),
        facts="\n".join(f"- {fact}." for fact in _facts(activations, steps, layout, score)),
        neurons="\n".join(
            f"| {s.layer} | {s.site} | {s.pooling} | {s.n_columns:,} of {s.width:,} |"
            for s in layout.segments
        ),
        code=_code(classifier),
        classifier=classifier.__name__,
        n_texts=report["n_texts"],
        difference=report["difference"],
        int8="" if report["n_changed"] is None else _INT8.format(**report),
        inputs=", ".join(f"`{name}`" for name in settings["inputs"]),
        axes=", ".join(settings["inputs"]["input_ids"]),
    )


def _labels(settings: Mapping[str, Any]) -> str:
    if settings["several_outputs"]:
        return f"{len(settings['classes'])} at once, each one of {settings['classes']}"
    return ", ".join(f"`{label}`" for label in settings["classes"])


def _values(settings: Mapping[str, Any]) -> str:
    if settings["several_outputs"]:
        return "one for an output of two labels, above 0 for the second, else one for each label"
    if len(settings["classes"]) == 2:
        return f"above 0 for `{settings['classes'][1]}`"
    return "the label with the largest one is predicted"


def _texts(settings: Mapping[str, Any]) -> str:
    prompt = "" if settings["prompt"] is None else f"in the prompt `{settings['prompt']!r}`, "
    over = "" if settings["pool_over"] == "all" else ", pooled over the text's own tokens"
    limit = f"{settings['max_length']} tokens, special ones included"
    if settings["long_texts"] == "truncate":
        return f"{prompt}cut off after {limit}{over}"
    return f"{prompt}read in windows of {limit}, {settings['overlap']} in common{over}"


def _facts(
    activations: LLMActivationTransformer, steps: list[Any], layout: Layout, score: Any
) -> Iterator[str]:
    for step in steps:
        n_texts = getattr(step, "n_samples_seen_", None)  # scalers count
        if n_texts is not None and np.ndim(n_texts) == 0:
            yield f"Training texts: {n_texts:,.0f}"
            break
    for step in steps:
        if isinstance(step, SalientNeuronSelector):
            yield f"Sparsity: {step.sparsity_:.2%} of the columns were dropped by the selection"
    n_columns = activations.layout_.n_columns
    yield f"Columns in use: {layout.n_columns:,} of the {n_columns:,} that the pipeline computes"
    scores = score if isinstance(score, Mapping) else {} if score is None else {"Score": score}
    for name, value in scores.items():
        yield f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"


def _code(classifier: type) -> str:
    """Join the source of a class that runs the folder and that of its base class."""
    base = classifier.__base__ or object
    if base is object:
        # The module's own docstring is for those who read skspin.
        module = inspect.getsource(inspect.getmodule(classifier))  # type: ignore[arg-type]
        return module.split('"""', 2)[2].strip()
    return f"{_code(base)}\n\n\n{inspect.getsource(classifier).strip()}"


# labels.json


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
        warnings.simplefilter("ignore")  # scikit-learn warns if columns had names in fit
        predicted = head.predict(np.zeros((1, head.n_features_in_), dtype=np.float32))
    if np.ndim(predicted) == 2:
        return [[0, 1]] * predicted.shape[1], True
    return head.classes_.tolist(), False


def _ids_of_nothing(encoder: Any) -> list[int]:
    """Tokenize an empty text; no ids if the tokenizer has no token that can stand for it."""
    try:
        (text,) = encoder.encode([""])
    except ValueError:
        return []
    return text.windows[0].inputs["input_ids"].tolist()


def _name(model: str) -> str:
    """Name a model, without the path to its folder on this machine."""
    return Path(model).name if Path(model).exists() else model
