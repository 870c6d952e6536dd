"""Select salient neurons by sparse probes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import SelectorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from tqdm.auto import tqdm

from skspin._layout import LayerColumns, as_slice, find_layers, layers_from_names, layout_of
from skspin._model import usable_device
from skspin._pickling import VersionedState, pack_sparse, shallow_copy, unpack_sparse
from skspin._probes import (
    CRITERIA,
    SALIENCES,
    ProbeSettings,
    check_labels,
    encode_targets,
    fit_layers,
    is_tensor,
    most_salient,
    to_host,
    validation_rows,
)
from skspin._sklearn import (
    CallbackSupportMixin,
    Interval,
    StrOptions,
    _fit_context,
    diagram_block,
    get_namespace,
)
from skspin._system import warn

# Arrays with a value per neuron; under an L1 penalty nearly all values are zero.
_MOSTLY_ZERO = ("coef_", "salience_")


class SalientNeuronSelector(CallbackSupportMixin, SelectorMixin, VersionedState, BaseEstimator):
    """Select the neurons that sparse linear probes rely on, layer by layer.

    One L1-regularised logistic regression, the probe, is fitted to each layer's activations. A
    neuron's salience is its squared weight; each layer keeps the fewest neurons that together hold
    at least ``1 - sparsity`` of the layer's salience. This is the selection step of SPIN [1]_.
    Read more in the user guide, :doc:`/user_guide/how_it_works`.

    Parameters
    ----------
    sparsity : float in [0, 1), default=0.4
        How much is given up: larger keeps fewer neurons. SPIN's threshold eta is ``1 - sparsity``.
    criterion : {"salience", "count"}, default="salience"
        ``"salience"`` gives up that share of each layer's salience (SPIN's rule), ``"count"`` that
        share of each layer's neurons.
    C : float or sequence of float, default=0.1
        Inverse strength of the probes' regularisation, as in
        :class:`~sklearn.linear_model.LogisticRegression` with ``l1_ratio=1``. Of several values,
        each layer takes the one that scores best on a validation part of the training data.
    penalty : {"l1", "l2"}, default="l1"
        The probes' penalty. With "l2" no weight is exactly zero.
    salience : {"squared", "absolute"}, default="squared"
        How a probe's weights become salience; summed over classes.
    max_layer : int or None, default=None
        Use layers 0 to ``max_layer`` only, SPIN's "first l layers"; None for all. Searching over it
        needs no further pass through the language model.
    layer_sizes : "auto", int, sequence of int or None, default="auto"
        Where layers are. "auto" reads what :class:`LLMActivationTransformer` attached to its
        output, or a frame's column names, in whatever order the columns stand. Names may have the
        prefixes of a :class:`~sklearn.pipeline.FeatureUnion` or
        :class:`~sklearn.compose.ColumnTransformer`. Prefixes are ignored if names stay distinct
        without them and all poolings of a layer have the same width, e.g. if each branch has
        another pooling. Otherwise each prefix is a model of its own. An int is the number of
        columns of every layer, a sequence holds the number of columns of each; None takes all
        columns for one layer.
    standardize : bool, default=True
        Fit the probes on columns of mean 0 and variance 1. Salience compares neurons whose scales
        differ widely, so turn this off only for columns that share a scale already. In float32, a
        column whose standard deviation is 3,000 times smaller than its layer's median counts as
        constant, because it holds little but rounding (in float64: 7e7 times). The selected columns
        themselves are returned unchanged.
    class_weight : dict, list of dict, "balanced" or None, default=None
        Weights of classes, as in scikit-learn; "balanced" counts each text by its sample weight.
    validation_fraction : float in (0, 1), default=0.2
        Stratified share of the distinct rows, on which ``layer_scores_`` is measured and one of
        several values of ``C`` is chosen. Copies of a row and its label are either all among them
        or none.
    tol : float, default=1e-3
        Relative duality gap at which a probe is solved.
    max_iter : int, default=1000
        Steps after which an unsolved probe stops, with a ConvergenceWarning.
    device : str or None, default=None
        Where probes are solved: None for NumPy on the CPU, or a torch device such as "cuda". With
        scikit-learn's ``array_api_dispatch`` on, ``X`` may be a torch tensor: its probes are solved
        where it is, without a copy of it on the host. Fitted attributes are NumPy arrays all the
        same, and ``cache`` keeps none of these probes.
    cache : "memory" or None, default="memory"
        "memory" keeps solved probes in this process and finds them by their data and settings, so
        that a search over ``sparsity``, ``criterion``, ``salience`` or ``max_layer`` solves each
        probe once. None keeps nothing.
    random_state : int, RandomState or None, default=None
        Chooses the validation part. None chooses the same part every time, so that a search finds
        its probes again.
    verbose : int, default=0
        1 shows a progress bar over layers.

    Attributes
    ----------
    salience_ : ndarray of shape (n_features,)
        Salience of every column; 0 beyond ``max_layer``.
    support_ : ndarray of shape (n_features,), bool
        True for the selected columns.
    coef_ : ndarray of shape (1, n_features) or (n_classes, n_features)
        The probes' weights side by side, in standardised units where ``standardize`` is on.
    classes_ : ndarray of shape (n_classes,)
        Classes seen in ``fit``; for a multilabel indicator the labels' column numbers.
    layer_names_ : list of str
        Names of the layers used, one per probe; the attributes below are in this order.
    layer_columns_ : list of ndarray of int
        The columns of each layer used, ordered by pooling and neuron.
    layer_scores_ : ndarray of shape (n_layers,)
        Each probe's accuracy on the validation part, when fitted on the rest.
    n_selected_ : ndarray of shape (n_layers,), int
        Number of neurons selected in each layer.
    C_ : ndarray of shape (n_layers,)
        The value of ``C`` that each layer uses.
    dual_gap_ : ndarray of shape (n_layers,)
        The relative duality gap that each layer's probe reached; the largest over classes.
    n_iter_ : ndarray of shape (n_layers,), int
        Number of steps that each layer's probe took; the largest over classes.
    sparsity_ : float
        The share of columns that is dropped in the end.
    layout_ : Layout or None
        Which column is which, where ``X`` was an array that carries this.
    n_features_in_ : int
        Number of columns seen in ``fit``.
    feature_names_in_ : ndarray of shape (n_features,)
        Names of the columns seen in ``fit``, where ``X`` had any.

    See Also
    --------
    LLMActivationTransformer : Turns texts into the activations to select from.
    sklearn.feature_selection.SelectFromModel : Selects by one model over all columns.

    References
    ----------
    .. [1] Jiao et al., "SPIN: Sparsifying and Integrating Internal Neurons in Large Language Models
       for Text Classification", Findings of ACL 2024, :arxiv:`2311.15983`.

    Examples
    --------
    Two layers of five neurons each; one neuron in each of them bears on the answer.

    >>> import numpy as np
    >>> from skspin import SalientNeuronSelector
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(200, 10))
    >>> y = X[:, 1] + X[:, 7] > 0
    >>> selector = SalientNeuronSelector(sparsity=0.4, layer_sizes=5).fit(X, y)
    >>> selector.n_selected_
    array([1, 1])
    >>> selector.get_support(indices=True)
    array([1, 7])
    """

    _parameter_constraints: dict = {
        "sparsity": [Interval(Real, 0, 1, closed="left")],
        "criterion": [StrOptions(set(CRITERIA))],
        "C": [Interval(Real, 0, None, closed="neither"), "array-like"],
        "penalty": [StrOptions({"l1", "l2"})],
        "salience": [StrOptions(set(SALIENCES))],
        "max_layer": [Interval(Integral, 0, None, closed="left"), None],
        "layer_sizes": [
            StrOptions({"auto"}),
            Interval(Integral, 1, None, closed="left"),
            "array-like",
            None,
        ],
        "standardize": ["boolean"],
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "tol": [Interval(Real, 0, None, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "device": [str, None],
        "cache": [StrOptions({"memory"}), None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        sparsity=0.4,
        *,
        criterion="salience",
        C=0.1,
        penalty="l1",
        salience="squared",
        max_layer=None,
        layer_sizes="auto",
        standardize=True,
        class_weight=None,
        validation_fraction=0.2,
        tol=1e-3,
        max_iter=1000,
        device=None,
        cache="memory",
        random_state=None,
        verbose=0,
    ):
        self.sparsity = sparsity
        self.criterion = criterion
        self.C = C
        self.penalty = penalty
        self.salience = salience
        self.max_layer = max_layer
        self.layer_sizes = layer_sizes
        self.standardize = standardize
        self.class_weight = class_weight
        self.validation_fraction = validation_fraction
        self.tol = tol
        self.max_iter = max_iter
        self.device = device
        self.cache = cache
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None):
        """Fit a probe to each layer and select its salient neurons.

        Parameters
        ----------
        X : array-like of shape (n_texts, n_features)
            Activations, finite; layers are found as ``layer_sizes`` says.
        y : {array-like, sparse matrix} of shape (n_texts,) or (n_texts, n_labels)
            Binary or multiclass labels, or a multilabel indicator.
        sample_weight : array-like of shape (n_texts,), default=None
            Weights of the texts: a text of weight 2 counts as the same text twice, 0 leaves it out.

        Returns
        -------
        self : SalientNeuronSelector
            The fitted selector.

        Raises
        ------
        ValueError
            If the layers do not add up to the columns of ``X``, no layer is left by ``max_layer``,
            ``y`` has fewer than two classes or a row without a label, or a value of ``X`` is not
            finite or beyond 1e12.
        """
        layout = layout_of(X)
        check_labels(y)
        xp, _ = get_namespace(X)  # NumPy, unless scikit-learn dispatches by the array API
        # What is neither of these becomes the first: shorter numbers float32, all others float64.
        dtypes = [xp.float64, xp.float32]
        if getattr(getattr(X, "dtype", None), "itemsize", 8) < 4:
            dtypes.reverse()
        checks = {"dtype": dtypes, "multi_output": True, "ensure_min_samples": 2}
        with np.errstate(invalid="ignore"):  # scikit-learn sums all values, infinite ones too
            X, y = validate_data(self, X, y, **checks)
        y, sample_weight = to_host(y), to_host(sample_weight)
        names = getattr(self, "feature_names_in_", None)
        layers = find_layers(self.layer_sizes, layout, names, X.shape[1], self.max_layer)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, y, ensure_non_negative=True)
            if not sample_weight.any():  # scikit-learn says so itself from 1.8 on
                raise ValueError(
                    "sample_weight is 0 for every text, but must hold at least one non-zero number."
                    " Leave it out to weigh all texts alike."
                )
        targets = encode_targets(y, sample_weight, self.class_weight)
        # None is a fixed seed: with another split at every fit, a search would find no probe in the
        # cache.
        random_state = check_random_state(0 if self.random_state is None else self.random_state)
        validation = validation_rows(X, targets, self.validation_fraction, random_state)
        device, eps = self._resolve_device(X), float(xp.finfo(X.dtype).eps)
        settings = ProbeSettings(
            self._resolve_C(), self.penalty, self.standardize, self.tol, self.max_iter, device, eps
        )
        columns = (as_slice(layer.columns) for layer in self._follow(layers, X, y))
        fitted = fit_layers(X, columns, targets, validation, settings, use_cache=bool(self.cache))
        probes = list(fitted)

        self.layout_ = layout
        self.classes_ = targets.classes
        self.layer_names_ = [layer.name for layer in layers]
        self.layer_columns_ = [layer.columns for layer in layers]
        self.layer_scores_ = np.array([probe.score for probe in probes])
        self.C_ = np.array([probe.C for probe in probes])
        self.dual_gap_ = np.array([probe.dual_gap for probe in probes])
        self.n_iter_ = np.array([probe.n_iter for probe in probes])
        self.coef_ = np.zeros((targets.n_problems, X.shape[1]))
        for layer, probe in zip(layers, probes, strict=True):
            self.coef_[:, layer.columns] = probe.coef
        self._select()
        self._warn_of_gaps()
        return self

    def _follow(self, layers: list[LayerColumns], X: Any, y: Any) -> Iterator[LayerColumns]:
        """Iterate over layers with a progress bar and, from scikit-learn 1.9 on, callbacks."""
        bar = tqdm(layers, desc="probes", unit="layer", disable=not self.verbose)
        if not hasattr(self, "_init_callback_context"):
            yield from bar
            return
        fit = self._init_callback_context(max_subtasks=len(layers))
        fit.call_on_fit_task_begin(estimator=self, X=X, y=y)
        for layer in bar:
            task = fit.subcontext(task_name=layer.name)
            task.call_on_fit_task_begin(estimator=self, X=X, y=y)
            yield layer
            task.call_on_fit_task_end(estimator=self, X=X, y=y)
        fit.call_on_fit_task_end(estimator=self, X=X, y=y)

    def _resolve_device(self, X: Any) -> str | None:
        device = None if self.device is None else usable_device(self.device)
        if not is_tensor(X):
            return device
        if not hasattr(X, "is_cuda"):
            raise TypeError(
                f"X is a {type(X).__module__}.{type(X).__name__}, but beside NumPy arrays only "
                "torch tensors are taken. Convert X, e.g. by torch.from_dlpack(X)."
            )
        if device not in (None, str(X.device)):
            raise ValueError(
                f"device={self.device!r}, but X is on {str(X.device)!r} and stays there. Leave "
                "device=None."
            )
        return str(X.device)

    def _resolve_C(self) -> tuple[float, ...]:
        values = [self.C] if np.ndim(self.C) == 0 else list(self.C)
        if not values or not all(isinstance(C, Real) and 0 < float(C) < np.inf for C in values):
            raise ValueError(f"C={self.C!r} must be a positive number or a sequence of them.")
        return tuple(sorted({float(C) for C in values}))

    def _warn_of_gaps(self) -> None:
        behind = [
            f"{name} ({gap:.1e})"
            for name, gap in zip(self.layer_names_, self.dual_gap_, strict=True)
            if gap > self.tol
        ]
        if behind:
            more = f"max_iter={self.max_iter} or " if (self.n_iter_ >= self.max_iter).any() else ""
            warn(
                f"Probes stopped above the relative duality gap tol={self.tol}: "
                f"{', '.join(behind)}. Increase {more}tol, or lower C.",
                ConvergenceWarning,
            )

    def _select(self) -> None:
        self.salience_ = SALIENCES[self.salience](self.coef_).sum(axis=0)
        self.support_ = self._support_at(self.sparsity)
        if not self.support_.any():
            warn(
                f"No probe puts weight on any column at C={self.C!r}, so the first column is all "
                "that is selected. Try a larger C."
            )
            self.support_[self.layer_columns_[0][0]] = True
        self.n_selected_ = np.array([self.support_[taken].sum() for taken in self.layer_columns_])
        self.sparsity_ = float(1 - self.support_.mean())

    def _support_at(self, sparsity: float) -> np.ndarray:
        """Select at another sparsity from the same probes; nothing is fitted again."""
        support = np.zeros(self.salience_.shape, dtype=bool)
        for columns in self.layer_columns_:
            support[columns] = most_salient(self.salience_[columns], sparsity, self.criterion)
        return support

    def _restrict_to(self, columns: np.ndarray) -> SalientNeuronSelector:
        """Copy this selector for an input of only some columns, all of them selected ones."""
        narrowed = shallow_copy(self)
        for name in ("salience_", "support_", "coef_", "feature_names_in_"):
            if hasattr(self, name):
                setattr(narrowed, name, getattr(self, name)[..., columns])
        numbers = np.cumsum(columns) - 1  # of the columns that are left
        narrowed.layer_columns_ = [numbers[own[columns[own]]] for own in self.layer_columns_]
        narrowed.n_selected_ = np.array([columns[own].sum() for own in self.layer_columns_])
        if self.layout_ is not None:
            narrowed.layout_ = self.layout_.select(columns)
        narrowed.n_features_in_ = int(columns.sum())
        return narrowed

    def transform(self, X):
        """Take the selected columns.

        Parameters
        ----------
        X : array-like of shape (n_texts, n_features)
            Activations, with the same columns as in ``fit``.

        Returns
        -------
        X_selected : ndarray of shape (n_texts, n_selected)
            The selected columns, as they are in ``X``.

        Raises
        ------
        NotFittedError
            If ``fit`` was not called.
        ValueError
            If ``X`` has another number of columns than in ``fit``, or names other columns.
        """
        check_is_fitted(self, "support_")
        self._refuse_other_columns(X)
        return super().transform(X)

    def _refuse_other_columns(self, X: Any) -> None:
        given, known = layout_of(X), self.layout_
        if given == known:
            return  # if both are None, scikit-learn compares the names of frames
        names = getattr(X, "columns", ()) if given is None else given.feature_names()
        if given is None and layers_from_names(list(names)) is None:
            return  # scikit-learn warns of names where there were none in fit
        expected = getattr(self, "feature_names_in_", ())
        if known is not None:
            expected = known.feature_names()
        if len(names) != len(expected):
            return  # nothing to compare, or scikit-learn says so
        for column in np.flatnonzero(np.asarray(names) != expected)[:1]:
            raise ValueError(
                f"X has other columns than in fit: column {column} is {names[column]!r}, but was "
                f"{expected[column]!r}. Pass the output of the transformer that this selector was "
                "fitted behind, or fit it again."
            )

    def _get_support_mask(self) -> np.ndarray:
        check_is_fitted(self, "support_")
        return self.support_

    def _transform(self, X):
        # scikit-learn indexes with the mask: 112 ms for 3,200 x 18,432, of which this takes 16.
        columns = self.get_support(indices=True)
        if isinstance(X, np.ndarray):
            return X.take(columns, axis=1)
        return X[:, columns] if hasattr(X, "is_cuda") else super()._transform(X)

    def __getstate__(self):
        """Write only weights that are not zero, and neighbouring columns as a slice."""
        state = super().__getstate__()
        state |= {name: pack_sparse(state[name]) for name in _MOSTLY_ZERO if name in state}
        if "layer_columns_" in state:
            state["layer_columns_"] = list(map(as_slice, state["layer_columns_"]))
        return state

    def __setstate__(self, state):
        """Read weights and columns back into arrays."""
        state = dict(state)
        state |= {name: unpack_sparse(**state[name]) for name in _MOSTLY_ZERO if name in state}
        if "layer_columns_" in state:
            state["layer_columns_"] = [
                np.arange(own.start, own.stop) if isinstance(own, slice) else own
                for own in state["layer_columns_"]
            ]
        super().__setstate__(state)

    def _sk_visual_block_(self):
        facts = [f"sparsity {self.sparsity}"]
        if hasattr(self, "support_"):
            facts = [f"{self.support_.sum():,} of {self.support_.size:,} neurons kept"]
        return diagram_block(self, facts)

    def __sklearn_tags__(self):
        """Tell scikit-learn that y is needed and may have several columns."""
        # array_api_support stays False, though tensors are taken: its checks want fitted attributes
        # on the device of X, and a machine without that device could not unpickle them.
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        return tags
