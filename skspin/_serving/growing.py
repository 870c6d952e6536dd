"""Scores of one text that arrives in pieces, and a guard on what a model generates."""

from __future__ import annotations

from typing import Any

import numpy as np

from skspin._model import open_growing_text
from skspin._pipeline import flatten
from skspin._serving.prefixes import Crossing, PrefixHead, PrefixScores, RunningPools
from skspin._system import warn
from skspin._texts import Speller, TextTokens, open_texts


class PrefixScorer:
    """Scores of one text that arrives in pieces, each token read once.

    The model keeps what it has read in its key-value cache, so a token's time is about the same
    however long the text is. Scores are those of :func:`score_prefixes`, and do not depend on how
    the text was cut: strings are tokenized as a whole, so the last word is held back until the
    next one begins (or ``final=True``); token ids are taken as they come. Read more in the user
    guide, :doc:`/user_guide/growing`.

    Parameters
    ----------
    pipeline : Pipeline
        Fitted, as for :func:`score_prefixes`, with no steps before its activations.
    conversation : list of dict or None, default=None
        None for a text. For a message of a conversation, the messages before it, maybe an empty
        list: what is pushed is the next message.
    role : str, default="assistant"
        Whose message grows.

    Raises
    ------
    TypeError, ValueError
        As :func:`score_prefixes` does; also if the model has no key-value cache, or the pipeline
        has steps before its activations.

    See Also
    --------
    score_prefixes : All prefixes of whole texts.
    PrefixStreamer : Scores what ``generate`` of transformers writes, and can stop it.

    Notes
    -----
    A text longer than ``max_length`` goes on in windows or is truncated, as ``long_texts`` says;
    the tokens that are cut off have no scores, and there is one warning. Only one thread at a time
    may use a scorer.

    The text's end and what follows it in the prompt may be one token, such as ``."``, which leaves
    a window room for another token. Only ``final=True`` tells, when windows have been cut already.
    So from the second window on, such a text's scores are not those of :func:`score_prefixes`.
    With a prompt that ends with ``{text}`` they always are.

    Examples
    --------
    A small untrained decoder, with the demo model's tokenizer; see
    :func:`score_prefixes`.

    >>> from transformers import AutoTokenizer, LlamaConfig, LlamaModel
    >>> from skspin import PrefixScorer, make_spin_pipeline
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
    >>> scorer = PrefixScorer(spin.set_params(select__C=1.0).fit(texts, labels))
    >>> for piece in ("A love", "ly fi", "lm."):
    ...     scorer.push(piece).tokens[0].surfaces()
    ['A']
    ['lovely']
    []
    >>> scorer.push("", final=True).tokens[0].surfaces()
    ['film', '.']
    >>> value = spin.decision_function(["A lovely film."])[0]
    >>> bool(abs(scorer.scores.decision_values[0][-1, 0] - value) < 1e-4)
    True
    """

    def __init__(self, pipeline, conversation=None, *, role="assistant"):
        self._head = PrefixHead(pipeline, "PrefixScorer")
        self._transformer = self._head.transformer
        first = next(flatten(self._head.pipeline))
        if first is not self._transformer:
            raise ValueError(
                f"The pipeline begins with a {type(first).__name__}, which takes whole texts, but "
                "PrefixScorer gives it pieces. Pass a pipeline that begins with its activations."
            )
        self._growing: Any = None
        self._conversation = self._role = None
        self.reset(conversation, role=role)

    def reset(self, conversation=None, *, role=None):
        """Begin another text.

        Parameters
        ----------
        conversation : list of dict or None, default=None
            As in the constructor; None for the same messages as before, or again for a text.
        role : str or None, default=None
            Whose message grows; None for the same.

        Returns
        -------
        self : PrefixScorer
            The scorer, which has read nothing of the new text.
        """
        conversation = self._conversation if conversation is None else conversation
        role = self._role if role is None else role
        is_text = conversation is None
        if not is_text:
            open_texts([[*conversation, {"role": role, "content": ""}]])  # or raise
        if self._growing is None or is_text != (self._conversation is None):
            recipe = self._transformer._fitted_recipe(conversations=not is_text)
            self._growing = open_growing_text(recipe, self._transformer.layout_)
        self._growing.begin([dict(message) for message in conversation or ()], role)
        self._conversation, self._role = conversation, role
        self._pools = RunningPools(self._transformer.layout_)
        self._kind: type | None = None  # of pieces
        self._is_final = False
        self._names: list[str] = []  # of tokens
        self._places: list[tuple[int, int, int]] = []  # of tokens: start, end, message
        self._scores: list[dict[str, np.ndarray]] = []
        return self

    def push(self, piece, *, final=False):
        """Take a piece of the text, and score the tokens that are new.

        Parameters
        ----------
        piece : str, int, or list, array or Tensor of int
            The text's next characters, or its next token ids (of the pipeline's own tokenizer).
        final : bool, default=False
            Whether the text ends here; then no word is held back.

        Returns
        -------
        scores : PrefixScores
            Of one text: the new tokens, if any, with their positions in the whole text.

        Raises
        ------
        TypeError, ValueError
            If the piece is neither text nor ids, is of another kind than earlier pieces of the
            text, or comes after the text has ended.
        """
        if self._is_final:
            raise ValueError("The text has ended with final=True. Begin another with reset().")
        ids = None if isinstance(piece, str) else _as_ids(piece)
        kind = str if ids is None else int
        if self._kind not in (None, kind):
            raise TypeError(
                f"piece is a {type(piece).__name__}, but this text came as {self._kind.__name__} "
                "so far. Push either strings or token ids, or begin another with reset()."
            )
        growing, was_cut = self._growing, self._growing.is_cut
        added = growing.add_text(piece, final) if ids is None else growing.add_ids(ids, final)
        self._kind, self._is_final = kind, final
        tokens = added.tokens
        scores = self._head.scores(self._pools, added.activations, added.is_own)
        self._names += tokens.tokens
        self._places += zip(tokens.starts, tokens.ends, tokens.messages, strict=True)
        self._scores += scores
        if growing.is_cut and not was_cut:
            warn(
                f"The text is longer than max_length={growing.max_length} tokens, or "
                "than the model has positions: further tokens have no scores. Set "
                "long_texts='windows' to go on."
            )
        return self._head.gather([(tokens, scores)])

    @property
    def n_tokens(self) -> int:
        """Number of tokens that have scores so far."""
        return len(self._names)

    @property
    def text(self) -> str:
        """The text pushed so far, including a word that is held back."""
        return self._growing.text

    @property
    def scores(self) -> PrefixScores:
        """The scores of all tokens so far, as those of one text."""
        starts, ends, messages = np.array(self._places, int).reshape(-1, 3).T
        is_cut = self._growing.is_cut
        text, names = self._growing.clean_text, [*self._names]
        tokens = TextTokens(text, names, starts, ends, messages, is_cut)
        return self._head.gather([(tokens, self._scores)])


