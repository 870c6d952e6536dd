"""Texts and conversations as people pass them, and the tokens that a text became."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

# Texts read at a time: about as many as are sorted by length together, so chunks cost no speed.
_CHUNK = 16_384
_ALLOWED = (
    "a list, tuple, 1-D array, pandas, polars or pyarrow Series of str (or of conversations, lists "
    "of messages), a one-column frame, or "
    "another container with a length, such as a column of a datasets.Dataset"
)
# Letters, digits and underscores, with apostrophes inside; any other mark is a word of its own.
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def open_texts(X: Any) -> TextChunks:
    """Open a container of texts or conversations, to be read a chunk at a time as plain str.

    The items of a container that is not in memory are checked when they are read.
    """
    if isinstance(X, TextChunks):
        return X
    if isinstance(X, str | bytes):
        raise TypeError(
            f"X is a single {type(X).__name__}, but {_ALLOWED} is needed. Wrap one text in a list: "
            "[text]."
        )
    X = _only_column(X)
    readable = hasattr(X, "__iter__") or hasattr(X, "__getitem__")
    if isinstance(X, dict | set | frozenset) or not (hasattr(X, "__len__") and readable):
        is_iterator = hasattr(X, "__next__")
        advice = " It can be read only once: make a list of it, list(X)." if is_iterator else ""
        raise TypeError(f"X is a {type(X).__name__}, but {_ALLOWED} is needed.{advice}")
    n_texts = len(X)
    if not n_texts:
        raise ValueError("X holds no text (0 samples), but at least one is needed.")
    in_memory = _as_list(X)
    first: Any = next(iter(X if in_memory is None else in_memory), None)
    conversations = _is_conversation(first.as_py() if hasattr(first, "as_py") else first)  # Arrow's
    if in_memory is not None:
        return TextChunks(n_texts, conversations, None, _check(in_memory, 0, conversations))
    return TextChunks(n_texts, conversations, X)


@dataclass(frozen=True)
class TextChunks:
    """Texts in order, as lists: one list if all are in memory, else one for each chunk read.

    A conversation is written as JSON.
    """

    n_texts: int
    conversations: bool
    container: Any  # not in memory; None if `texts` holds all of them
    texts: list[str] | None = None

    def __len__(self) -> int:
        """Count the texts."""
        return self.n_texts

    def __iter__(self) -> Iterator[list[str]]:
        """Read the texts from the first on."""
        if self.texts is not None:
            yield self.texts
            return
        start = end = 0
        for part in _read(self.container, self.n_texts):
            end = start + len(part)
            if end > self.n_texts:
                break
            yield _check(part, start, self.conversations)
            start = end
        if end != self.n_texts:
            raise ValueError(
                f"X says that it holds {self.n_texts} texts, but gives {end}"
                f"{' or more' if end > self.n_texts else ''}. Its __len__ must count what its "
                "__iter__ gives."
            )

    def distinct(self) -> TextChunks:
        """Read all texts into memory, without repetitions."""
        texts = list(dict.fromkeys(self.to_list()))
        return TextChunks(len(texts), self.conversations, None, texts)

    def to_list(self) -> list[str]:
        """Read all texts into memory."""
        return [text for chunk in self for text in chunk]


def _is_conversation(item: Any) -> bool:
    return isinstance(item, list | tuple | np.ndarray)


def _check(items: list[Any], start: int, conversations: bool) -> list[str]:
    """Turn a chunk into plain str, or raise an error that says which item is wrong."""
    if conversations:
        return [_to_json(item, f"X[{at}]") for at, item in enumerate(items, start)]
    for position, text in enumerate(items, start):
        if not isinstance(text, str):
            raise ValueError(
                f"X[{position}] is a {type(text).__name__} ({_shorten(text)}), but every text must "
                f"be a str. {_advice(text)}"
            )
    # Subclasses, such as numpy.str_, are not the tokenizers' kind of str; str(text) would give the
    # name of a member of an Enum.
    return [str.__str__(text) for text in items]


def _to_json(conversation: Any, at: str) -> str:
    """Write a conversation as JSON; equal conversations give equal strings."""
    if _is_conversation(conversation) and not len(conversation):
        raise ValueError(
            f"{at} is an empty {type(conversation).__name__}, but a conversation has at least one "
            "message, such as {'role': 'user', 'content': 'Hello.'}. Leave it out."
        )
    if not _is_conversation(conversation):
        raise ValueError(
            f"{at} is a {type(conversation).__name__} ({_shorten(conversation)}), but X[0] is a "
            "conversation, so every item must be one: a list of messages, such as "
            "[{'role': 'user', 'content': 'Hello.'}]. Pass texts and conversations in calls of "
            "their own."
        )
    for number, message in enumerate(conversation):
        said = message if isinstance(message, Mapping) else {}
        if not all(isinstance(said.get(name), str) for name in ("role", "content")):
            raise ValueError(
                f"{at}[{number}] is {_shorten(message)}, but a message must be a dict with the str "
                "'role' and 'content', such as {'role': 'user', 'content': 'Hello.'}. If X holds "
                "texts, pass each as a str, not in a list."
            )
    try:
        messages = [dict(message) for message in conversation]
        return json.dumps(messages, ensure_ascii=False, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"{at} holds what can't be written as JSON: {error}.") from error


def _read(X: Any, n_texts: int) -> Iterator[list[Any]]:
    """Read a container's items in chunks: by slices if it has them, which is quicker."""
    if _can_slice(X):
        for start in range(0, n_texts, _CHUNK):
            part = X[start : start + _CHUNK]
            yield part.to_pylist() if hasattr(part, "to_pylist") else list(part)
        return
    items = iter(X)
    while part := list(islice(items, _CHUNK)):
        yield part


