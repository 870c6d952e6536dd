"""Texts to token ids: prompt, truncation, and texts that have no tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

# Whose activations stand for a text without tokens: the first of these that a tokenizer has.
_STANDS_FOR_NOTHING = ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id")


class TextEncoder:
    """A tokenizer with its prompt and its longest text.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Left as it is.
    prompt : str or None, default=None
        Template; ``{text}`` is where the text goes.
    max_length : int, default=512
        Tokens that are kept of a text, special tokens included.
    """

    def __init__(self, tokenizer: Any, prompt: str | None = None, max_length: int = 512) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_length = max_length
        # A copy, because truncation and padding are settings of the object, and another thread
        # or an earlier call may have set them.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = None if backend is None else Tokenizer.from_str(backend.to_str())
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """Tokenize texts.

        Parameters
        ----------
        texts : sequence of str
            Any length; lone surrogates count as U+FFFD, the replacement character.

        Returns
        -------
        ids : list of ndarray of shape (n_tokens,), int32
            Special tokens included; at least one token each.
        n_truncated : int
            Number of texts that were longer than `max_length`.
        """
        texts = replace_surrogates(texts)
        if self.prompt is not None:
            texts = [self.prompt.replace("{text}", text) for text in texts]
        encode = self._encode_slow if self._fast is None else self._encode_fast
        rows, n_truncated = encode(texts)
        return [np.asarray(ids or [self._nothing()], dtype=np.int32) for ids in rows], n_truncated

    def _encode_fast(self, texts: list[str]) -> tuple[list[list[int]], int]:
        assert self._fast is not None
        rows = [encoding.ids for encoding in self._fast.encode_batch_fast(texts)]
        room = self.max_length - self._fast.num_special_tokens_to_add(False)
        long = [i for i, ids in enumerate(rows) if len(ids) > self.max_length]
        for i in long:
            encoding = self._fast.encode(texts[i], add_special_tokens=False)
            encoding.truncate(max(room, 0), direction=self.tokenizer.truncation_side)
            rows[i] = self._fast.post_process(encoding).ids[: self.max_length]
        return rows, len(long)

    def _encode_slow(self, texts: list[str]) -> tuple[list[list[int]], int]:
        rows = [self.tokenizer(text, verbose=False)["input_ids"] for text in texts]
        long = [i for i, ids in enumerate(rows) if len(ids) > self.max_length]
        for i in long:
            rows[i] = self.tokenizer(texts[i], truncation=True, max_length=self.max_length)[
                "input_ids"
            ]
        return rows, len(long)

    def _nothing(self) -> int:
        for name in _STANDS_FOR_NOTHING:
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return token
        raise ValueError(
            "A text has no tokens, and the tokenizer has no BOS, CLS, EOS or padding token to "
            "stand for it. Give the tokenizer one, e.g. tokenizer.eos_token = ..., or drop empty texts."
        )


def replace_surrogates(texts: Sequence[str]) -> list[str]:
    """Replace lone surrogates, which no tokenizer can read, by U+FFFD.

    Two surrogates that make a pair become the character that they stand for.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
    return list(texts)
