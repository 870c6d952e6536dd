"""The one door through which scikit-learn's private names come in.

They are what its own estimators are written with, but they may move between releases; here is
where such a move is mended.
"""

from sklearn.base import _fit_context
from sklearn.linear_model._base import LinearClassifierMixin
from sklearn.utils import _safe_indexing
from sklearn.utils._param_validation import HasMethods, Hidden, Interval, StrOptions

__all__ = [
    "HasMethods",
    "Hidden",
    "Interval",
    "LinearClassifierMixin",
    "StrOptions",
    "_fit_context",
    "_safe_indexing",
]
