"""A fitted pipeline as a torch module."""

from __future__ import annotations

from typing import Any

from skspin._explain import LinearForm, to_linear_form
from skspin._pipeline import fitted_pipeline, flatten
from skspin._transformer import LLMActivationTransformer


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
        into texts (FNet), is quantised or spread over devices.
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
    return module_of(*linear_parts(pipeline, "to_torch"))


def module_of(transformer: LLMActivationTransformer, form: LinearForm) -> Any:
    """Make the module of a pipeline's linear parts."""
    from skspin._serving.graph import PipelineModule  # it loads torch

    columns = transformer._cut_model()
    return PipelineModule(columns, form, columns.model.device)


def linear_parts(pipeline: Any, caller: str) -> tuple[LLMActivationTransformer, LinearForm]:
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
