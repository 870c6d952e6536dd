"""A fitted pipeline as a torch module, or as a folder that needs neither skspin nor torch."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from skspin._explain import LinearForm, to_linear_form
from skspin._model import cut_model, text_encoder
from skspin._pickling import shallow_copy
from skspin._pipeline import fitted_pipeline, flatten
from skspin._serving.model_card import settings_of, write_card
from skspin._texts import open_texts
from skspin._transformer import LLMActivationTransformer

_TOLERANCE = 1e-4  # of decision values: absolute up to 1, relative above
_ROUNDING = 8 * np.finfo(np.float32).eps  # of activations, relative
_BATCH = 32  # texts
# Texts that every model is tried on, besides a long one.
_TEXTS = (
    "A fine film, and not a minute too long.",
    "No.",
    "Der Akku hält, was er verspricht — 很好 🙂, but the screen\n\tdoes not; 3.5 of 5.",
    "It is",
)
_SENTENCE = "The hall was full, the play was new, and nobody had told us how it would end. "
_LONGEST = 600  # words


# As a torch module


def to_torch(pipeline):
    """Turn a fitted pipeline with a linear head into a torch module.

    Parameters
    ----------
    pipeline : Pipeline
        Fitted, pruned or not: an :class:`LLMActivationTransformer`, steps that are linear in the
        columns, and a linear classifier, as :func:`explain_tokens` takes them. It is left as it
        was, and so is its model.

    Returns
    -------
    module : torch.nn.Module
        It takes ``input_ids`` and ``attention_mask`` of shape (n_texts, n_tokens), int, padded on
        the right, and gives decision values as ``pipeline.decision_function`` does: float32, of
        shape (n_texts,) or (n_texts, n_classes). ``token_type_ids`` may be given as well; they
        count where the model takes them. ``pooled``, of the same shape, is not zero for the tokens
        that are pooled (``pool_over``); without it, all real tokens are. Texts in windows
        (``long_texts="windows"``) come as inputs of shape (n_texts, n_windows, n_tokens), of which
        some windows may be all padding; ``pooled`` is then zero also for a token of two windows in
        the one where it does not count.

        The module is on the device of the pipeline, in evaluation mode, without gradients. The
        weights are a copy in float32, whatever ``dtype`` says; a model in memory keeps its format.

    Raises
    ------
    TypeError, NotFittedError
        If ``pipeline`` is no fitted Pipeline. Of a search, pass its ``best_estimator_``.
    ValueError
        If the pipeline is not linear after its activations or has steps before them, or if its
        model can't be cut: one that runs through its blocks several times (ALBERT), mixes padding
        into texts (FNet), scales the positions of texts that ``max_length`` allows (Phi-3 128k), is
        quantised or spread over devices.
    ModelMismatchError
        If the model's weights or tokenizer have changed since ``fit``.

    See Also
    --------
    prune : A smaller pipeline, for all kinds of classifiers.

    Notes
    -----
    The module leaves out blocks after the deepest layer in use, and weights that no neuron in use
    depends on. It is compared with the model on a few tokens before it is returned. Read more in
    the user guide, :doc:`/user_guide/deploying`.

    Examples
    --------
    >>> from transformers import AutoTokenizer
    >>> from skspin import make_spin_pipeline, to_torch
    >>> from skspin.datasets import demo_model
    >>> good = ["A fine film.", "Lovely.", "What a joy."]
    >>> bad = ["A bore.", "Dreadful.", "It drags."]
    >>> texts, labels = (good + bad) * 2, [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model()).set_params(select__C=1.0)
    >>> spin = spin.fit(texts, labels)
    >>> module = to_torch(spin)
    >>> tokenizer = AutoTokenizer.from_pretrained(demo_model())
    >>> inputs = tokenizer(
    ...     ["A lovely film.", "Dreadful."], padding=True, return_tensors="pt"
    ... )
    >>> (module(**inputs) > 0).int().tolist()
    [1, 0]
    """
    return _module_of(*_linear_parts(pipeline, "to_torch"))


def _module_of(transformer: LLMActivationTransformer, form: LinearForm) -> Any:
    """Make the module of a pipeline's linear parts."""
    from skspin._serving.graph import PipelineModule  # it loads torch

    of_roles = transformer.text_params_["pool_over"] not in ("all", "text")  # of conversations
    columns = cut_model(transformer._fitted_recipe(of_roles), transformer.layout_)
    return PipelineModule(columns, form, columns.model.device)


def _linear_parts(pipeline: Any, caller: str) -> tuple[LLMActivationTransformer, LinearForm]:
    """Split a pipeline into the activations in use, in float32, and its linear form."""
    pipeline = fitted_pipeline(pipeline, caller)
    first = next(flatten(pipeline))
    if not isinstance(first, LLMActivationTransformer):
        raise ValueError(
            f"The pipeline begins with a {type(first).__name__}, but {caller} takes one that begins"
            " with an LLMActivationTransformer: steps that change texts can't be exported. Apply "
            "them elsewhere, and pass the rest of the pipeline, e.g. pipeline[1:]."
        )
    try:
        transformer, form = to_linear_form(pipeline)
    except ValueError as error:
        raise ValueError(
            f"This pipeline can't be exported. {error} These heads can be exported: "
            "LogisticRegression, LinearSVC, RidgeClassifier, SGDClassifier, Perceptron, "
            "LinearDiscriminantAnalysis, SVC(kernel='linear') with two classes, and "
            "OneVsRestClassifier or MultiOutputClassifier around one of them."
        ) from error
    if not transformer._source().in_memory:
        transformer.dtype = "float32"
    return transformer, form


