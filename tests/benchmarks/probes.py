"""Time of the probes against other solvers of the same problems, and the objectives reached.

    python tests/benchmarks/probes.py --data FOLDER [--repeats 5] [--limit 60] [--json FILE]
        [--store FOLDER] [--solvers liblinear saga skglm celer] [--workloads WORD ...]

FOLDER holds sst2.csv.gz and banking77.csv.gz with the columns text, label and split; --store keeps
the activations for another run. skglm and celer are measured where they are installed (the extra
"benchmarks"). All solvers see the same standardised columns and stop by their own rule at the
tolerance 1e-3; times are medians over the repeats, which take turns.

Solvers other than skspin and liblinear take minutes: each is run once, begins no other problem
after --limit seconds, and its time is extrapolated to all problems from those that it solved, of
which the table says the number. The excess is how far the summed objectives of these are above
what skspin reached for the same ones; negative where they are below.

The last two workloads are whole fits of SalientNeuronSelector with its defaults, beside one bare
fit of liblinear per layer, whose columns are standardised before its time begins.
"""

from __future__ import annotations

import argparse
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import sklearn
from record import write_record
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.fixes import parse_version

from skspin import LLMActivationTransformer, SalientNeuronSelector
from skspin._probes import solve_probes
from skspin.datasets import demo_model

TOL = 1e-3


def activations(arguments, name, site, layer=None):
    """Read the training texts of a set and what one layer, or all, make of them."""
    table = pd.read_csv(arguments.data / f"{name}.csv.gz")
    table = table[table.split == "train"]
    transformer = LLMActivationTransformer(
        str(demo_model()), site=site, layers=layer, cache=arguments.store or "memory"
    )
    return transformer.fit_transform(table.text.tolist()), table.label.to_numpy()


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
SELECTIONS = {
    "SST-2, selector, hidden, 7 layers": ("sst2", "hidden"),
    "SST-2, selector, mlp, 6 layers": ("sst2", "mlp"),
}
L1 = (
    {"penalty": "l1"}
    if parse_version(sklearn.__version__) < parse_version("1.8")
    else {"l1_ratio": 1}
)


def with_scikit_learn(solver):
    """Solve by scikit-learn."""

    def fit(Z, t, C):
        model = LogisticRegression(**L1, C=C, solver=solver, tol=TOL, max_iter=1000, random_state=0)
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


def objectives(Z, signs, costs, weights, coef, intercept):
    """Compute the problems' objectives, in float64."""
    margins = signs * (Z @ coef.T + intercept)  # (n, P)
    losses = (weights * np.logaddexp(0, -margins)).sum(axis=0)  # (P,)
    return costs * losses + np.abs(coef).sum(axis=1)


def solve_together(X, scaler, signs, costs, weights, device=None):
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
        device=device,
    )
    return time.perf_counter() - started, found.coef, found.intercept


def solve_one_by_one(fit, Z, signs, costs, weights, limit=np.inf):
    """Solve problems by another solver in turn, until ``limit`` seconds have passed.

    Copying a problem's rows is not part of the time.
    """
    seconds, models = 0.0, []
    for t, C, own in zip(signs.T, costs, weights.T, strict=True):
        rows = np.flatnonzero(own)
        training, sides = Z[rows], t[rows]
        started = time.perf_counter()
        models.append(fit(training, sides, C))
        seconds += time.perf_counter() - started
        if seconds > limit:
            break
    coef = np.concatenate([np.atleast_2d(model.coef_) for model in models])
    intercept = np.array([float(np.ravel(model.intercept_)[0]) for model in models])
    return seconds, coef, intercept


def measure_solvers(arguments, workload, solvers):
    """Measure every solver on one workload."""
    name, site, layer, set_up = WORKLOADS[workload]
    X, y = activations(arguments, name, site, layer)
    X = np.ascontiguousarray(X, dtype=np.float32)
    problems = set_up(X, y)
    scaler = StandardScaler().fit(X)
    Z = scaler.transform(X).astype(np.float64)
    runs = {"skspin": lambda: solve_together(X, scaler, *problems)}
    for solver in solvers:
        fit, limit = SOLVERS[solver], np.inf if solver == "liblinear" else arguments.limit
        runs[solver] = lambda fit=fit, limit=limit: solve_one_by_one(fit, Z, *problems, limit)
    for fit in [SOLVERS["skglm"]] if "skglm" in solvers else []:
        fit(Z[:100, :5], np.where(np.arange(100) % 2, 1.0, -1.0), 1.0)  # it compiles itself
    seconds, reached = {solver: [] for solver in runs}, {}
    for repeat in range(arguments.repeats):
        for solver, run in runs.items():
            if repeat and solver not in ("skspin", "liblinear"):
                continue
            took, coef, intercept = run()
            n_solved = len(coef)
            seconds[solver].append(took * len(problems[1]) / n_solved)
            signs, costs, weights = (part[..., :n_solved] for part in problems)
            reached[solver] = objectives(Z, signs, costs, weights, coef, intercept)
    for solver, own in reached.items():
        yield {
            "workload": workload,
            "solver": solver,
            "n_solved": len(own),
            "n_problems": len(problems[1]),
            "excess": float(own.sum() / reached["skspin"][: len(own)].sum() - 1),
            **times(seconds, solver),
        }


def measure_selector(arguments, workload):
    """Measure whole fits of the selector, beside one bare fit of liblinear per layer."""
    X, y = activations(arguments, *SELECTIONS[workload])
    seconds = {"skspin": [], "liblinear": []}
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        selector = SalientNeuronSelector(cache=None).fit(X, y)
        seconds["skspin"].append(time.perf_counter() - started)
        took = 0.0
        for columns in selector.layer_columns_:
            Z = StandardScaler().fit_transform(np.asarray(X[:, columns], dtype=np.float64))
            started = time.perf_counter()
            SOLVERS["liblinear"](Z, y, selector.C)
            took += time.perf_counter() - started
        seconds["liblinear"].append(took)
    for solver in seconds:
        yield {"workload": workload, "solver": solver, **times(seconds, solver)}


def times(seconds, solver):
    """Summarise one solver's times: the median, and the median ratio to skspin's in its turn."""
    ratios = np.divide(seconds[solver], seconds["skspin"][: len(seconds[solver])])
    return {"seconds": float(np.median(seconds[solver])), "ratio": float(np.median(ratios))}


def main():
    """Print the table and, if asked to, write it with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--solvers", nargs="*", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--workloads", nargs="*", default=[""], help="only those with such a word")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    warnings.simplefilter("ignore", FutureWarning)
    missing = [s for s in arguments.solvers if s in ("skglm", "celer") and not find_spec(s)]
    solvers = [s for s in arguments.solvers if s not in missing]
    if missing:
        print(f"Not installed, and left out: {', '.join(missing)}")
    rows = []
    print(f"{'workload':34} {'solver':10} {'seconds':>9} {'/ skspin':>9} {'excess':>9}  solved")
    for workload in [*WORKLOADS, *SELECTIONS]:
        if not any(word in workload for word in arguments.workloads):
            continue
        if workload in WORKLOADS:
            measured = measure_solvers(arguments, workload, solvers)
        else:
            measured = measure_selector(arguments, workload)
        for row in measured:
            line = "{workload:34} {solver:10} {seconds:9.2f} {ratio:9.1f}".format(**row)
            if "excess" in row:
                line += " {excess:9.1e}  {n_solved} of {n_problems}".format(**row)
            print(line, flush=True)
            rows.append(row)
    if arguments.json:
        write_record(arguments.json, rows)


if __name__ == "__main__":
    main()
