"""The tokens of one text, and where in it they are."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

# Letters, digits and underscores, with apostrophes inside; any other mark is a word of its own.
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class TextTokens:
    """What a text became for the language model.

    Parameters
    ----------
    text : str
        The text, without the prompt around it.
    ids : ndarray of shape (n_tokens,), int
        What the model is given.
    tokens : list of str of length n_tokens
        As the tokenizer writes them, special tokens and the prompt's tokens included.
    starts, ends : ndarray of shape (n_tokens,), int
        Characters of ``text`` that each token stands for, the end not included; 0 and 0 for a
        token that is not in the text.
    """

    text: str
    ids: np.ndarray
    tokens: list[str]
    starts: np.ndarray
    ends: np.ndarray

    @property
    def in_text(self) -> np.ndarray:
        """True for tokens of the text itself, False for special tokens and the prompt's."""
        return self.ends > self.starts  # (n_tokens,)

    def surfaces(self) -> list[str]:
        """Write tokens as the text does; those that are not in it as the tokenizer does."""
        return [
            self.text[start:end].strip() if end > start else token
            for token, start, end in zip(self.tokens, self.starts, self.ends, strict=True)
        ]

    def words(self) -> np.ndarray:
        """Give each word a number, so that tokens of one word share a number.

        Returns
        -------
        ndarray of shape (n_tokens,), int
            Ascending from 0. A token belongs to the word in which it ends; one that is not in the
            text is a word of its own.
        """
        begins = [match.start() for match in _WORD.finditer(self.text)]
        # A token may take the space before its word with it, so its end says where it belongs.
        word = np.searchsorted(begins, self.ends, side="left")  # (n_tokens,)
        same = (word[1:] == word[:-1]) & self.in_text[1:] & self.in_text[:-1]
        return np.cumsum(np.concatenate([[False], ~same]))

    def merge(self, groups: np.ndarray) -> TextTokens:
        """Join neighbouring tokens that share a number.

        Parameters
        ----------
        groups : ndarray of shape (n_tokens,), int
            Ascending, as `words` gives them.
        """
        first = np.flatnonzero(np.diff(groups, prepend=-1))  # (n_groups,)
        ends = np.maximum.reduceat(self.ends, first)
        names = [self.tokens[i] for i in first]
        return TextTokens(self.text, self.ids[first], names, self.starts[first], ends)
