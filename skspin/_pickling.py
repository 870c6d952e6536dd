"""What a pickle holds: the version, no model in memory, of sparse arrays only non-zero values."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import PurePath
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import InconsistentVersionWarning

from skspin._system import warn
from skspin._version import __version__

#: Types of skspin (and ranges and paths, which may be parameters) in files that
#: :func:`skops.io.dump` writes, to be passed as
#: ``skops.io.load(file, trusted=skspin.TRUSTED_TYPES)``. None of them runs code when it is loaded.
TRUSTED_TYPES = [
    "builtins.range",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "skspin._layout.Layout",
    "skspin._layout.Segment",
    "skspin._pickling.DetachedModel",
    "skspin._pipeline.PrunedStep",
    "skspin._selector.SalientNeuronSelector",
    "skspin._transformer.LLMActivationTransformer",
]

# A user's objects that hold a model's weights or belong to them: shared, never copied.
_SHARED = ("model", "tokenizer")


class VersionedState:
    """An estimator whose pickle says which version of skspin wrote it.

    Inherit from it before BaseEstimator, which does this for scikit-learn's own estimators only.
    """

    def __getstate__(self):
        """Add the version to the state."""
        return super().__getstate__() | {"_skspin_version": __version__}  # type: ignore[operator]

    def __setstate__(self, state):
        """Warn, as scikit-learn does, if another version wrote the state."""
        state = dict(state)
        written = state.pop("_skspin_version", "unknown")
        if written != __version__:
            warn(
                InconsistentVersionWarning(
                    estimator_name=type(self).__name__,
                    current_sklearn_version=f"{__version__} of skspin",
                    original_sklearn_version=f"{written} of skspin",
                )
            )
        super().__setstate__(state)  # type: ignore[misc]


class DetachedModel:
    """Stands in a pickle for a model that was passed in memory: the name of its class."""

    def __init__(self, name: str):
        self.name = name
        self.fingerprint = ""  # tells models apart where a pickle is a key, as in joblib's Memory

    def __repr__(self) -> str:
        """Say what is missing."""
        return f"<{self.name} left out of the pickle>"


def shallow_copy(estimator: Any) -> Any:
    """Copy an estimator, sharing its attributes, without the detour over its pickled state."""
    twin = object.__new__(type(estimator))
    twin.__dict__.update(vars(estimator))
    if hasattr(twin, config := "_sklearn_output_config"):  # a dict that set_output writes to
        setattr(twin, config, dict(getattr(twin, config)))
    return twin


class ModelSharingEstimator(VersionedState, BaseEstimator):
    """An estimator whose ``model`` and ``tokenizer`` may be objects, which its copies share."""

    model: Any
    tokenizer: Any
    model_kwargs: Any

    @property
    def _model_name(self) -> str:
        """The model's short name: a hub id, the end of a folder's path, or a class."""
        if not isinstance(self.model, str | os.PathLike):
            return type(self.model).__name__
        return "/".join(PurePath(self.model).parts[-2:])

    def __sklearn_clone__(self):
        """Clone as scikit-learn does, but share the model and tokenizer instead of copying them."""
        shared = {name: getattr(self, name) for name in _SHARED}
        without = shallow_copy(self).set_params(**dict.fromkeys(_SHARED))
        return BaseEstimator.__sklearn_clone__(without).set_params(**shared)

    __copy__ = shallow_copy  # not the state of a pickle, which lacks a model in memory

    def __deepcopy__(self, memo):
        """Share the model and tokenizer, as clones do."""
        memo.update({id(shared := getattr(self, name)): shared for name in _SHARED})
        twin = shallow_copy(self)
        vars(twin).update(deepcopy(vars(self), memo))
        return twin

    def __getstate__(self):
        """Leave out a model in memory, and write a quantisation's configuration as plain JSON."""
        state = dict(super().__getstate__())
        if not isinstance(self.model, str | os.PathLike | DetachedModel):
            state["model"] = DetachedModel(type(self.model).__name__)
        options = self.model_kwargs or {}
        config = options.get("quantization_config")
        if config is not None and hasattr(config, "to_dict"):
            # Transformers takes the dict as well, and skops can't write a torch.dtype.
            plain = json.loads(json.dumps(config.to_dict()))
            state["model_kwargs"] = {**options, "quantization_config": plain}
        return state


def pack_sparse(array: np.ndarray) -> dict[str, Any]:
    """Write an array as its non-zero values and their positions."""
    places = np.flatnonzero(array).astype(np.min_scalar_type(array.size))
    return {"shape": array.shape, "places": places, "values": array.ravel()[places]}


def unpack_sparse(shape: tuple[int, ...], places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Read back what `pack_sparse` wrote."""
    array = np.zeros(shape, dtype=values.dtype)
    array.flat[places] = values
    return array
