"""A pipeline's scores of every prefix of a text, from one pass and running pools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from skspin._explain import classes_of
from skspin._layout import ActivationArray, Layout
from skspin._pipeline import fitted_pipeline, flatten, instead_of, read_texts
from skspin._prune import prune
from skspin._sklearn import _wrap_data_with_container
from skspin._system import warn
from skspin._texts import TextTokens, tabulate
from skspin._transformer import LLMActivationTransformer

_MOST_VALUES = 2**22  # of prefixes' rows at a time: 16 MiB of float32
_METHODS = ("decision_function", "predict_proba")


class Crossing(NamedTuple):
    """Where a score reaches a threshold: the token's number, its end in the text, the score."""

    token: int
    end: int
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class PrefixScores:
    """A classifier's scores after every token; :func:`score_prefixes` makes it.

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

    Examples
    --------
    See :func:`score_prefixes`.
    """

    tokens: list[TextTokens]
    decision_values: list[np.ndarray] | None
    probabilities: list[np.ndarray] | None
    classes: np.ndarray

    def __repr__(self) -> str:
        """Say how many scores there are, and of what."""
        n_tokens = sum(len(part.tokens) for part in self.tokens)
        n_texts = f"{len(self)} text{'s' * (len(self) != 1)}"
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
        values, columns, signs = self._columns(response_method)
        number = self._number(label)
        return [signs[number] * part[:, columns[number]] for part in values]

    def describe(self, label=None, *, response_method="auto") -> str:
        """Say in words what `for_class` gives, such as "decision value for spam"."""
        name = self.classes.tolist()[self._number(label)]
        is_decision = self._columns(response_method)[0] is self.decision_values
        return f"{'decision value for' if is_decision else 'probability of'} {name}"

    def _number(self, label) -> int:
        labels = self.classes.tolist()
        if label is None and len(labels) == 2:
            return 1
        if label not in labels:
            raise ValueError(f"label={label!r} must be one of the classes {labels}.")
        return labels.index(label)

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
        values, columns, _ = self._columns(response_method)
        classes = self.classes if len(set(columns)) == len(columns) else self.classes[1:]
        return tabulate(self.tokens, classes, "score", values)

    def _columns(self, response_method: str) -> tuple[list[np.ndarray], list[int], list[int]]:
        """Choose the scores; give each class's column of them, and its sign there."""
        offered = dict(zip(_METHODS, (self.decision_values, self.probabilities), strict=True))
        given = [name for name, values in offered.items() if values is not None]
        method = given[0] if response_method == "auto" else response_method
        if method not in given:
            raise ValueError(
                f"response_method={response_method!r}, but this classifier's scores are of {given}."
            )
        values: Any = offered[method]
        if len(self.classes) == 2 and values[0].shape[1] == 1:
            return values, [0, 0], [-1, 1]
        return values, list(range(len(self.classes))), [1] * len(self.classes)


