"""Labelled texts for the accuracy benchmark: to learn from, to choose by, to test."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.model_selection import PredefinedSplit, train_test_split


@dataclass(frozen=True)
class Splits:
    """One data set.

    ``texts`` and ``y`` hold training and validation texts together; ``validation`` is True where
    one of them is for choosing hyper-parameters. ``test`` is for one figure per method.
    """

    name: str
    texts: list[str]
    y: np.ndarray
    validation: np.ndarray
    test: list[str]
    y_test: np.ndarray

    @property
    def folds(self):
        """The same choice for scikit-learn's searches."""
        return PredefinedSplit(np.where(self.validation, 0, -1))

    def fewer(self, n_texts):
        """Keep so many of the texts to learn from, chosen by chance; all of the others stay."""
        learn = np.flatnonzero(~self.validation)
        chosen = np.random.default_rng(0).permutation(learn)[:n_texts]
        rows = np.sort(np.concatenate([chosen, np.flatnonzero(self.validation)]))
        texts = [self.texts[i] for i in rows]
        return replace(self, texts=texts, y=self.y[rows], validation=self.validation[rows])

    def part(self, validation):
        """Pick either the validation texts or the others."""
        rows = np.flatnonzero(self.validation == validation)
        return [self.texts[i] for i in rows], self.y[rows]


def load_splits(folder, name, n_texts=None):
    """Read a set; one without a validation split gives up a fifth of its training texts for it.

    With ``n_texts`` about so many texts to learn from and to test are taken, as many of each class.
    """
    table = pd.read_csv(folder / f"{name}.csv.gz")
    table["label"] = np.unique(table.label, return_inverse=True)[1]
    test = table[table.split == "test"]
    rest = table[table.split != "test"]
    if n_texts is not None:
        of_each = max(5, n_texts // table.label.nunique())
        test, rest = (part.groupby("label").head(of_each) for part in (test, rest))
    validation = (rest.split == "validation").to_numpy(copy=True)
    if not validation.any():
        rows = np.arange(len(rest))
        chosen = train_test_split(rows, test_size=0.2, stratify=rest.label, random_state=0)[1]
        validation[chosen] = True
    return Splits(
        name,
        rest.text.tolist(),
        rest.label.to_numpy(),
        validation,
        test.text.tolist(),
        test.label.to_numpy(),
    )