def _can_slice(X: Any) -> bool:
    """Whether slices give several texts at once."""
    try:
        part = X[:0]
    except Exception:  # A user's container may raise anything.
        return False
    return hasattr(part, "__len__") and not isinstance(part, str) and len(part) == 0


def _only_column(X: Any) -> Any:
    """Return the only column of a frame or 2-D array, and any other container as it is."""
    shape = getattr(X, "shape", None)
    if not isinstance(shape, tuple) or len(shape) == 1:
        return X
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.size and isinstance(X.flat[0], Mapping):
        return list(X)  # conversations of equally many messages
    if len(shape) != 2 or shape[1] != 1:
        raise ValueError(
            f"X has shape {shape}, but texts are one column. Select it, e.g. X['text'], or give "
            "each text column a transformer of its own in a ColumnTransformer."
        )
    if isinstance(X, np.ndarray):
        return X[:, 0]
    if hasattr(X, "iloc"):  # pandas
        return X.iloc[:, 0]
    if hasattr(X, "column_names"):  # pyarrow, datasets
        return X[X.column_names[0]]
    return X[X.columns[0]]  # polars


def _as_list(X: Any) -> list[Any] | None:
    """List the items of a container that is in memory; None if it may be on disk."""
    if isinstance(X, list | tuple):
        return list(X)
    for method in ("tolist", "to_list"):  # numpy and pandas, polars
        if hasattr(X, method) and not hasattr(X, "to_pylist"):  # pyarrow has both
            return getattr(X, method)()
    return None


