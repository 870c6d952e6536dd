"""Where single neurons are most active, so that a person can name them."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappush, heappushpop
from html import escape
from numbers import Integral

import numpy as np
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted

from skspin._explain.tokens import page_to_html, token_to_html
from skspin._model import token_activations
from skspin._pipeline import only_step, read_texts
from skspin._transformer import LLMActivationTransformer


@dataclass(frozen=True)
class NeuronHit:
    """A token at which a neuron is active.

    Parameters
    ----------
    text : int
        Number of the text.
    token : str
        As the text writes it.
    start, end : int
        Its characters, the end not included.
    activation : float
        The neuron's value.
    """

    text: int
    token: str
    start: int
    end: int
    activation: float


@dataclass(frozen=True, repr=False)
class NeuronExplanation:
    """The tokens that activate some neurons most; :func:`~skspin.explain_neurons` makes it.

    In a notebook it shows the tokens in their texts.

    Parameters
    ----------
    hits : dict of str to list of NeuronHit
        For each neuron's name its tokens, the largest activation first; one token per text.
    texts : list of str
        The texts searched.
    """

    hits: dict[str, list[NeuronHit]]
    texts: list[str]

    def __repr__(self) -> str:
        """Name the neurons, and count the texts."""
        return f"<NeuronExplanation of {list(self.hits)} in {len(self.texts)} texts>"

    def to_frame(self):
        """Tabulate every hit.

        Returns
        -------
        pandas.DataFrame
            One row per neuron and hit, with the columns ``neuron``, ``text`` (its number),
            ``token``, ``start`` and ``end`` (characters) and ``activation``.
        """
        import pandas as pd

        rows = [{"neuron": name, **vars(hit)} for name, hits in self.hits.items() for hit in hits]
        columns = ["neuron", "text", "token", "start", "end", "activation"]
        return pd.DataFrame(rows, columns=columns)

    def _repr_html_(self) -> str:
        entries = []
        for name, hits in self.hits.items():
            most = max((abs(hit.activation) for hit in hits), default=0.0) or 1.0
            lines = [
                token_to_html(self.texts[hit.text], hit.start, hit.end, hit.activation, unit=most)
                for hit in hits
            ]
            entries.append((f"<b>{escape(name)}</b>", "".join(lines)))
        return page_to_html("The tokens at which each neuron is most active.", entries)


def explain_neurons(estimator, texts, neurons, *, n_top=10):
    """Find the tokens that activate neurons most, so that a person can name them.

    Read more in :doc:`/how_to/name_a_neuron`.

    Parameters
    ----------
    estimator : Pipeline or LLMActivationTransformer
        Fitted, with one activation transformer; the classifier may be any.
    texts : list, tuple, array, Series or one-column frame of str
        Where to look. The texts go through the model, as activations of tokens are not stored;
        memory for activations does not grow with the number of texts.
    neurons : str or list of str
        Names of columns that the transformer gives, such as ``"layer3_mlp_max_412"``; those that a
        pipeline selected are in ``pipeline[:2].get_feature_names_out()``.
    n_top : int, default=10
        How many tokens to find for each neuron, from as many different texts.

    Returns
    -------
    explanation : NeuronExplanation
        The tokens of each neuron, in the order of ``neurons``, without special tokens and those of
        the prompt.

    Raises
    ------
    TypeError, ValueError
        If a name is not among the transformer's columns, there is not one transformer, ``n_top`` is
        no whole number above 0, or the tokenizer does not tell where in the text its tokens are.
    NotFittedError
        If the estimator is not fitted.

    See Also
    --------
    explain_tokens : What each token adds to a decision.
    LayerSalienceDisplay : How many neurons each layer gives.

    Examples
    --------
    >>> from skspin import LLMActivationTransformer, explain_neurons
    >>> from skspin.datasets import demo_model
    >>> texts = ["Two cats.", "The weather was fine.", "A cat sat on the mat."]
    >>> transformer = LLMActivationTransformer(demo_model(), site="mlp", layers=4)
    >>> transformer = transformer.fit(texts)
    >>> explanation = explain_neurons(
    ...     transformer, texts, "layer4_mlp_mean_17", n_top=2
    ... )
    >>> [len(hits) for hits in explanation.hits.values()]
    [2]
    """
    check_is_fitted(estimator)
    transformer = only_step(estimator, LLMActivationTransformer)
    check_scalar(n_top, "n_top", Integral, min_val=1)
    is_one = isinstance(neurons, str | bytes) or not np.iterable(neurons)
    names = [str(name) for name in ([neurons] if is_one else neurons)]
    columns = transformer.get_feature_names_out()
    unknown = sorted(set(names).difference(columns))
    if unknown or not names:
        given = f"neurons={unknown} are not among" if names else "neurons=[] must name some of"
        raise ValueError(
            f"{given} the transformer's {len(columns)} columns, {columns[0]} to {columns[-1]}. See "
            "get_feature_names_out()."
        )
    narrowed = transformer._restrict_to(np.isin(columns.astype(str), names))
    columns = narrowed.get_feature_names_out()
    heaps: list[list[tuple]] = [[] for _ in columns]  # (activation, -text, token, start, end)
    texts = read_texts(estimator, texts)
    number_of = {text: number for number, text in reversed(list(enumerate(texts.to_list())))}
    written: dict[str, str] = {}  # a conversation as its chat template has it
    recipe = transformer._fitted_recipe(texts.conversations)
    for text, tokens, activations in token_activations(recipe, [*number_of], narrowed.layout_):
        written[text] = tokens.text
        inside = np.flatnonzero(tokens.in_text)
        if not len(inside):
            continue
        places = inside[activations[inside].argmax(axis=0)]  # (n_columns,)
        most = activations[places, np.arange(len(columns))]
        rows = list(
            zip(tokens.surfaces(), tokens.starts.tolist(), tokens.ends.tolist(), strict=True)
        )
        for heap, value, place in zip(heaps, most.tolist(), places.tolist(), strict=True):
            push = heappush if len(heap) < n_top else heappushpop
            push(heap, (value, -number_of[text], *rows[place]))  # of equal values the earlier text
    hits = {
        name: [
            NeuronHit(-minus_number, token, start, end, value)
            for value, minus_number, token, start, end in sorted(heap, reverse=True)
        ]
        for name, heap in zip(columns, heaps, strict=True)
    }
    shown = [written[text] for text in texts.to_list()]
    return NeuronExplanation({name: hits[name] for name in names}, shown)
