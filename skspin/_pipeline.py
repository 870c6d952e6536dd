"""SPIN as one Pipeline."""

from __future__ import annotations

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from skspin._selector import SalientNeuronSelector
from skspin._transformer import LLMActivationTransformer


def make_spin_pipeline(
    model="distilbert/distilbert-base-uncased",
    *,
    sparsity=0.1,
    head=None,
    site="mlp",
    pooling=("mean", "max"),
    **transformer_params,
):
    """Classify texts by a language model's salient neurons: SPIN as a scikit-learn Pipeline.

    The steps of SPIN [1]_ are ``activations`` (:class:`LLMActivationTransformer`), ``select``
    (:class:`SalientNeuronSelector`), ``scale`` (:class:`~sklearn.preprocessing.StandardScaler`) and
    ``classify``. The defaults are near what validation parts of four data sets chose (a sparsity of
    0, 0.1, 0.1 and 0.2; a head of ``C=0.003`` three times and 0.1 once); both are worth a search.

    Parameters
    ----------
    model : str, path or PreTrainedModel, default="distilbert/distilbert-base-uncased"
        See :class:`LLMActivationTransformer`.
    sparsity : float in [0, 1), default=0.1
        See :class:`SalientNeuronSelector`; larger keeps fewer neurons.
    head : classifier or None, default=None
        The last step; None for a strongly regularised
        :class:`~sklearn.linear_model.LogisticRegression` (``C=0.003``).
    site : str or tuple of str, default="mlp"
        See :class:`LLMActivationTransformer`.
    pooling : str or tuple of str, default=("mean", "max")
        See :class:`LLMActivationTransformer`.
    **transformer_params : dict
        Further parameters of :class:`LLMActivationTransformer`.

    Returns
    -------
    pipeline : Pipeline
        Not fitted.

    References
    ----------
    .. [1] Jiao et al., "SPIN: Sparsifying and Integrating Internal Neurons in Large Language Models
       for Text Classification", Findings of ACL 2024, :arxiv:`2311.15983`.

    Examples
    --------
    >>> from skspin import make_spin_pipeline
    >>> from skspin.datasets import demo_model
    >>> texts = ["A fine film.", "Lovely.", "What a joy.", "A bore.", "Dreadful.", "It drags."] * 2
    >>> labels = [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(demo_model()).set_params(select__C=1.0)  # few texts, large C
    >>> spin = spin.fit(texts, labels)
    >>> spin.predict(["A lovely film.", "A dreadful bore."])
    array([1, 0])
    """
    transformer = LLMActivationTransformer(model, site=site, pooling=pooling, **transformer_params)
    return Pipeline(
        [
            ("activations", transformer),
            ("select", SalientNeuronSelector(sparsity)),
            ("scale", StandardScaler()),
            ("classify", LogisticRegression(C=0.003, max_iter=1000) if head is None else head),
        ]
    )