class PrefixStreamer:
    """Scores a text while ``generate`` of transformers writes it, and can stop it at a threshold.

    Pass it as ``streamer``, and in ``stopping_criteria`` if it is to stop the text:
    ``model.generate(**inputs, streamer=guard, stopping_criteria=[guard])``. Each call of
    ``generate`` is a new text; the prompt and special tokens are not part of it. After a call that
    an error has interrupted, call :meth:`end`. Read more in the user guide,
    :doc:`/user_guide/growing`.

    Parameters
    ----------
    scorer : PrefixScorer
        It computes the scores, and holds the text and its ``scores`` afterwards.
    tokenizer : PreTrainedTokenizerBase
        Of the model that generates. If its vocabulary differs from the scorer's, the ids are
        decoded, and the scorer tokenizes the text, so it holds the last word back.
    threshold : float or None, default=None
        The score at which generation stops; with None it does not stop.
    label : class label, default=None
        Whose score; None for the second of two classes.
    response_method : {"auto", "decision_function", "predict_proba"}, default="auto"
        Which score; "auto" for decision values, or probabilities if there are none.

    Attributes
    ----------
    crossing_ : Crossing or None
        The token at which the score reached the threshold, as ``first_crossing`` returns it.

    See Also
    --------
    PrefixScorer : The same for pieces from elsewhere.

    Examples
    --------
    A small untrained decoder writes, and is stopped at once; the pipeline is as in
    :class:`PrefixScorer`.

    >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    >>> from skspin import PrefixScorer, PrefixStreamer, make_spin_pipeline
    >>> from skspin.datasets import demo_model
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64}
    >>> layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    >>> config = LlamaConfig(vocab_size=30522, **sizes, **layers)
    >>> model = LlamaForCausalLM(config)
    >>> tokenizer = AutoTokenizer.from_pretrained(demo_model())
    >>> good = ["A fine film.", "Lovely.", "What a joy."]
    >>> bad = ["A bore.", "Dreadful.", "It drags."]
    >>> texts, labels = (good + bad) * 2, [1, 1, 1, 0, 0, 0] * 2
    >>> spin = make_spin_pipeline(model, tokenizer=tokenizer, pool_over="text")
    >>> scorer = PrefixScorer(spin.set_params(select__C=1.0).fit(texts, labels))
    >>> guard = PrefixStreamer(scorer, tokenizer, threshold=-1e6)
    >>> prompt = tokenizer("What a", return_tensors="pt")["input_ids"]
    >>> written = model.generate(
    ...     prompt,
    ...     max_new_tokens=5,
    ...     streamer=guard,
    ...     stopping_criteria=[guard],
    ...     pad_token_id=0,
    ... )
    >>> written.shape[1] - prompt.shape[1], guard.crossing_.token
    (1, 0)
    """

    def __init__(self, scorer, tokenizer, threshold=None, label=None, *, response_method="auto"):
        if not isinstance(scorer, PrefixScorer):
            raise TypeError(f"scorer is a {type(scorer).__name__}, not a PrefixScorer(pipeline).")
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.threshold = threshold
        self.label = label
        self.response_method = response_method
        least = 0 if threshold is None else threshold
        scorer.scores.first_crossing(least, label, response_method=response_method)  # or raise
        known = scorer._growing.tokenizer
        self._shares_ids = known is tokenizer or known.get_vocab() == tokenizer.get_vocab()
        self._n_given = self._n_read = 0  # ids, the prompt's included; none is read before a prompt
        self._n_axes = 0  # of the last ids that came
        self.crossing_ = None

    def put(self, value):
        """Take the prompt's ids, or the next ones, from ``generate``.

        Parameters
        ----------
        value : Tensor of shape (1, n_tokens) or (n_tokens,), int
            Token ids.

        Raises
        ------
        ValueError
            If ``generate`` writes several texts at once.
        """
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(
                f"generate writes {len(value)} texts at once, but a PrefixStreamer scores one. "
                "Call generate with one prompt, and num_return_sequences=1."
            )
        # A prompt has two axes, and what follows it mostly has one. So two after one are the prompt
        # of another call, and the last one was interrupted.
        is_prompt = not self._n_read or value.ndim > self._n_axes
        self._n_axes = value.ndim
        ids = value.reshape(-1).tolist()
        if is_prompt:
            self.scorer.reset()
            self._speller = None if self._shares_ids else Speller(self.tokenizer)
            self.crossing_ = None
            self._n_given = self._n_read = len(ids)
            return
        self._n_given += len(ids)
        if self._n_given > self._n_read:
            self._read(ids[self._n_read - self._n_given :])

    def __call__(self, input_ids, scores, **kwargs):
        """Tell ``generate``, which may ask before it gives the last ids, whether to stop."""
        import torch

        if not self._n_read:
            raise ValueError(
                "A PrefixStreamer in stopping_criteria has to be the streamer, too: pass "
                "streamer=guard, stopping_criteria=[guard] to generate."
            )
        self._read(input_ids[0, self._n_read :].tolist())
        return torch.full((len(input_ids),), self.crossing_ is not None, device=input_ids.device)

    def end(self):
        """Score what was held back; ``generate`` has ended."""
        if self._n_read:
            self._push([] if self._speller is None else self._speller.end(), final=True)
        self._n_read = 0

    def _read(self, ids: list[int]) -> None:
        self._n_read += len(ids)
        special = set(self.tokenizer.all_special_ids)
        ids = [token for token in ids if token not in special]
        if self._speller is not None:
            self._push("".join(self._speller.add(token) for token in ids))
        elif ids:
            self._push(ids)

    def _push(self, piece: Any, *, final: bool = False) -> None:
        scores = self.scorer.push(piece, final=final)
        if self.threshold is None or self.crossing_ is not None:
            return
        options = {"response_method": self.response_method}
        crossing = scores.first_crossing(self.threshold, self.label, **options)[0]
        if crossing is not None:
            n_before = self.scorer.n_tokens - len(scores.tokens[0].tokens)
            self.crossing_ = Crossing(n_before + crossing.token, crossing.end, crossing.score)


def _as_ids(piece: Any) -> np.ndarray:
    """Take token ids (n_tokens,) in any form."""
    ids = np.asarray(piece.cpu() if hasattr(piece, "cpu") else piece)
    if ids.ndim > 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(
            f"piece is a {type(piece).__name__}, but a str is needed, a token id, or a list, 1-D "
            "array or Tensor of them."
        )
    return ids.reshape(-1).astype(int)
