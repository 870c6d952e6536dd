"""Turn texts into the activations of a frozen language model's layers."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import TransformerMixin
from sklearn.utils.validation import check_is_fitted

from skspin._layout import POOLINGS, SITES, STACKS, ActivationArray, Layout
from skspin._model import Recipe, Source, extract, fingerprint, model_shape
from skspin._pickling import DetachedModel, ModelSharingEstimator, shallow_copy
from skspin._sklearn import HasMethods, Hidden, Interval, StrOptions, _fit_context, diagram_block
from skspin._store import DTYPES, Output, open_output, open_store
from skspin._system import warn
from skspin._texts import TextChunks, open_texts

# Parameters that decide how a text is read. `fit` copies them into `text_params_`, so a later
# `set_params` has no effect before the next `fit`.
_TEXT_PARAMS = ("prompt", "max_length", "long_texts", "overlap", "pool_over")


class LLMActivationTransformer(TransformerMixin, ModelSharingEstimator):
    """Turn texts into the inner activations of a frozen language model.

    Each text goes through the model once. Hidden states, feed-forward neurons or attention heads of
    the chosen layers are pooled over its tokens and returned side by side, as in SPIN [1]_.

    The model is never trained. Its weights are loaded when the first text needs them, once per
    process, device and dtype, and are shared by all estimators; a pickle does not hold them.
    Read more in the user guide, :doc:`/user_guide/choosing` and :doc:`/user_guide/scale`.

    The parameters are of three kinds:

    - *what is read*: ``model``, ``tokenizer``, ``revision``, ``site``, ``layers``, ``pooling``,
      ``stack``, ``prompt``, ``max_length``, ``long_texts``, ``overlap``, ``pool_over``;
    - *where it runs*: ``device``, ``dtype``, ``batch_tokens``, ``n_jobs``, ``verbose``,
      ``trust_remote_code``, ``model_kwargs``;
    - *what is kept*: ``cache``, ``store_dtype``, ``output_folder``.

    Parameters
    ----------
    model : str, path or PreTrainedModel, default="distilbert/distilbert-base-uncased"
        Hub id, local folder, GGUF file (``pip install "skspin[gguf]"``), or a loaded model. A
        loaded model (also one wrapped by PEFT) keeps its device and dtype, is shared by clones and
        left out of pickles, and needs ``tokenizer``. Of a loaded ``SentenceTransformer`` only the
        language model, the tokenizer and ``max_seq_length`` are used.
    tokenizer : str, path, tokenizer or None, default=None
        None takes the model's own.
    revision : str or None, default=None
        Branch, tag or commit of a hub model. Pin a commit where results must not change.
    site : {"hidden", "mlp", "attention"} or tuple of these, default="hidden"
        Where activations are read: "hidden" is the residual stream after a block, the same numbers
        as ``output_hidden_states=True``; "mlp" the feed-forward neurons after the non-linearity
        (and the gate), the input of the down-projection; "attention" the heads' outputs side by
        side, the input of the output projection.
    layers : int, sequence of int or None, default=None
        0 for the embeddings (which have hidden states only), i for block i; negative counts from
        the end. None for all. The forward pass stops after the deepest one.
    pooling : {"mean", "max", "first", "last"} or tuple of these, default="mean"
        How a text's tokens become one row. Padding never counts.
    stack : {"encoder", "decoder"} or tuple of both, default="encoder"
        Which half of an encoder-decoder model is read. "decoder" feeds the text to both halves,
        shifted right in the decoder. For other models it has no effect.
    prompt : str or None, default=None
        A template that holds ``{text}``, e.g. ``"Review: {text} Sentiment:"``.
    max_length : int, default=512
        The most tokens that the model reads at a time, special tokens and prompt included. If the
        model has fewer positions, their number is the limit.
    long_texts : {"truncate", "windows"}, default="truncate"
        How to read a text that has more tokens. "truncate" cuts off its end, with a warning
        (its beginning, if the tokenizer's ``truncation_side`` is "left"). "windows" reads all of it
        in stretches, each with the prompt and special tokens around it, and merges them: the mean
        over all their tokens, the largest of their maxima, the first token of the first window, the
        last of the last one. Time grows with the length, memory does not.
    overlap : int, default=0
        Tokens that neighbouring windows have in common. Each counts once, in the window where it
        has the longer context.
    pool_over : {"all", "text"}, str or tuple of str, default="all"
        Which tokens are pooled: "all", or "text" for those of the text alone, without special
        tokens and those of a prompt or chat template. In conversations, a role or several, e.g.
        ``("user", "assistant")``. For a text without tokens of its own, "text" pools all tokens.
    device : str, sequence of str or None, default=None
        Torch device; None takes a CUDA GPU where there is one, else the CPU; "mps" is Apple's GPU.
        Several, e.g. ``["cuda:0", "cuda:1"]``, share the work: each holds a copy of the model and
        is kept busy by a thread.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        The model's number format. "auto" is bfloat16 where the device multiplies it natively (CUDA
        compute capability 8 and up, CPUs with AMX), float32 elsewhere, and for a loaded model its
        own. Pooling adds up in float32 and the output is float32 in any case.
    batch_tokens : int or "auto", default="auto"
        Tokens that go through the model at a time, padding included. On a CPU, batches that run
        side by side share this number. It changes speed and memory, not results.
    cache : "memory", path or None, default="memory"
        Where activations are kept so that no text goes through the model twice: in this process, in
        a folder that processes share, or nowhere.
    store_dtype : {"float32", "float16"}, default="float32"
        The format of stored activations. "float16" takes half the memory, or disk, and rounds all
        activations to three significant digits, also those just computed, so that a text has the
        same row whether it was stored or not; a value beyond 65,504 is an error. The output is
        float32 in any case. Contributions and scores of tokens are neither stored nor rounded.
    output_folder : path or None, default=None
        A folder for output that is larger than memory: :meth:`transform` then writes a file there
        and returns it mapped into memory, read-only. The same texts and columns go to the same
        file. If ``cache`` is a folder too, an interrupted call continues where it stopped when it
        is repeated.
    n_jobs : int or None, default=None
        Number of workers that share the work, each with a copy of the model: processes on CPUs, or
        whatever ``joblib.parallel_config`` sets, e.g. a Dask cluster. None is 1 outside of such a
        context. Only the calling process uses ``cache``, and the output is the same. Leave it None
        if a search runs in processes (``GridSearchCV(n_jobs=4)``): transform the texts once before,
        with ``cache`` set to a folder, and no process of the search loads the model.
    verbose : int, default=0
        1 shows a progress bar. scikit-learn's callbacks follow the selector only.
    trust_remote_code : bool, default=False
        Whether a hub model may run Python code of its own. That code can do anything.
    model_kwargs : dict or None, default=None
        Passed on to ``from_pretrained``, e.g. ``{"attn_implementation": "sdpa"}``.

    Attributes
    ----------
    layout_ : Layout
        Which column is which.
    n_layers_ : int
        Number of blocks of the model.
    model_fingerprint_ : str
        Identifies the model's weights and its tokenizer.
    revision_ : str or None
        The commit of a hub model.
    text_params_ : dict
        ``prompt``, ``max_length``, ``long_texts``, ``overlap`` and ``pool_over`` at the last
        ``fit``, which stay in effect until the next ``fit``.

    See Also
    --------
    SalientNeuronSelector : Selects among the columns, layer by layer.
    make_spin_pipeline : Both, and a classifier.

    References
    ----------
    .. [1] Jiao et al., "SPIN: Sparsifying and Integrating Internal Neurons in Large Language Models
       for Text Classification", Findings of ACL 2024, :arxiv:`2311.15983`.

    Examples
    --------
    >>> from skspin import LLMActivationTransformer
    >>> from skspin.datasets import demo_model
    >>> transformer = LLMActivationTransformer(
    ...     demo_model(), layers=[0, -1], dtype="float32"
    ... )
    >>> X = transformer.fit_transform(["A fine film.", "A waste of time."])
    >>> X.shape
    (2, 768)
    >>> transformer.get_feature_names_out()[[0, -1]].tolist()
    ['layer0_hidden_mean_0', 'layer6_hidden_mean_383']
    """

    _parameter_constraints: dict = {
        "model": [
            str,
            os.PathLike,
            HasMethods(["forward", "named_modules"]),
            Hidden(DetachedModel),
        ],
        "tokenizer": [str, os.PathLike, callable, None],
        "revision": [str, None],
        "site": [StrOptions(set(SITES)), tuple, list],
        "layers": [Integral, "array-like", None],
        "pooling": [StrOptions(set(POOLINGS)), tuple, list],
        "stack": [StrOptions(set(STACKS)), tuple, list],
        "prompt": [str, None],
        "max_length": [Interval(Integral, 1, None, closed="left")],
        "long_texts": [StrOptions({"truncate", "windows"})],
        "overlap": [Interval(Integral, 0, None, closed="left")],
        "pool_over": [str, tuple, list],
        "device": [str, list, tuple, None],
        "dtype": [StrOptions({"auto", "float32", "bfloat16", "float16"})],
        "batch_tokens": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "cache": [str, os.PathLike, None],
        "store_dtype": [StrOptions(set(DTYPES))],
        "output_folder": [str, os.PathLike, None],
        "n_jobs": [
            Interval(Integral, 1, None, closed="left"),
            Interval(Integral, None, -1, closed="right"),
            None,
        ],
        "verbose": ["verbose"],
        "trust_remote_code": ["boolean"],
        "model_kwargs": [dict, None],
    }

    def __init__(
        self,
        model="distilbert/distilbert-base-uncased",
        *,
        tokenizer=None,
        revision=None,
        site="hidden",
        layers=None,
        pooling="mean",
        stack="encoder",
        prompt=None,
        max_length=512,
        long_texts="truncate",
        overlap=0,
        pool_over="all",
        device=None,
        dtype="auto",
        batch_tokens="auto",
        cache="memory",
        store_dtype="float32",
        output_folder=None,
        n_jobs=None,
        verbose=0,
        trust_remote_code=False,
        model_kwargs=None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.revision = revision
        self.site = site
        self.layers = layers
        self.pooling = pooling
        self.stack = stack
        self.prompt = prompt
        self.max_length = max_length
        self.long_texts = long_texts
        self.overlap = overlap
        self.pool_over = pool_over
        self.device = device
        self.dtype = dtype
        self.batch_tokens = batch_tokens
        self.cache = cache
        self.store_dtype = store_dtype
        self.output_folder = output_folder
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.trust_remote_code = trust_remote_code
        self.model_kwargs = model_kwargs

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y=None):
        """Find out the model's layers and lay out the columns; no weights are loaded.

        Parameters
        ----------
        X : list, tuple, array, Series or one-column frame of str or conversations
            Texts, which are checked; nothing is learnt from them.
        y : None
            Ignored.

        Returns
        -------
        self : LLMActivationTransformer
            The fitted transformer.

        Raises
        ------
        TypeError, ValueError
            If ``X`` is no container of texts, the model can't be found, or it does not have a layer
            or site asked for.
        """
        if self.long_texts == "windows" and self.overlap >= self.max_length:
            raise ValueError(
                f"overlap={self.overlap} must be less than max_length={self.max_length}, the "
                "length of a window. Use a smaller overlap."
            )
        text_params = {name: getattr(self, name) for name in _TEXT_PARAMS}
        recipe = self._recipe(open_texts(X).conversations, text_params)
        shape = model_shape(recipe.source, recipe.fingerprint, open_store(self.cache))
        layout = shape.layout(
            stack=self.stack, site=self.site, layers=self.layers, pooling=self.pooling
        )
        self.layout_ = replace(layout, model=recipe.fingerprint)
        self.n_layers_ = shape.n_layers
        self.model_fingerprint_ = recipe.fingerprint
        self.revision_ = recipe.source.commit
        self.text_params_ = text_params
        return self

    def transform(self, X):
        """Compute the activations of texts, or look them up in the store.

        Parameters
        ----------
        X : list, tuple, array, Series or one-column frame of str or conversations
            Texts, or another container of them with a length, such as a column of a
            ``datasets.Dataset``, which is read in chunks. A conversation is a list of messages,
            ``{"role": "user", "content": "Hello."}``, and is written by the tokenizer's chat
            template. A text without tokens, even special ones, gets the activations of the
            tokenizer's BOS, CLS, EOS or padding token, the first of these that it has.

        Returns
        -------
        ndarray of shape (n_texts, n_columns), float32
            Activations, ordered by layer, site, pooling and neuron. The array also carries its
            layout, which :class:`SalientNeuronSelector` reads.

        Raises
        ------
        NotFittedError
            If ``fit`` was not called.
        TypeError, ValueError
            If ``X`` is no container of texts, a device or folder can't be used, or an activation
            is not finite (float16 can overflow) or too large for ``store_dtype``.
        MemoryError
            If a single text does not fit into the memory of the device.
        OSError
            If the file in ``output_folder`` can't be written, e.g. because the disk is full.
        ModelMismatchError
            If the model's weights or tokenizer have changed since ``fit``.
        """
        check_is_fitted(self, "layout_")
        texts = open_texts(X)
        recipe = self._fitted_recipe(texts.conversations)
        shape = (len(texts), self.layout_.n_columns)
        key = f"{recipe.key}{self.layout_}{self.store_dtype}"
        with open_output(self.output_folder, shape, key) as output:
            self._fill(texts, recipe, output)
        return ActivationArray(output.matrix, self.layout_)

    def get_feature_names_out(self, input_features=None):
        """Name the columns, e.g. ``layer3_hidden_mean_412``.

        Parameters
        ----------
        input_features : None
            Ignored; there for scikit-learn.

        Returns
        -------
        names : ndarray of shape (n_columns,), object
            In the order of the columns.
        """
        check_is_fitted(self, "layout_")
        return self.layout_.feature_names()

    def _recipe(self, conversations: bool, text_params: dict[str, Any]) -> Recipe:
        """Gather what decides the numbers, and how they are computed."""
        pool_over = _check_text_params(conversations, text_params)
        source = self._source()
        max_length = min(text_params["max_length"], source.longest or text_params["max_length"])
        return Recipe(
            source,
            fingerprint(source, open_store(self.cache)),
            **text_params | {"max_length": max_length, "pool_over": pool_over},
            conversations=conversations,
            device=self.device,
            dtype=self.dtype,
            batch_tokens=self.batch_tokens,
            n_jobs=self.n_jobs,
            verbose=self.verbose,
        )

    def _source(self) -> Source:
        """Say where the model comes from."""
        if isinstance(self.model, DetachedModel):
            raise ValueError(
                f"model={self.model!r}: a model that is passed in memory is left out of pickles. "
                "Pass it again with set_params(model=...), or fit with a folder or hub id."
            )
        return Source(
            self.model,
            tokenizer=self.tokenizer,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            model_kwargs=self.model_kwargs,
        )

    def _fill(self, texts: TextChunks, recipe: Recipe, output: Output) -> None:
        """Take rows from the store, and compute and store those that it lacks, chunk by chunk."""
        store, start, n_computed, n_truncated = open_store(self.cache), 0, 0, 0
        for chunk in texts:
            rows = output.matrix[start : start + len(chunk)]
            start += len(chunk)
            named = {"model": recipe.model_name, "dtype": self.store_dtype}
            for missing in store.look_up(recipe.key, chunk, self.layout_, rows, **named):
                n_computed += len(missing.texts)
                for found in extract(recipe, missing.texts, missing.layout):
                    missing.add(found.positions, found.values)
                    n_truncated += found.n_truncated
            output.add_texts(chunk)
        if n_truncated:
            warn(
                f"{n_truncated} of {n_computed} texts are longer than max_length="
                f"{recipe.max_length} tokens, or than the model has positions, and were truncated. "
                "Set long_texts='windows' to read all of them."
            )

    def _restrict_to(self, columns: np.ndarray) -> LLMActivationTransformer:
        """Copy this transformer, sharing the model, to one that returns only some columns."""
        narrowed = shallow_copy(self)
        narrowed.layout_ = self.layout_.select(columns)
        return narrowed

    def _fitted_recipe(self, conversations: bool) -> Recipe:
        recipe = self._recipe(conversations, self.text_params_)
        recipe.check_fingerprint(self.model_fingerprint_)
        return recipe

    def __getstate__(self):
        """Say which model in memory is left out: joblib's Memory takes equal pickles for equal."""
        state = super().__getstate__()
        if state["model"] is not self.model:
            with suppress(TypeError, ValueError):  # no model, or one that can't be told from others
                state["model"].fingerprint = fingerprint(self._source())
        return state

    def _sk_visual_block_(self):
        facts = _layout_facts(self.layout_) if hasattr(self, "layout_") else []
        return diagram_block(self, [self._model_name, *facts])

    def __sklearn_tags__(self):
        """Tell scikit-learn that X is text."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


def _layout_facts(layout: Layout) -> list[str]:
    """Say which layers, sites and poolings a layout has, and how many columns."""
    layers = sorted({segment.layer for segment in layout.segments})
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    runs = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return [
        f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(runs)}",
        ", ".join(dict.fromkeys(segment.site for segment in layout.segments)),
        ", ".join(dict.fromkeys(segment.pooling for segment in layout.segments)),
        f"{layout.n_columns:,} columns",
    ]


def _check_text_params(conversations: bool, params: dict[str, Any]) -> str | tuple[str, ...]:
    """Check parameters against each other and the texts; return ``pool_over`` in one form."""
    prompt, overlap, over = params["prompt"], params["overlap"], params["pool_over"]
    if prompt is not None and "{text}" not in prompt:
        raise ValueError(
            f"prompt={prompt!r} has no place for the text. Write {{text}} where it goes."
        )
    if prompt is not None and conversations:
        raise ValueError(
            f"prompt={prompt!r}, but X holds conversations, which the tokenizer's chat "
            "template writes. Leave prompt=None, or pass texts."
        )
    if overlap and params["long_texts"] == "truncate":
        raise ValueError(
            f"overlap={overlap} is for windows, but long_texts='truncate'. Set "
            "long_texts='windows' or overlap=0."
        )
    if isinstance(over, str) and over in ("all", "text"):
        return over
    roles = (over,) if isinstance(over, str) else tuple(over)
    if not roles or not all(isinstance(role, str) for role in roles):
        raise ValueError(
            f"pool_over={over!r} must be 'all', 'text', a role of a conversation such as "
            "'user', or a tuple of roles."
        )
    if not conversations:
        raise ValueError(
            f"pool_over={over!r} names roles of conversations, but X holds texts. Use 'all' or "
            "'text'."
        )
    return tuple(sorted(set(roles)))
