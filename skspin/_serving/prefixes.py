"""A pipeline's scores of every prefix of a text, from one pass and running pools."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from skspin._explain import classes_of, column_and_sign
from skspin._layout import ActivationArray, Layout
from skspin._model import token_activations
from skspin._pipeline import fitted_pipeline, flatten, instead_of, read_texts
from skspin._prune import prune
from skspin._sklearn import _wrap_data_with_container
from skspin._system import warn
from skspin._texts import TextTokens, tabulate
from skspin._transformer import LLMActivationTransformer

_MOST_VALUES = 2**22  # of prefixes' rows at a time: 16 MiB of float32
_METHODS = {"decision_function": "decision value for", "predict_proba": "probability of"}
# Of one text: by stretch of its tokens, by method, (n_tokens, n_decision_values or n_classes).
_Scores = list[dict[str, np.ndarray]]


class Crossing(NamedTuple):
    """Where a score reaches a threshold: the token's number, its end in the text, the score."""

    token: int
    end: int
    score: float


def check_threshold(threshold: Any) -> None:
    """Refuse what scores can't be compared with."""
    if not isinstance(threshold, Real) or threshold != threshold:  # NaN
        raise ValueError(
            f"threshold={threshold!r} must be a number in the scores' unit, not NaN. Every score "
            "reaches -np.inf, and none np.inf."
        )


@dataclass(frozen=True, eq=False, repr=False)
class PrefixScores:
    """A classifier's scores after every token; :func:`~skspin.score_prefixes` makes it.

    Parameters
    ----------
    tokens : list of TextTokens of length n_texts
        The tokens of each text and where in it they are.
    decision_values : list of ndarray of shape (n_tokens, n_decision_values) or None
        What ``decision_function`` gives the prefix that ends with each token; None if the
        classifier has none. Two classes share one value, which is in favour of the second.
    probabilities : list of ndarray of shape (n_tokens, n_classes) or None
        What ``predict_proba`` gives that prefix; None if the classifier has none.
    classes : ndarray of shape (n_classes,)
        The classifier's classes. For several outputs, the numbers of the outputs or, if one has
        more than two classes, pairs of output and class.
    """

    tokens: list[TextTokens]
    decision_values: list[np.ndarray] | None
    probabilities: list[np.ndarray] | None
    classes: np.ndarray

    def __repr__(self) -> str:
        """Say how many scores there are, and of what."""
        n_tokens = sum(len(part.tokens) for part in self.tokens)
        n_texts = f"{len(self)} text{'' if len(self) == 1 else 's'}"
        kinds = {"decision values": self.decision_values, "probabilities": self.probabilities}
        given = " and ".join(name for name, values in kinds.items() if values is not None)
        return (
            f"<PrefixScores of {n_texts}, {n_tokens} tokens: {given} for the classes "
            f"{self.classes.tolist()}>"
        )

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.tokens)

    def for_class(self, label=None, *, response_method="auto") -> list[np.ndarray]:
        """Look up the scores of one class.

        Parameters
        ----------
        label : class label, default=None
            One of ``classes``; None for the second of two.
        response_method : {"auto", "decision_function", "predict_proba"}, default="auto"
            Which scores; "auto" for decision values, or probabilities if there are none.

        Returns
        -------
        list of ndarray of shape (n_tokens,)
            One array per text.

        Raises
        ------
        ValueError
            If there is no such class, or no such scores.
        """
        return self._of_class(label, response_method)[1]

    def describe(self, label=None, *, response_method="auto") -> str:
        """Say in words what `for_class` gives.

        Parameters
        ----------
        label : class label, default=None
            As in `for_class`.
        response_method : {"auto", "decision_function", "predict_proba"}, default="auto"
            As there.

        Returns
        -------
        str
            Such as "decision value for spam".
        """
        return self._of_class(label, response_method)[0]

    def _of_class(self, label: Any, response_method: str) -> tuple[str, list[np.ndarray]]:
        method, values = self._chosen(response_method)
        label = self.classes[1] if label is None and len(self.classes) == 2 else label
        column, sign = column_and_sign(label, self.classes, values[0].shape[1])
        return f"{_METHODS[method]} {label}", [sign * part[:, column] for part in values]

    def _chosen(self, response_method: str) -> tuple[str, list[np.ndarray]]:
        """Choose a method, and its scores."""
        offered = zip(_METHODS, (self.decision_values, self.probabilities), strict=True)
        given = {name: values for name, values in offered if values is not None}
        method = next(iter(given)) if response_method == "auto" else response_method
        if method not in given:
            raise ValueError(
                f"response_method={response_method!r}, but this classifier's scores are of "
                f"{list(given)}."
            )
        return method, given[method]

    def first_crossing(self, threshold, label=None, *, response_method="auto"):
        """Find the first token at which a class's score is at least a threshold.

        Parameters
        ----------
        threshold : float
            In the scores' unit.
        label : class label, default=None
            One of ``classes``; None for the second of two.
        response_method : {"auto", "decision_function", "predict_proba"}, default="auto"
            Which scores; "auto" for decision values, or probabilities if there are none.

        Returns
        -------
        list of Crossing or None
            For each text the ``token`` (its number among the scored ones), its ``end`` in the text
            (characters), and the ``score``; None for a text that stays below the threshold.
        """
        check_threshold(threshold)
        crossings: list[Crossing | None] = []
        scores = self.for_class(label, response_method=response_method)
        for part, values in zip(self.tokens, scores, strict=True):
            above = np.flatnonzero(values >= threshold)
            at = int(above[0]) if len(above) else None
            crossings.append(
                None if at is None else Crossing(at, int(part.ends[at]), float(values[at]))
            )
        return crossings

    def to_frame(self, *, response_method="auto"):
        """Tabulate every score.

        Parameters
        ----------
        response_method : {"auto", "decision_function", "predict_proba"}, default="auto"
            Which scores; "auto" for decision values, or probabilities if there are none.

        Returns
        -------
        pandas.DataFrame
            One row per text, token and score, with the columns ``text`` (its number), ``token``,
            ``start`` and ``end`` (characters), ``class`` and ``score``. A decision value that two
            classes share is in the second one's row.
        """
        _, values = self._chosen(response_method)
        classes = self.classes[-values[0].shape[1] :]  # of two with one value the second
        return tabulate(self.tokens, classes, "score", values)