def _shorten(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _advice(text: Any) -> str:
    if isinstance(text, Mapping):
        return "If X is one conversation, wrap it in a list: [conversation]."
    if _is_conversation(text):
        return "X[0] is a text; pass texts and conversations in calls of their own."
    if isinstance(text, bytes):
        return 'Decode it first, e.g. text.decode("utf-8").'
    if is_missing(text):
        return 'Drop or fill missing texts, e.g. X.fillna("").'
    return "Convert it first, e.g. with str(text)."


def is_missing(value: Any) -> bool:
    """Whether a value stands for none, as None, NaN and pandas' NA and NaT do."""
    named = value is None or type(value).__name__ in ("NAType", "NaTType")
    return named or (isinstance(value, float) and value != value)


@dataclass(frozen=True)
class TextTokens:
    """The tokens that the language model reads for a text.

    Parameters
    ----------
    text : str
        The text, without the prompt around it; a conversation as the chat template writes it.
    tokens : list of str of length n_tokens
        As the tokenizer writes them, special tokens and the prompt's tokens included.
    starts, ends : ndarray of shape (n_tokens,), int
        Characters of ``text`` that each token stands for, the end not included; 0 and 0 for a
        token that is not in the text. Some tokenizers give a token of blanks only its end.
    messages : ndarray of shape (n_tokens,), int
        Number of the message of a conversation that each token belongs to, 0 for a plain text; -1
        for special tokens and those of a prompt or a chat template.
    is_truncated : bool, default=False
        Whether the text has more tokens than the model was given.
    """

    text: str
    tokens: list[str]
    starts: np.ndarray
    ends: np.ndarray
    messages: np.ndarray
    is_truncated: bool = False

    @property
    def in_text(self) -> np.ndarray:
        """True for tokens that the text shows: not special ones, the prompt's, or blanks' ends."""
        return self.ends > self.starts  # (n_tokens,)

    def surfaces(self) -> list[str]:
        """Write each token as the text does, or as the tokenizer does if it is not in the text."""
        return [
            self.text[start:end].strip() if end > start else token
            for token, start, end in zip(self.tokens, self.starts, self.ends, strict=True)
        ]

    def words(self) -> np.ndarray:
        """Give the number of each token's word, (n_tokens,) int, ascending from 0.

        A token belongs to the word in which it ends; if it is not in the text, it is its own word.
        """
        begins = [match.start() for match in _WORD.finditer(self.text)]
        # A token may begin with the space before its word, so its end says where it belongs.
        word = np.searchsorted(begins, self.ends, side="left")  # (n_tokens,)
        same = (word[1:] == word[:-1]) & self.in_text[1:] & self.in_text[:-1]
        return np.cumsum(np.concatenate([[False], ~same]))

    def merge(self, groups: np.ndarray, values: np.ndarray) -> tuple[TextTokens, np.ndarray]:
        """Join the tokens of each group, (n_tokens,) ascending numbers, and add up their values."""
        first = np.flatnonzero(np.diff(groups, prepend=-1))  # (n_groups,)
        ends = np.maximum.reduceat(self.ends, first)
        names = [self.tokens[i] for i in first]
        starts, messages = self.starts[first], self.messages[first]
        merged = TextTokens(self.text, names, starts, ends, messages, self.is_truncated)
        return merged, np.add.reduceat(values, first)


class Speller:
    """Writes token ids as text, one by one; a character of several tokens comes with its last."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those that the next one's spelling may depend on
        self._n_written = 0  # of these

    def add(self, token: int) -> str:
        """Give the characters that a token adds."""
        self._ids.append(token)
        added = self.end()
        if not added or added.endswith("\ufffd"):
            return ""
        self._ids = self._ids[self._n_written :]
        self._n_written = len(self._ids)
        return added

    def end(self) -> str:
        """Give the characters that wait for more tokens: a U+FFFD may be part of another one."""
        written = self._tokenizer.decode(self._ids[: self._n_written])
        return self._tokenizer.decode(self._ids)[len(written) :]


def tabulate(
    parts: Sequence[TextTokens], classes: np.ndarray, name: str, values: Sequence[np.ndarray]
) -> Any:
    """Make a pandas frame with a row per text, token and class from each text's values."""
    import pandas as pd

    n_classes = len(classes)
    frames = [
        pd.DataFrame(
            {
                "text": number,
                "token": np.repeat(part.surfaces(), n_classes),
                "start": np.repeat(part.starts, n_classes),
                "end": np.repeat(part.ends, n_classes),
                "class": np.tile(classes, len(part.tokens)),
                name: scores.ravel(),  # (n_tokens * n_classes,)
            }
        )
        for number, (part, scores) in enumerate(zip(parts, values, strict=True))
    ]
    return pd.concat(frames, ignore_index=True)
