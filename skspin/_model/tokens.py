"""Texts to token ids: prompt, truncation, and what stands for a text without tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from skspin._texts import TextTokens

# Whose activations stand for a text without tokens: the first of these that a tokenizer has.
_STANDS_FOR_NOTHING = ("bos_token_id", "cls_token_id", "eos_token_id", "pad_token_id")
# Characters per token beyond which a text is surely too long. Its offsets, which cutting needs and
# which cost time, are asked for at once; a shorter one is tokenized again if it proves too long.
_SURELY_LONG = 8

TokenInputs = dict[str, np.ndarray]  # "input_ids", perhaps "token_type_ids": (n_tokens,), int32


class TextEncoder:
    """A tokenizer, which is left as it is, with its prompt and the most tokens of a text.

    A text that has more loses its last ones, or its first where the tokenizer's ``truncation_side``
    is "left"; special tokens and the prompt stay whole.
    """

    def __init__(self, tokenizer: Any, prompt: str | None = None, max_length: int = 512):
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_length = max_length
        self._fast = _bare_copy(tokenizer)
        self._has_types = "token_type_ids" in getattr(tokenizer, "model_input_names", ())

    def encode(self, texts: Sequence[str]) -> tuple[list[TokenInputs], np.ndarray]:
        """Tokenize texts; also say which of them lost tokens, (n_texts,) bool.

        Lone surrogates, which no tokenizer reads, count as U+FFFD.
        """
        texts = replace_surrogates(texts)
        if self._fast is None:
            rows = [self._encode_slow(text) for text in texts]
        else:
            rows = self._encode_fast(self._fast, texts)
        return [inputs for inputs, _ in rows], np.array([cut for _, cut in rows], dtype=bool)

    def locate(self, text: str) -> tuple[TokenInputs, TextTokens]:
        """Tokenize one text as `encode` does, and say where in it each token is."""
        if self._fast is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not tell where in the text its tokens are. "
                "Use a fast tokenizer, one with a tokenizer.json."
            )
        [text] = replace_surrogates([text])
        encoding = self._fast.encode(self._fill(text))
        kept = self._kept(encoding, text)
        inputs = self._inputs(encoding.ids, encoding.type_ids, kept)
        ids = inputs["input_ids"]
        if not len(kept):
            names = [str(self.tokenizer.convert_ids_to_tokens(int(ids[0])))]
            return inputs, TextTokens(text, names, np.zeros(1, int), np.zeros(1, int))
        # Of a text that the prompt repeats, the first time counts as the text.
        begin = 0 if self.prompt is None else self.prompt.index("{text}")
        starts, ends = (np.array(encoding.offsets)[kept] - begin).clip(0, len(text)).T
        outside = np.array(encoding.special_tokens_mask, dtype=bool)[kept] | (starts == ends)
        starts, ends = np.where(outside, 0, starts), np.where(outside, 0, ends)
        return inputs, TextTokens(text, [encoding.tokens[i] for i in kept], starts, ends)

    def _fill(self, text: str) -> str:
        return text if self.prompt is None else self.prompt.replace("{text}", text)

    def _inputs(
        self, ids: Sequence[int], types: Sequence[int], kept: Any = slice(None)
    ) -> TokenInputs:
        """Put what the model takes of a text's tokens into arrays."""
        inputs = {"input_ids": np.asarray(ids, dtype=np.int32)[kept]}
        if not len(inputs["input_ids"]):
            inputs["input_ids"] = np.array([self._stand_in()], dtype=np.int32)
            types, kept = [0], slice(None)
        if self._has_types:
            inputs["token_type_ids"] = np.asarray(types, dtype=np.int32)[kept]
        return inputs

    def _encode_fast(self, fast: Tokenizer, texts: list[str]) -> list[tuple[TokenInputs, bool]]:
        long = [i for i, text in enumerate(texts) if len(text) > _SURELY_LONG * self.max_length]
        short = sorted(set(range(len(texts))) - set(long))
        rows: dict[int, tuple[TokenInputs, bool]] = {}
        filled = [self._fill(texts[i]) for i in short]
        for i, found in zip(short, fast.encode_batch_fast(filled), strict=True):
            if len(found.ids) > self.max_length:
                long.append(i)
            else:
                types = found.type_ids if self._has_types else ()
                rows[i] = self._inputs(found.ids, types), False
        filled = [self._fill(texts[i]) for i in long]
        for i, found in zip(long, fast.encode_batch(filled), strict=True):
            kept = self._kept(found, texts[i])
            rows[i] = self._inputs(found.ids, found.type_ids, kept), len(kept) < len(found.ids)
        return [rows[i] for i in range(len(texts))]

    def _kept(self, encoding: Encoding, text: str) -> np.ndarray:
        """Say which tokens are kept of a filled prompt that may be too long."""
        places = np.arange(len(encoding.ids))
        excess = len(places) - self.max_length
        if excess <= 0:
            return places
        of_text = ~np.array(encoding.special_tokens_mask, dtype=bool)  # (n_tokens,)
        if self.prompt is not None and self.prompt.count("{text}") == 1:
            begin = self.prompt.index("{text}")
            starts, ends = np.array(encoding.offsets).T
            of_text &= (ends > begin) & (starts < begin + len(text))
        if of_text.sum() <= excess:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for text: prompt and special tokens "
                f"take {(~of_text).sum()}. Use a larger max_length or a shorter prompt."
            )
        left = self.tokenizer.truncation_side == "left"
        dropped = places[of_text][:excess] if left else places[of_text][-excess:]
        return np.delete(places, dropped)

    def _encode_slow(self, text: str) -> tuple[TokenInputs, bool]:
        found = self._tokenize(self._fill(text))
        cut = len(found["input_ids"]) > self.max_length
        if cut:
            found = self._tokenize_short(text)
        types = found.get("token_type_ids") or [0] * len(found["input_ids"])
        return self._inputs(found["input_ids"], types), cut

    def _tokenize_short(self, text: str) -> Any:
        """Tokenize what fits of a text that is too long."""
        if self.prompt is None:
            return self.tokenizer(text, truncation=True, max_length=self.max_length)
        # Without offsets the tokens of the text are not known, but its longest start that fits is.
        kept = bisect_right(
            range(len(text) + 1),
            self.max_length,
            key=lambda n_characters: len(
                self._tokenize(self._fill(text[:n_characters]))["input_ids"]
            ),
        )
        if kept <= 1:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for text beside the prompt. Use a "
                "larger max_length or a shorter prompt."
            )
        return self._tokenize(self._fill(text[: kept - 1]))

    def _tokenize(self, text: str) -> Any:
        return self.tokenizer(text, verbose=False)

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
    """Copy the Rust part of a tokenizer, without truncation and padding; None if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # They are settings of the object, left over from whatever was called last, and another thread
    # that uses it may change them at any time.
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def replace_surrogates(texts: Sequence[str]) -> list[str]:
    """Replace lone surrogates by U+FFFD, and two that make a pair by their character."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
    return list(texts)