def score_prefixes(pipeline, texts):
    """Score every prefix of each text, as the pipeline would: a decision after every token.

    One pass through a causal model is enough: a token's activations do not change with what
    follows, and poolings are updated token by token (a mean by a running sum, a maximum by a
    running maximum). So the scores are those that ``pipeline`` gives to the prompt with the text's
    first token, its first two, and so on, in the windows of the whole text; the last ones are those
    of the whole text. Read more in the user guide, :doc:`/user_guide/growing`.

    Parameters
    ----------
    pipeline : Pipeline
        Fitted: an :class:`LLMActivationTransformer` of a causal decoder, any steps, any classifier
        with ``decision_function`` or ``predict_proba``. A pruned copy is used, if it can be pruned.
    texts : list, tuple, array, Series or one-column frame of str or conversations
        Steps before the transformer are applied first; the tokens are those that the model reads.
        A text that is truncated has scores up to the cut. In a conversation, those tokens of the
        messages that are pooled have scores.

    Returns
    -------
    scores : PrefixScores
        One entry per text. Memory holds activations of one text at a time, (n_tokens, n_columns).

    Raises
    ------
    TypeError, NotFittedError
        If ``pipeline`` is no fitted Pipeline. Of a search, pass its ``best_estimator_``.
    ValueError
        If the model looks ahead, as every encoder does (this is tested), or scales the positions of
        texts that ``max_length`` allows; if tokens of the prompt, template or tokenizer that come
        after the text are pooled; if a text loses its first tokens (``truncation_side="left"``); or
        if the pipeline is not as described above.

    See Also
    --------
    PrefixScorer : The same for a text that arrives in pieces.
    PrefixScoresDisplay : A picture of the scores.

    Examples
    --------
    A small untrained decoder, with the demo model's tokenizer, which adds a token at a text's end.
    So only the text is pooled.

    >>> from transformers import AutoTokenizer, LlamaConfig, LlamaModel
    >>> from skspin import make_spin_pipeline, score_prefixes
    >>> from skspin.datasets import demo_model
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64}
    >>> layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    >>> config = LlamaConfig(vocab_size=30522, **sizes, **layers)
    >>> model = LlamaModel(config)
    >>> tokenizer = AutoTokenizer.from_pretrained(demo_model())
    >>> good = ["A fine film.", "Lovely.", "What a joy."]
    >>> bad = ["A bore.", "Dreadful.", "It drags."]
    >>> texts, labels = (good + bad) * 2, [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(model, tokenizer=tokenizer, pool_over="text")
    >>> spin = spin.set_params(select__C=1.0).fit(texts, labels)
    >>> text = "A lovely film, and a dreadful bore."
    >>> scores = score_prefixes(spin, [text])
    >>> scores.tokens[0].surfaces()
    ['A', 'lovely', 'film', ',', 'and', 'a', 'dreadful', 'bore', '.']
    >>> value = spin.decision_function([text])[0]
    >>> bool(abs(scores.decision_values[0][-1, 0] - value) < 1e-4)
    True
    """
    head = PrefixHead(pipeline, "score_prefixes")
    transformer, texts = head.transformer, read_texts(head.pipeline, texts)
    found: dict[str, tuple[TextTokens, _Scores]] = {}
    recipe, distinct = transformer._fitted_recipe(texts.conversations), texts.distinct().to_list()
    found_in = token_activations(recipe, distinct, transformer.layout_, of_prefixes=True)
    for text, tokens, activations in found_in:
        scored = tokens.messages >= 0  # (n_tokens,); the prompt's tokens are no prefix's end
        places = (tokens.starts[scored], tokens.ends[scored], tokens.messages[scored])
        names = list(compress(tokens.tokens, scored))
        own = TextTokens(tokens.text, names, *places, tokens.is_truncated)
        pools = RunningPools(transformer.layout_)
        found[text] = own, head.scores(pools, activations, scored)
    n_truncated = sum(tokens.is_truncated for tokens, _ in found.values())
    if n_truncated:
        warn(
            f"{n_truncated} of {len(found)} texts are longer than max_length="
            f"{recipe.max_length} tokens, or than the model has positions, and were "
            "truncated: tokens after the cut have no scores. Set long_texts='windows' to read them."
        )
    return head.gather([found[text] for text in texts.to_list()])