# As a folder with ONNX


def export_onnx(pipeline, folder, *, texts=None, score=None, quantize=None):
    """Write a fitted pipeline with a linear head into a folder, as ONNX.

    What is in the folder runs with numpy, onnxruntime and tokenizers alone: ``model.onnx``, from
    token ids to decision values, of any number of texts and tokens; ``tokenizer.json``;
    ``labels.json`` with the classes and how texts are read; and ``README.md``, a model card that
    says what the pipeline is and how it was trained, with the code that runs it.

    Parameters
    ----------
    pipeline : Pipeline
        Fitted, pruned or not, as :func:`to_torch` takes it.
    folder : str or path
        A new folder, or an empty one, in a folder that exists.
    texts : container of str or None, default=None
        Texts on which the written model is compared with the pipeline; None for five texts of
        skspin's own, one of them long.
    score : float, dict or None, default=None
        The score of the pipeline, for the model card; a dict names several.
    quantize : {"int8"} or None, default=None
        "int8" also writes ``model.int8.onnx``, with weights in 8 bits and activations that are
        converted to 8 bits while it runs, and counts the labels that change on ``texts``, which
        must be given. It takes a third of the space or less; how much faster it is depends on the
        processor. Neurons that vary little for their size, as some hidden states do, lose their
        information in 8 bits, so look at the count.

    Returns
    -------
    report : Bunch
        ``folder`` : Path; ``n_texts`` : int, how many were compared; ``difference`` : float, the
        largest difference of decision values; ``n_changed`` : int or None, how many of the texts
        get another label in int8.

    Raises
    ------
    ImportError
        If onnx, onnxruntime or onnxscript is missing: ``pip install "skspin[onnx]"``.
    FileExistsError, FileNotFoundError
        If ``folder`` exists and is not empty, or the folder that it is to be in does not exist.
    TypeError, ValueError
        If :func:`to_torch` does not take the pipeline, or it reads conversations, which need a
        chat template; if JSON can't hold a class label, such as a date; if the tokenizer has no
        ``tokenizer.json``; if a model in memory is not in float32; or if torch can't export the
        model.
    RuntimeError
        If decision values of the written model differ by more than 1e-4 (relative, for those above
        1) and by more than rounding activations to float32 explains. After this, as after any
        error, no folder is left behind.

    See Also
    --------
    to_torch : The same as a torch module.
    prune : A smaller pipeline, for all kinds of classifiers.

    Notes
    -----
    Decision values are compared with the pipeline's in float32, by the code that is in the model
    card. The written model reads texts only. A pipeline that pools over all tokens does not know
    whether it was fitted on conversations, so do not export one that was. Read more in the user
    guide, :doc:`/user_guide/serving`.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from skspin import export_onnx, make_spin_pipeline
    >>> from skspin.datasets import demo_model
    >>> good = ["A fine film.", "Lovely.", "What a joy."]
    >>> bad = ["A bore.", "Dreadful.", "It drags."]
    >>> texts, labels = (good + bad) * 2, [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model())
    >>> spin = spin.set_params(select__C=1.0, select__max_layer=2)
    >>> spin = spin.fit(texts, labels)
    >>> report = export_onnx(spin, Path(tempfile.mkdtemp()) / "films")
    >>> sorted(path.name for path in report.folder.iterdir())
    ['README.md', 'labels.json', 'model.onnx', 'tokenizer.json']
    >>> report.difference < 1e-4
    True
    """
    _check_options(folder, score, quantize, texts)
    folder = Path(folder).expanduser()
    transformer, form = _linear_parts(pipeline, "export_onnx")
    encoder, sample = _open_sample(transformer, texts)
    with _new_folder(folder) as unfinished:
        from skspin._serving.graph import write_graph, write_int8

        module = _module_of(transformer, form)
        settings = settings_of(pipeline, transformer.layout_, encoder, module.columns)
        labels = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        (unfinished / "labels.json").write_text(labels, encoding="utf-8")
        kind = _write_tokenizer(encoder, settings, unfinished / "tokenizer.json")
        write_graph(module, settings["inputs"], unfinished / "model.onnx")
        written = kind(unfinished)
        report = Bunch(
            folder=folder,
            n_texts=len(sample),
            difference=_compare(written, transformer, form, sample),
            n_changed=None,
        )
        if quantize:
            write_int8(unfinished / "model.onnx", unfinished / "model.int8.onnx")
            short = kind(unfinished, "model.int8.onnx")
            report.n_changed = sum(
                one != other
                for batch in _batches(sample)
                for one, other in zip(written.predict(batch), short.predict(batch), strict=True)
            )
        card = write_card(pipeline, transformer.layout_, settings, score, report, kind)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    return report


