"""Texts to token ids: prompt, truncation, and what stands for a text without tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from skspin._text_tokens import TextTokens

# Whose activations stand for a text without tokens: the first of these that a tokenizer has.
_STANDS_FOR_NOTHING = ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id")


class TextEncoder:
    """A tokenizer with its prompt and the most tokens that a text may have.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Left as it is.
    prompt : str or None, default=None
        Template; ``{text}`` is where a text goes. Braces in texts mean nothing.
    max_length : int, default=512
        Tokens per text, special tokens and prompt included. A text that has more loses its last
        ones (or its first, where the tokenizer's ``truncation_side`` is "left"); special tokens and
        the prompt stay whole.
    """

    def __init__(self, tokenizer: Any, prompt: str | None = None, max_length: int = 512):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_length = max_length
        self._fast = _bare_copy(tokenizer)

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Tokenize texts.

        Parameters
        ----------
        texts : sequence of str of length n_texts
            Whatever they hold. Lone surrogates, which no tokenizer reads, count as U+FFFD.

        Returns
        -------
        ids : list of ndarray of shape (n_tokens,), int32
            Special tokens included. Where there is none at all, one special token stands in.
        truncated : ndarray of shape (n_texts,), bool
            Which texts lost tokens.
        """
        encode = self._encode_slow if self._fast is None else self._encode_fast
        ids, truncated = encode(replace_surrogates(texts))
        return [
            np.asarray(row if len(row) else [self._stand_in()], dtype=np.int32) for row in ids
        ], truncated

    def _fill(self, text: str) -> str:
        return text if self.prompt is None else self.prompt.replace("{text}", text)

    def _encode_fast(self, texts: list[str]) -> tuple[list[list[int]], np.ndarray]:
        assert self._fast is not None
        ids = [e.ids for e in self._fast.encode_batch_fast([self._fill(text) for text in texts])]
        truncated = np.array([len(row) > self.max_length for row in ids], dtype=bool)
        long = np.flatnonzero(truncated)
        # Once more, with offsets, which cost time that short texts need not spend.
        encodings = self._fast.encode_batch([self._fill(texts[i]) for i in long])
        for i, encoding in zip(long, encodings, strict=True):
            ids[i] = np.array(encoding.ids)[self._kept(encoding, texts[i])].tolist()
        return ids, truncated

    def locate(self, text: str) -> TextTokens:
        """Tokenize one text as `encode` does, and say where in it each token is.

        Parameters
        ----------
        text : str
            Lone surrogates come back as U+FFFD.
        """
        if self._fast is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not tell where in the text its tokens are. "
                "Use a fast tokenizer, one with a tokenizer.json."
            )
        [text] = replace_surrogates([text])
        encoding = self._fast.encode(self._fill(text))
        kept = self._kept(encoding, text)
        if not len(kept):
            stand_in = self._stand_in()
            name = str(self.tokenizer.convert_ids_to_tokens(stand_in))
            return TextTokens(
                text, np.array([stand_in]), [name], np.zeros(1, int), np.zeros(1, int)
            )
        # Of a text that the prompt repeats, the first time counts as the text.
        begin = 0 if self.prompt is None else self.prompt.index("{text}")
        starts, ends = (np.array(encoding.offsets)[kept] - begin).clip(0, len(text)).T
        outside = np.array(encoding.special_tokens_mask, dtype=bool)[kept] | (starts == ends)
        return TextTokens(
            text,
            np.array(encoding.ids)[kept],
            [encoding.tokens[i] for i in kept],
            np.where(outside, 0, starts),
            np.where(outside, 0, ends),
        )

    def _span(self, text: str) -> tuple[int, int] | None:
        """Say which characters of a filled prompt are the text; None where all of them are."""
        if self.prompt is None or self.prompt.count("{text}") != 1:
            return None
        start = self.prompt.index("{text}")
        return start, start + len(text)

    def _kept(self, encoding: Encoding, text: str) -> np.ndarray:
        """Say which tokens are kept of a filled prompt that may be too long."""
        places = np.arange(len(encoding.ids))
        excess = len(places) - self.max_length
        if excess <= 0:
            return places
        of_text = ~np.array(encoding.special_tokens_mask, dtype=bool)  # (n_tokens,)
        if (span := self._span(text)) is not None:
            starts, ends = np.array(encoding.offsets).T
            of_text &= (ends > span[0]) & (starts < span[1])
        if of_text.sum() <= excess:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for text: prompt and special tokens "
                f"take {(~of_text).sum()}. Use a larger max_length or a shorter prompt."
            )
        left = self.tokenizer.truncation_side == "left"
        dropped = places[of_text][:excess] if left else places[of_text][-excess:]
        return np.delete(places, dropped)

    def _encode_slow(self, texts: list[str]) -> tuple[list[list[int]], np.ndarray]:
        ids = [self._tokenize(self._fill(text)) for text in texts]
        truncated = np.array([len(row) > self.max_length for row in ids], dtype=bool)
        for i in np.flatnonzero(truncated):
            ids[i] = self._shorten_slow(texts[i])
        return ids, truncated

    def _shorten_slow(self, text: str) -> list[int]:
        if self.prompt is None:
            return self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        # Without offsets the tokens of the text are not known, but its longest start that fits is.
        kept = bisect_right(
            range(len(text) + 1),
            self.max_length,
            key=lambda n_characters: len(self._tokenize(self._fill(text[:n_characters]))),
        )
        if kept <= 1:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for text beside the prompt. Use a "
                "larger max_length or a shorter prompt."
            )
        return self._tokenize(self._fill(text[: kept - 1]))

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def _stand_in(self) -> int:
        for name in _STANDS_FOR_NOTHING:
            token = getattr(self.tokenizer, name, None)
            if token is not None:
                return token
        raise ValueError(
            "A text has no tokens, and the tokenizer has no BOS, CLS, EOS or padding token to "
            "stand in. Give it one, e.g. tokenizer.eos_token = '</s>', or drop empty texts."
        )


def _bare_copy(tokenizer: Any) -> Tokenizer | None:
    """Copy the Rust part of a tokenizer, without truncation and padding; None if it has none.

    Truncation and padding are settings of the object, left over from whatever was called last, and
    may change under us when another thread uses it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def replace_surrogates(texts: Sequence[str]) -> list[str]:
    """Replace lone surrogates by U+FFFD; two that make a pair become the character they stand for.

    Parameters
    ----------
    texts : sequence of str
        Texts without surrogates come back as they are.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
    return list(texts)
