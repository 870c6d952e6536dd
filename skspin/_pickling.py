"""Pickles and copies: the version that wrote one, what skops may load, short states, copies."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import InconsistentVersionWarning

from skspin._version import __version__

#: Types of skspin (and paths, which may name a model) in files that :func:`skops.io.dump` writes,
#: to be passed as ``skops.io.load(file, trusted=skspin.TRUSTED_TYPES)``. None of them runs code
#: when it is loaded.
TRUSTED_TYPES = [
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "skspin._layout.Layout",
    "skspin._layout.Segment",
    "skspin._prune.KeptColumns",
    "skspin._selector.SalientNeuronSelector",
    "skspin._shared_model.DetachedModel",
    "skspin._transformer.LLMActivationTransformer",
]


class VersionedState:
    """An estimator whose pickle says which version of skspin wrote it.

    To be inherited from before BaseEstimator, which does the same for scikit-learn's estimators
    and for no others.
    """

    def __getstate__(self):
        """Add the version to the state."""
        return super().__getstate__() | {"_skspin_version": __version__}  # type: ignore[operator]

    def __setstate__(self, state):
        """Warn, as scikit-learn does, if another version wrote the state."""
        state = dict(state)
        written = state.pop("_skspin_version", "unknown")
        if written != __version__:
            warnings.warn(
                InconsistentVersionWarning(
                    estimator_name=type(self).__name__,
                    current_sklearn_version=f"{__version__} of skspin",
                    original_sklearn_version=f"{written} of skspin",
                ),
                stacklevel=2,
            )
        super().__setstate__(state)  # type: ignore[misc]


def shallow_copy(estimator: Any) -> Any:
    """Copy an estimator, but not what it holds.

    ``copy.copy`` asks for the state that goes into a pickle, where a model in memory is left out.
    """
    twin = object.__new__(type(estimator))
    twin.__dict__.update(vars(estimator))
    return twin


def pack_sparse(array: np.ndarray) -> dict[str, Any]:
    """Write an array as the values that are not zero and their places."""
    places = np.flatnonzero(array).astype(np.min_scalar_type(array.size))
    return {"shape": array.shape, "places": places, "values": array.ravel()[places]}


def unpack_sparse(shape: tuple[int, ...], places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Read back what `pack_sparse` wrote."""
    array = np.zeros(shape, dtype=values.dtype)
    array.flat[places] = values
    return array