def _check_options(folder: Any, score: Any, quantize: Any, texts: Any) -> None:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder={folder!r} must be a str or path that names a new folder.")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize={quantize!r} must be None or 'int8'.")
    if quantize and texts is None:
        raise ValueError(
            f"quantize={quantize!r} changes some labels, and how many is counted on your texts. "
            "Pass texts=, some hundreds that are like those to come."
        )
    scores = score.values() if isinstance(score, Mapping) else [score]
    if not (score is None or all(isinstance(value, Real) for value in scores)):
        raise TypeError(
            f"score is a {type(score).__name__}, but must be a number, a dict of numbers or None."
        )
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not find_spec(name)]
    if missing:
        raise ImportError(
            f"export_onnx needs {', '.join(missing)}, which is not installed. Run: "
            'pip install "skspin[onnx]"'
        )


def _open_sample(transformer: LLMActivationTransformer, texts: Any) -> tuple[Any, list[str]]:
    """Make the encoder of texts, and list the texts to compare on."""
    chunks = open_texts(list(_TEXTS) if texts is None else texts)
    pool_over = transformer.text_params_["pool_over"]
    if chunks.conversations or pool_over not in ("all", "text"):
        reads = "texts holds" if chunks.conversations else f"pool_over={pool_over!r} is for"
        raise ValueError(
            f"{reads} conversations, which need the tokenizer's chat template, and that can't be "
            "exported. Use to_torch, or fit on texts that the chat template has written."
        )
    encoder = text_encoder(transformer._fitted_recipe(chunks.conversations))
    if texts is not None:
        return encoder, chunks.to_list()
    n_repeats = 1 + min(encoder.max_length, _LONGEST) // len(_SENTENCE.split())
    return encoder, [*_TEXTS, _SENTENCE * n_repeats]


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder, and rename it to ``folder`` or move its files there if there was no error."""
    target, is_there = folder.resolve(), folder.exists()
    if is_there and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"folder={str(folder)!r} is there already. Name a new one.")
    parent = target.parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"folder={str(folder)!r} is to be in {str(parent)!r}, which is no folder. Make that "
            "first."
        )
    # An existing folder keeps its mode, and may be on a disk of its own.
    with TemporaryDirectory(prefix=".skspin-", dir=target if is_there else parent) as temporary:
        unfinished = Path(temporary, "model")  # others may not read the temporary folder itself
        unfinished.mkdir()
        yield unfinished
        if is_there:
            for path in unfinished.iterdir():
                path.replace(target / path.name)
        else:
            unfinished.replace(target)


def _write_tokenizer(encoder: Any, settings: Mapping[str, Any], path: Path) -> type:
    """Write the tokenizer, and return the class that can run the folder with it."""
    from tokenizers import Tokenizer

    from skspin._serving.onnx_classifier import Classifier, WindowClassifier

    tokenizer = Tokenizer.from_str(encoder.to_json())
    whole = settings["prompt"] is None and settings["pool_over"] == "all"
    cut_at_end = settings["long_texts"] == "truncate" and settings["truncation_side"] == "right"
    if whole and cut_at_end:
        tokenizer.enable_truncation(settings["max_length"])
    tokenizer.save(str(path))
    return Classifier if whole and cut_at_end else WindowClassifier


def _compare(
    classifier: Any, transformer: LLMActivationTransformer, form: LinearForm, texts: list[str]
) -> float:
    """Find the largest difference from the pipeline, or raise if one is more than rounding."""
    plain = shallow_copy(transformer).set_params(cache=None, output_folder=None, verbose=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* longer than max_length")
        columns = np.asarray(plain.transform(texts), dtype=np.float64)
    constant = form.intercept + form.offsets.sum(axis=1)
    expected = columns @ form.weights.T + constant  # (n_texts, n_values)
    allowed = _TOLERANCE * np.maximum(1, np.abs(expected))
    # A neuron that hardly varies has a large weight, by which its rounding is multiplied.
    allowed += _ROUNDING * np.abs(columns) @ np.abs(form.weights.T)
    # One text alone, and several at a time.
    batches = [texts[:1], *_batches(texts[1:])]
    found = np.concatenate([classifier.decision_function(batch) for batch in batches])
    differences = np.abs(found.reshape(expected.shape) - expected)  # (n_texts, n_values)
    wrong = ~(differences <= allowed)
    if wrong.any():
        text, value = np.argwhere(wrong)[0]
        raise RuntimeError(
            f"What was written gives the text {texts[text][:60]!r} a decision value that differs "
            f"from the pipeline's by {differences[text, value]:.1e}, of "
            f"{allowed[text, value]:.1e} allowed. Nothing was left behind. Please report this "
            "model; to_torch may do."
        )
    return float(differences.max())


def _batches(texts: list[str]) -> list[list[str]]:
    return [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
