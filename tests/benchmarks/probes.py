"""Time of the probes against other solvers of the same problems, and the objectives reached.

    python tests/benchmarks/probes.py --data FOLDER [--repeats 5] [--json FILE]
        [--solvers liblinear saga skglm celer]

FOLDER holds sst2.csv.gz and banking77.csv.gz with the columns text, label and split. skglm and
celer are measured where they are installed. All solvers see the same standardised columns and stop
by their own rule at the tolerance 1e-3; times are medians over the repeats, which take turns. The
excess is how far the summed objectives are above the lowest sum that any solver found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import scipy
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

import skspin
from skspin import LLMActivationTransformer
from skspin._probes import solve_probes
from skspin.datasets import demo_model

TOL = 1e-3


def activations(folder, name, site, layer):
    """Read the training texts of a set and what one layer makes of them."""
    table = pd.read_csv(folder / f"{name}.csv.gz")
    table = table[table.split == "train"]
    transformer = LLMActivationTransformer(str(demo_model()), site=site, layers=layer)
    X = np.asarray(transformer.fit_transform(table.text.tolist()))
    return np.ascontiguousarray(X, dtype=np.float32), table.label.to_numpy()


def folds_and_costs(X, y):
    """Set up one binary problem per fold and value of C, as a search does."""
    costs = [0.003, 0.01, 0.03, 0.1]
    signs = np.where(y == np.unique(y)[1], 1.0, -1.0)
    weights = np.zeros((len(y), 5))
    for fold, (rows, _) in enumerate(StratifiedKFold(5).split(X, y)):
        weights[rows, fold] = 1
    return np.repeat(signs[:, None], 20, axis=1), np.tile(costs, 5), np.repeat(weights, 4, axis=1)


def one_versus_rest(X, y):
    """Set up one problem per class."""
    classes = np.unique(y)
    signs = np.where(y[:, None] == classes, 1.0, -1.0)
    return signs, np.full(len(classes), 0.1), np.ones(signs.shape)


WORKLOADS = {
    "SST-2, hidden, 5 folds x 4 C": ("sst2", "hidden", 4, folds_and_costs),
    "SST-2, mlp, 5 folds x 4 C": ("sst2", "mlp", 5, folds_and_costs),
    "banking77, hidden, 77 classes": ("banking77", "hidden", 5, one_versus_rest),
}


def with_scikit_learn(solver):
    """Solve by scikit-learn."""

    def fit(Z, t, C):
        model = LogisticRegression(
            l1_ratio=1, C=C, solver=solver, tol=TOL, max_iter=1000, random_state=0
        )
        return model.fit(Z, t)

    return fit


def with_skglm(Z, t, C):
    """Solve by skglm, which takes the mean of the losses."""
    from skglm import SparseLogisticRegression

    return SparseLogisticRegression(alpha=1 / (C * len(t)), tol=TOL).fit(Z, t)


def with_celer(Z, t, C):
    """Solve by celer, which has no intercept."""
    from celer import LogisticRegression as CelerLogisticRegression

    return CelerLogisticRegression(C=C, tol=TOL).fit(Z, t)


SOLVERS = {
    "liblinear": with_scikit_learn("liblinear"),
    "saga": with_scikit_learn("saga"),
    "skglm": with_skglm,
    "celer": with_celer,
}


def total_objective(Z, signs, costs, weights, coef, intercept):
    """Sum the problems' objectives, in float64."""
    margins = signs * (Z @ coef.T + intercept)  # (n, P)
    losses = (weights * np.logaddexp(0, -margins)).sum(axis=0)  # (P,)
    return float((costs * losses + np.abs(coef).sum(axis=1)).sum())


def solve_together(X, scaler, signs, costs, weights):
    """Solve all problems by skspin; return seconds, weights and intercepts."""
    started = time.perf_counter()
    found = solve_probes(
        X,
        signs,
        C=costs,
        sample_weight=weights,
        tol=TOL,
        mean=scaler.mean_,
        scale=scaler.scale_,
    )
    return time.perf_counter() - started, found.coef, found.intercept


def solve_one_by_one(fit, Z, signs, costs, weights):
    """Solve each problem by another solver; copying its rows is not part of the time."""
    seconds, models = 0.0, []
    for t, C, own in zip(signs.T, costs, weights.T, strict=True):
        rows = np.flatnonzero(own)
        training, sides = Z[rows], t[rows]
        started = time.perf_counter()
        models.append(fit(training, sides, C))
        seconds += time.perf_counter() - started
    coef = np.concatenate([np.atleast_2d(model.coef_) for model in models])
    intercept = np.array([float(np.ravel(model.intercept_)[0]) for model in models])
    return seconds, coef, intercept


def measure(folder, workload, solvers, repeats):
    """Measure every solver on one workload."""
    name, site, layer, set_up = WORKLOADS[workload]
    X, y = activations(folder, name, site, layer)
    signs, costs, weights = set_up(X, y)
    scaler = StandardScaler().fit(X)
    Z = scaler.transform(X).astype(np.float64)
    runs = {"skspin": lambda: solve_together(X, scaler, signs, costs, weights)}
    for solver in solvers:
        fit = SOLVERS[solver]
        runs[solver] = lambda fit=fit: solve_one_by_one(fit, Z, signs, costs, weights)
    seconds = {solver: [] for solver in runs}
    objectives = {}
    for repeat in range(repeats):
        for solver, run in runs.items():
            if repeat and solver not in ("skspin", "liblinear"):
                continue  # they take minutes
            took, coef, intercept = run()
            seconds[solver].append(took)
            objectives[solver] = total_objective(Z, signs, costs, weights, coef, intercept)
    ratios = np.divide(seconds.get("liblinear", [np.nan] * repeats), seconds["skspin"])
    lowest = min(objectives.values())
    for solver in runs:
        yield {
            "workload": workload,
            "solver": solver,
            "seconds": float(np.median(seconds[solver])),
            "excess": objectives[solver] / lowest - 1,
            "liblinear_over_skspin": float(np.median(ratios)) if solver == "skspin" else None,
        }


def main():
    """Print the table and, if asked to, write it with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--solvers", nargs="*", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    warnings.simplefilter("ignore", FutureWarning)
    solvers = [s for s in arguments.solvers if s not in ("skglm", "celer") or find_spec(s)]
    rows = []
    print(f"{'workload':32} {'solver':10} {'seconds':>9} {'excess':>9} {'liblinear / skspin':>19}")
    for workload in WORKLOADS:
        for row in measure(arguments.data, workload, solvers, arguments.repeats):
            ratio = row["liblinear_over_skspin"]
            print(
                f"{row['workload']:32} {row['solver']:10} {row['seconds']:9.2f} "
                f"{row['excess']:9.1e} {'' if ratio is None else f'{ratio:19.1f}'}",
                flush=True,
            )
            rows.append(row)
    if arguments.json:
        machine = {
            "platform": platform.platform(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "scikit-learn": sklearn.__version__,
            "skspin": skspin.__version__,
        }
        arguments.json.write_text(json.dumps({"measured_on": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
