"""Turn texts into the activations of a frozen language model's layers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import TransformerMixin
from sklearn.utils.validation import check_is_fitted

from skspin._column_choice import POOLINGS, STACKS, choose_columns
from skspin._diagram import diagram_block, layout_facts, model_name
from skspin._layout import ActivationArray
from skspin._model.files import Source
from skspin._model.frozen import FrozenModel, Truncation
from skspin._model.shape import SITES
from skspin._pickling import shallow_copy
from skspin._shared_model import DetachedModel, ModelSharingEstimator
from skspin._sklearn import HasMethods, Interval, StrOptions, _fit_context
from skspin._store import open_store
from skspin._store.digest import text_digest
from skspin._store.output import fill_file
from skspin._store.recall import recall_or_compute
from skspin._text_tokens import TextTokens
from skspin._texts import open_texts


class LLMActivationTransformer(TransformerMixin, ModelSharingEstimator):
    """Turn texts into the inner activations of a frozen language model.

    Each text goes once through the model. Hidden states, feed-forward neurons and attention heads
    of every layer asked for are pooled over its tokens and come out side by side, as in SPIN [1]_.

    The model is never trained. Its weights are loaded when the first text needs them, once per
    process, device and dtype, and are shared by all estimators; they are no part of a pickle.

    Parameters
    ----------
    model : str, path or PreTrainedModel, default="distilbert/distilbert-base-uncased"
        Hub id, local folder, GGUF file (``pip install "skspin[gguf]"``), or a loaded model. A
        loaded model (a PEFT-wrapped one too) is used where it is and as it is, shared by clones,
        and left out of pickles; it needs ``tokenizer``. Of a loaded ``SentenceTransformer`` the
        language model, the tokenizer and ``max_seq_length`` are used, not what comes after them.
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
        shifted right in the decoder. Other models have no choice here.
    prompt : str or None, default=None
        A template that holds ``{text}``, e.g. ``"Review: {text} Sentiment:"``.
    max_length : int, default=512
        The most tokens per text, special tokens included; what is beyond is cut off, with a
        warning. A model that has fewer positions cuts there.
    device : str, sequence of str or None, default=None
        Torch device; None takes a GPU where there is one. Several, e.g. ``["cuda:0", "cuda:1"]``,
        share the work: each holds a copy of the model and is kept busy by a thread.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        The model's number format. "auto" is bfloat16 where the device multiplies it natively (CUDA
        compute capability 8 and up, CPUs with AMX), float32 elsewhere, and for a loaded model its
        own. Pooling adds up in float32 and the output is float32 in any case.
    batch_tokens : int or "auto", default="auto"
        Tokens per batch, padding included. It changes speed and memory, not results.
    cache : "memory", path or None, default="memory"
        Where activations are kept so that no text goes through the model twice: in this process, in
        a folder that processes share, or nowhere.
    output_folder : path or None, default=None
        Where the output goes if it is larger than memory: :meth:`transform` then writes a file in
        this folder and gives it back mapped into memory, read-only. The same texts and columns go
        to the same file. With ``cache`` set to a folder too, a call that was broken off goes on
        where it was.
    n_jobs : int or None, default=None
        Number of workers that share the work, each with a copy of the model: processes on CPUs, or
        whatever ``joblib.parallel_config`` sets, e.g. a Dask cluster. None is 1 outside of such a
        context. Only the calling process uses ``cache``, and the output is the same. Leave it alone
        in a search that has processes of its own: transform the texts once with ``cache`` set to a
        folder, and then no process of the search loads the model.
    verbose : int, default=0
        1 shows a progress bar.
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
    >>> transformer = LLMActivationTransformer(demo_model(), layers=[0, -1], dtype="float32")
    >>> X = transformer.fit_transform(["A fine film.", "A waste of time."])
    >>> X.shape
    (2, 768)
    >>> transformer.get_feature_names_out()[[0, -1]].tolist()
    ['layer0_hidden_mean_0', 'layer6_hidden_mean_383']
    """

    _parameter_constraints: dict = {
        "model": [str, os.PathLike, HasMethods(["forward", "named_modules"]), DetachedModel],
        "tokenizer": [str, os.PathLike, callable, None],
        "revision": [str, None],
        "site": [StrOptions(set(SITES)), tuple, list],
        "layers": [Integral, "array-like", None],
        "pooling": [StrOptions(set(POOLINGS)), tuple, list],
        "stack": [StrOptions(set(STACKS)), tuple, list],
        "prompt": [str, None],
        "max_length": [Interval(Integral, 1, None, closed="left")],
        "device": [str, list, tuple, None],
        "dtype": [StrOptions({"auto", "float32", "bfloat16", "float16"})],
        "batch_tokens": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "cache": [str, os.PathLike, None],
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
        device=None,
        dtype="auto",
        batch_tokens="auto",
        cache="memory",
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
        self.device = device
        self.dtype = dtype
        self.batch_tokens = batch_tokens
        self.cache = cache
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
        X : list, tuple, array, Series or one-column frame of str
            Texts; checked, and not learnt from.
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
        open_texts(X)
        self._check_prompt()
        model = self._frozen_model()
        shape = model.shape
        self.layout_ = choose_columns(
            shape, stack=self.stack, site=self.site, layers=self.layers, pooling=self.pooling
        )
        self.n_layers_ = shape.n_layers
        self.model_fingerprint_ = model.fingerprint
        self.revision_ = model.source.commit
        return self

    def transform(self, X):
        """Compute the activations of texts, or recall them where they are stored.

        Parameters
        ----------
        X : list, tuple, array, Series or one-column frame of str
            Texts, or another container of them with a length, such as a column of a
            ``datasets.Dataset``, which is read in chunks. A text that tokenizes to nothing, not
            even special tokens, gets the activations of the tokenizer's BOS, CLS, EOS or padding
            token, whichever is there first.

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
            is not finite, as float16 can overflow.
        MemoryError
            If a single text does not fit into the memory of the device.
        OSError
            If the file in ``output_folder`` can't be written, e.g. because the disk is full.
        ModelMismatchError
            If the model's weights or tokenizer have changed since ``fit``.
        """
        check_is_fitted(self, "layout_")
        texts = open_texts(X)
        model = self._frozen_model()
        model.refuse_unless(self.model_fingerprint_)
        truncation = Truncation(model.max_length)
        identity = hashlib.blake2b(f"{model.context}{self.layout_}".encode(), digest_size=16)
        # Only a file is named by its texts.
        chunks = texts if self.output_folder is None else _digested(texts, identity)

        def fill(out: np.ndarray) -> None:
            recall_or_compute(
                chunks,
                self.layout_,
                out,
                context=model.context,
                store=model.store,
                extract=partial(model.extract, truncation=truncation),
                model=model.name,
            )

        shape = (len(texts), self.layout_.n_columns)
        if self.output_folder is None:
            fill(values := np.empty(shape, dtype=np.float32))
        else:
            values = fill_file(self.output_folder, shape, fill, name=identity.hexdigest)
        truncation.warn()
        return ActivationArray(values, self.layout_)

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

    def _frozen_model(self) -> FrozenModel:
        """Name the model for the backbone registry, which owns the weights."""
        if isinstance(self.model, DetachedModel):
            raise ValueError(
                f"model={self.model!r}: a model that is passed in memory is left out of pickles. "
                "Pass it again with set_params(model=...), or fit with a folder or hub id."
            )
        source = Source(
            self.model,
            tokenizer=self.tokenizer,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            model_kwargs=self.model_kwargs,
        )
        return FrozenModel(
            source,
            open_store(self.cache),
            device=self.device,
            dtype=self.dtype,
            prompt=self.prompt,
            max_length=min(self.max_length, source.longest or self.max_length),
            batch_tokens=self.batch_tokens,
            n_jobs=self.n_jobs,
            verbose=self.verbose,
        )

    def _restrict_to(self, columns: np.ndarray) -> LLMActivationTransformer:
        """Copy this transformer, the model shared, to one that gives only some of its columns."""
        narrowed = shallow_copy(self)
        narrowed.layout_ = self.layout_.keep(columns)
        return narrowed

    def _read_tokens(self, texts: Sequence[str]) -> Iterator[tuple[str, TextTokens, np.ndarray]]:
        """Compute activations (n_tokens, n_columns) at each token of each distinct text."""
        model = self._frozen_model()
        model.refuse_unless(self.model_fingerprint_)
        return model.read_tokens(texts, self.layout_.segments)

    def _check_prompt(self) -> None:
        if self.prompt is not None and "{text}" not in self.prompt:
            raise ValueError(
                f"prompt={self.prompt!r} has no place for the text. Write {{text}} where it goes."
            )

    def _sk_visual_block_(self):
        facts = layout_facts(self.layout_) if hasattr(self, "layout_") else []
        return diagram_block(self, [model_name(self.model), *facts])

    def __sklearn_tags__(self):
        """Tell scikit-learn that X is text."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


def _digested(chunks: Iterable[list[str]], identity: Any) -> Iterator[list[str]]:
    """Pass texts on, and update a digest with them."""
    for texts in chunks:
        for text in texts:
            identity.update(text_digest(text))
        yield texts