def score_prefixes(pipeline, texts):
    """Score every prefix of each text, as the pipeline would: a decision after every token.

    One pass through a causal model is enough: a token's activations do not change with what
    follows, and poolings are updated token by token (a mean by a running sum, a maximum by a
    running maximum). So the scores are those that ``pipeline`` gives to the prompt with the text's
    first token, its first two, and so on; the last ones are those of the whole text. Read more in
    the user guide, :doc:`/user_guide/growing`.

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
    TypeError
        If ``pipeline`` is no Pipeline. Of a search, pass its ``best_estimator_``.
    ValueError
        If the model looks ahead, as every encoder does (this is tested); if tokens of the prompt,
        template or tokenizer that come after the text are pooled; if a text loses its first tokens
        (``truncation_side="left"``); or if the pipeline is not as described above.
    NotFittedError
        If the pipeline is not fitted.

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
    >>> config = LlamaConfig(
    ...     vocab_size=30522,
    ...     hidden_size=32,
    ...     intermediate_size=64,
    ...     num_hidden_layers=2,
    ...     num_attention_heads=2,
    ... )
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
    transformer, ending = split_pipeline(pipeline, "score_prefixes")
    texts = read_texts(ending.pipeline, texts)
    found: dict[str, tuple[TextTokens, dict[str, np.ndarray]]] = {}
    for text, tokens, activations in transformer._read_prefixes(texts):
        is_scored = tokens.messages >= 0  # (n_tokens,); the prompt's tokens are no prefix's end
        scores = ending.scores(RunningPools(transformer.layout_), activations, is_scored)
        found[text] = _only(tokens, is_scored), scores
    n_truncated = sum(tokens.is_truncated for tokens, _ in found.values())
    if n_truncated:
        warn(
            f"{n_truncated} of {len(found)} texts are longer than max_length="
            f"{transformer.max_length} tokens, or than the model has positions, and were "
            "truncated: tokens after the cut have no scores. Set long_texts='windows' to read them."
        )
    return ending.gather([found[text] for text in texts.to_list()])


def split_pipeline(pipeline: Any, caller: str) -> tuple[LLMActivationTransformer, Ending]:
    """Prune a fitted pipeline, if possible, and split it after its activations."""
    pipeline = fitted_pipeline(pipeline, caller)
    if not any(isinstance(step, LLMActivationTransformer) for step in flatten(pipeline)):
        raise ValueError(
            f"{caller} needs a pipeline in which an LLMActivationTransformer is a step by itself, "
            "not inside a ColumnTransformer or FeatureUnion: other columns do not grow by token."
        )
    head = list(flatten(pipeline))[-1]
    if not any(hasattr(head, method) for method in _METHODS):
        raise ValueError(
            f"The pipeline ends in a {type(head).__name__}, which has neither decision_function "
            f"nor predict_proba. Use a classifier.{instead_of(head)}"
        )
    try:
        pipeline = prune(pipeline)
    except ValueError:  # A step needs all columns.
        pass
    steps = list(flatten(pipeline))
    at = next(i for i, step in enumerate(steps) if isinstance(step, LLMActivationTransformer))
    return steps[at], Ending(pipeline, steps[at], steps[at + 1 : -1], steps[-1])


@dataclass(frozen=True)
class Ending:
    """The steps of a pipeline after its activations."""

    pipeline: Any
    transformer: LLMActivationTransformer
    steps: list[Any]
    head: Any

    @property
    def methods(self) -> list[str]:
        """Which kinds of scores there are."""
        return [method for method in _METHODS if hasattr(self.head, method)]

    def scores(
        self,
        pools: RunningPools,
        activations: np.ndarray,  # (n_tokens, n_columns)
        is_scored: np.ndarray,  # (n_tokens,), bool
    ) -> dict[str, np.ndarray]:  # by method, (n_scored, n_decision_values or n_classes)
        """Pool more tokens, and score the prefixes that end with some of them."""
        size = max(1, _MOST_VALUES // activations.shape[1])
        parts: dict[str, list[np.ndarray]] = {method: [] for method in self.methods}
        for start in range(0, len(activations), size):
            chunk = slice(start, start + size)
            rows = pools.add(activations[chunk])[is_scored[chunk]]
            if len(rows):
                X = self._transform(rows)
                for method, values in parts.items():
                    values.append(_as_matrix(getattr(self.head, method)(X)))
        return {method: _stack(values) for method, values in parts.items()}

    def _transform(self, rows: np.ndarray) -> Any:
        X: Any = ActivationArray(rows, self.transformer.layout_)
        X = _wrap_data_with_container("transform", X, rows, self.transformer)  # set_output
        for step in self.steps:
            X = step.transform(X)
        return X

    def join(
        self, found: list[tuple[TextTokens, dict[str, np.ndarray]]], text: str
    ) -> tuple[TextTokens, dict[str, np.ndarray]]:
        """Join the tokens and scores of the stretches of one text."""
        parts = [tokens for tokens, _ in found]
        columns = [[part.starts, part.ends, part.messages] for part in parts]
        places = np.hstack([np.empty((3, 0), int), *map(np.stack, columns)])  # (3, n_tokens)
        scores = {m: _stack([part[m] for _, part in found if len(part[m])]) for m in self.methods}
        is_truncated = any(part.is_truncated for part in parts)
        names = [token for part in parts for token in part.tokens]
        starts, ends, messages = places
        return TextTokens(text, names, starts, ends, messages, is_truncated), scores

    def gather(self, found: list[tuple[TextTokens, dict[str, np.ndarray]]]) -> PrefixScores:
        """Put texts' scores together; a text without tokens has none."""
        classes = np.asarray(classes_of(self.head))
        tables: dict[str, list[np.ndarray]] = {}
        for method in self.methods:
            parts = [scores[method] for _, scores in found]
            shared = method == "decision_function" and len(classes) == 2
            width = max(part.shape[1] for part in parts) or (1 if shared else len(classes))
            if width != len(classes) and not (shared and width == 1):
                raise ValueError(
                    f"{method} of {type(self.head).__name__} gives {width} values for "
                    f"{len(classes)} classes; one for each is needed. Set "
                    "decision_function_shape='ovr' if it has that parameter."
                )
            tables[method] = [part if len(part) else np.empty((0, width)) for part in parts]
        tokens = [tokens for tokens, _ in found]
        decision_values, probabilities = (tables.get(method) for method in _METHODS)
        return PrefixScores(tokens, decision_values, probabilities, classes)


class RunningPools:
    """The poolings of a text after each of its tokens, updated as tokens arrive."""

    def __init__(self, layout: Layout):
        self.n_tokens = 0
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
            self._last[columns] = _RUNNING[pooling](values, self._last[columns], self.n_tokens)
            rows[:, columns] = values
        self.n_tokens += len(activations)
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
    last = most.astype(np.float32) if n_before else np.full(len(most), -np.inf, np.float32)
    for row in values:
        last = np.maximum(last, row, out=row)
    return last


def _running_first(values: np.ndarray, first: np.ndarray, n_before: int) -> np.ndarray:
    values[:] = first if n_before else values[0]
    return values[0]


def _running_last(values: np.ndarray, last: np.ndarray, n_before: int) -> np.ndarray:
    return last


_RUNNING = {
    "mean": _running_mean,
    "max": _running_max,
    "first": _running_first,
    "last": _running_last,
}


def _as_matrix(values: Any) -> np.ndarray:
    """Write scores as (n_prefixes, n_values); those of several outputs side by side."""
    if isinstance(values, list):
        # Of an output of two classes the second one's, as `classes_of` names them.
        return np.hstack([part[:, 1:] if part.shape[1] == 2 else part for part in values])
    values = np.asarray(values)
    return values.reshape(len(values), -1)


def _stack(parts: list[np.ndarray]) -> np.ndarray:
    return np.vstack(parts) if parts else np.empty((0, 0))


def _only(tokens: TextTokens, chosen: np.ndarray) -> TextTokens:
    """Choose tokens (n_tokens,), bool."""
    names = [token for token, wanted in zip(tokens.tokens, chosen, strict=True) if wanted]
    places = (tokens.starts[chosen], tokens.ends[chosen], tokens.messages[chosen])
    return TextTokens(tokens.text, names, *places, tokens.is_truncated)
