"""A model that lives in memory: shared by an estimator's clones and copies, left out of pickles."""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

from sklearn.base import BaseEstimator, clone

from skspin._pickling import VersionedState, shallow_copy

# Objects of the user's own that hold a model's weights or belong to them: shared, never copied.
_SHARED = ("model", "tokenizer")


class DetachedModel:
    """What a pickle keeps of a model that was passed in memory: its name, and no weights.

    Parameters
    ----------
    name : str
        The model's class.
    """

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        """Say what is missing."""
        return f"<{self.name} left out of the pickle>"


class ModelSharingEstimator(VersionedState, BaseEstimator):
    """An estimator whose parameters ``model`` and ``tokenizer`` may be objects of the user's."""

    model: Any
    tokenizer: Any

    def __sklearn_clone__(self):
        """Clone as scikit-learn does, but share the model and tokenizer instead of copying them."""
        shared = {name: getattr(self, name) for name in _SHARED}
        others = {k: v for k, v in self.get_params(deep=False).items() if k not in _SHARED}
        bare = type(self)(**others)
        twin = BaseEstimator.__sklearn_clone__(bare)
        for state in ("_metadata_request", "_sklearn_output_config"):
            if hasattr(self, state):
                setattr(twin, state, clone(getattr(self, state), safe=False))
        return twin.set_params(**shared)

    def __copy__(self):
        """Copy what is held as it is; a copy's state would be a pickle's, without the model."""
        return shallow_copy(self)

    def __deepcopy__(self, memo):
        """Share the model and tokenizer, as clones do."""
        memo.update({id(shared := getattr(self, name)): shared for name in _SHARED})
        twin = shallow_copy(self)
        vars(twin).update(deepcopy(vars(self), memo))
        return twin

    def __getstate__(self):
        """Leave a model in memory out of the pickle."""
        state = super().__getstate__()
        if not isinstance(self.model, str | os.PathLike | DetachedModel):
            state = {**state, "model": DetachedModel(type(self.model).__name__)}
        return state