class PrefixHead:
    """A fitted pipeline, pruned if possible, and the steps of it after its activations."""

    def __init__(self, pipeline: Any, caller: str):
        pipeline = fitted_pipeline(pipeline, caller)
        with suppress(ValueError):  # A step needs all columns.
            pipeline = prune(pipeline)
        self.pipeline, steps = pipeline, list(flatten(pipeline))
        is_reader = [isinstance(step, LLMActivationTransformer) for step in steps]
        if not any(is_reader):
            raise ValueError(
                f"{caller} needs a pipeline in which an LLMActivationTransformer is a step by "
                "itself, not inside a ColumnTransformer or FeatureUnion: other columns do not grow "
                "by token."
            )
        *steps, head = steps
        self._methods = [method for method in _METHODS if hasattr(head, method)]
        if not self._methods:
            raise ValueError(
                f"The pipeline ends in a {type(head).__name__}, which has neither decision_function"
                f" nor predict_proba. Use a classifier.{instead_of(head)}"
            )
        self._head, self._classes = head, np.asarray(classes_of(head))
        at = is_reader.index(True)
        self.transformer, self._steps = steps[at], steps[at + 1 :]

    def scores(
        self,
        pools: RunningPools,
        activations: np.ndarray,  # (n_tokens, n_columns)
        is_scored: np.ndarray,  # (n_tokens,), bool
    ) -> _Scores:
        """Pool more tokens, and score the prefixes that end with some of them."""
        size = max(1, _MOST_VALUES // activations.shape[1])
        found = []
        for start in range(0, len(activations), size):
            chunk = slice(start, start + size)
            rows = pools.add(activations[chunk])[is_scored[chunk]]
            if len(rows):
                X: Any = ActivationArray(rows, self.transformer.layout_)
                X = _wrap_data_with_container("transform", X, rows, self.transformer)  # set_output
                for step in self._steps:
                    X = step.transform(X)
                found.append({m: _as_matrix(getattr(self._head, m)(X)) for m in self._methods})
        return found

    def gather(self, texts: list[tuple[TextTokens, _Scores]]) -> PrefixScores:
        """Put texts' scores together; a text without tokens has none."""
        n_classes = len(self._classes)
        tables: dict[str, list[np.ndarray]] = {}
        for method in self._methods:
            shared = method == "decision_function" and n_classes == 2
            widths = {part[method].shape[1] for _, scores in texts for part in scores}
            width = max(widths, default=1 if shared else n_classes)
            if width != n_classes and not (shared and width == 1):
                raise ValueError(
                    f"{method} of {type(self._head).__name__} gives {width} values for "
                    f"{n_classes} classes; one for each is needed. Set "
                    "decision_function_shape='ovr' if it has that parameter."
                )
            nothing = [np.empty((0, width))]
            tables[method] = [
                np.vstack([part[method] for part in scores] or nothing) for _, scores in texts
            ]
        decision_values, probabilities = (tables.get(method) for method in _METHODS)
        tokens = [tokens for tokens, _ in texts]
        return PrefixScores(tokens, decision_values, probabilities, self._classes)


class RunningPools:
    """The poolings of a text after each of its tokens, updated as tokens arrive."""

    def __init__(self, layout: Layout):
        self._n_tokens = 0
        self._last = np.empty(layout.n_columns)  # sums, maxima and first values so far
        columns: dict[str, list[np.ndarray]] = {}
        for segment, place in zip(layout.segments, layout.slices, strict=True):
            columns.setdefault(segment.pooling, []).append(np.arange(place.start, place.stop))
        self._columns = {pooling: np.concatenate(parts) for pooling, parts in columns.items()}

    def add(self, activations: np.ndarray) -> np.ndarray:
        """Take activations (n_tokens, n_columns); return the pooled row after each, float32."""
        rows = np.empty(activations.shape, dtype=np.float32)
        for pooling, columns in self._columns.items():
            values = activations[:, columns]
            self._last[columns] = _RUNNING[pooling](values, self._last[columns], self._n_tokens)
            rows[:, columns] = values
        self._n_tokens += len(activations)
        return rows


# Each takes values (n_tokens, n_neurons), float32, which it overwrites by their running pool; what
# it returned for the tokens before, (n_neurons,); and the number of those. Token by token, the sums
# stay in the processor's cache: numpy's own accumulations take four times as long.


def _running_mean(values: np.ndarray, total: np.ndarray, n_before: int) -> np.ndarray:
    total = total if n_before else np.zeros(len(total))
    for count, row in enumerate(values, start=n_before + 1):
        total += row
        np.divide(total, count, out=row, casting="same_kind")
    return total


def _running_max(values: np.ndarray, most: np.ndarray, n_before: int) -> np.ndarray:
    last = most.astype(np.float32) if n_before else values[0]
    for row in values:
        last = np.maximum(last, row, out=row)
    return last


def _running_first(values: np.ndarray, first: np.ndarray, n_before: int) -> np.ndarray:
    values[:] = first if n_before else values[0]
    return values[0]


_RUNNING = {
    "mean": _running_mean,
    "max": _running_max,
    "first": _running_first,
    "last": lambda values, last, n_before: last,
}


def _as_matrix(values: Any) -> np.ndarray:
    """Write scores as (n_prefixes, n_values); those of several outputs side by side."""
    if isinstance(values, list):
        # Of an output of two classes the second one's, as `classes_of` names them.
        return np.hstack([part[:, 1:] if part.shape[1] == 2 else part for part in values])
    values = np.asarray(values)
    return values.reshape(len(values), -1)
