"""One layer's probe: standardise its columns, choose C on validation rows, solve on all rows.

Its coefficients lead to the neurons worth keeping by SPIN's rule [1]_: a neuron's salience is its
squared weight in the layer's sparse probe, and a layer keeps the fewest neurons that together hold
a given share of its salience.

Solved probes are found again by a digest of everything that decides a solution, so that a search
over sparsity, which fits the same probes to the same rows again and again, solves each once.

References
----------
.. [1] Jiao et al., "SPIN: Sparsifying and Integrating Internal Neurons in Large Language Models
   for Text Classification", Findings of ACL 2024, arXiv:2311.15983.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from sklearn.utils import gen_batches

from skspin._probes.columns import is_tensor, mean_and_deviation, to_host
from skspin._probes.solver import ProbeSolution, solve_probes
from skspin._probes.targets import Targets
from skspin._system import after_fork

_DIGEST_BYTES = 1 << 18  # gathered at a time; hashed while they are in a core's cache
_LARGEST = 1e12  # of an activation; sums of squares stay far below what float32 holds
_ENTRY_BYTES = 400  # that a cached probe takes beside its weights


@dataclass(frozen=True)
class ProbeSettings:
    """What a probe's solution depends on besides the data; sparsity is not part of it."""

    C: tuple[float, ...]  # ascending
    penalty: str
    standardize: bool
    tol: float
    max_iter: int
    device: str | None
    eps: float  # relative rounding of the number format that the activations came in


@dataclass(frozen=True)
class LayerProbe:
    """The solution for one layer."""

    coef: np.ndarray  # (n_problems, n_neurons), in standardised units where settings standardise
    score: float  # accuracy on the validation rows, when fitted on the others
    C: float  # the value chosen
    dual_gap: float  # the largest over problems
    n_iter: int  # the largest over problems


def fit_layers(
    X: Any,  # (n_rows, n_columns); a tensor stays on its device
    layers: Iterable[slice | np.ndarray],  # the columns of each
    targets: Targets,
    validation: np.ndarray,  # (n_held_out,): which rows of the targets
    settings: ProbeSettings,
    *,
    use_cache: bool,
) -> Iterator[LayerProbe]:
    """Fit a probe to each layer, one at a time: only its columns are ever copied."""
    # To digest a tensor, it would have to be copied to the host.
    fit = probe_cache.find_or_fit if use_cache and not is_tensor(X) else _fit_layer
    for columns in layers:
        # Taken by number, columns come in the memory order of rows.
        by_slice = isinstance(columns, slice) or is_tensor(X)
        block = X[:, columns] if by_slice else X.take(columns, axis=1)
        yield fit(block[targets.rows], targets, validation, settings)


def _fit_layer(
    block: Any, targets: Targets, validation: np.ndarray, settings: ProbeSettings
) -> LayerProbe:
    """Solve the problems of one layer, whose activations ``block`` holds, (n_texts, n_neurons)."""
    largest = max(-float(block.min()), float(block.max()))
    if not largest <= _LARGEST:
        raise ValueError(
            f"X holds values as large as {largest:.3g}, but probes compute in float32, where sums "
            f"of squares of values above {_LARGEST:.0e} may overflow. Scale or drop the columns "
            "that hold them."
        )
    # Far from zero, float32 has fewer digits than float64 activations. Where columns are centred is
    # of no importance, as the intercept has no penalty.
    center: Any = 0.0
    if block.itemsize > 4:
        center = block.mean(0)  # (n_neurons,)
        block = block - center
    if is_tensor(block):
        block, center = block.float().contiguous(), to_host(center)
    else:
        block = np.ascontiguousarray(block, dtype=np.float32)
    # Mean and scale of all rows, validation rows included: they do not depend on labels.
    if settings.standardize:
        mean, scale = _mean_and_scale(block, center, targets.row_weights, settings.eps)
    else:
        # Centred, so that rounding does not turn a large constant into a gradient.
        mean, _ = mean_and_deviation(block, targets.row_weights)
        scale = np.where(to_host((block == block[:1]).all(0)), np.inf, 1.0)

    def solve(tasks: list[tuple[float, np.ndarray]]) -> list[ProbeSolution]:
        """Solve all problems, for each pair of a value of C and weights of the rows."""
        return solve_probes(
            block,
            np.tile(targets.signs, (1, len(tasks))),
            C=np.repeat([C for C, _ in tasks], targets.n_problems),
            sample_weight=np.hstack([weights for _, weights in tasks]),
            penalty=settings.penalty,
            tol=settings.tol,
            max_iter=settings.max_iter,
            mean=mean,
            scale=scale,
            device=settings.device,
        ).split(len(tasks))

    training = targets.weights.copy()
    training[validation] = 0
    trials = [(C, training) for C in settings.C]
    # With one C there is nothing to choose, so the final probe is solved together with the trial:
    # both share the passes over the columns, and two threads have a problem each.
    known = [(C, targets.weights) for C in settings.C if len(settings.C) == 1]
    solved = solve(trials + known)
    scores = [
        targets.score(trial.decisions[:, validation].T, validation)
        for trial in solved[: len(trials)]
    ]
    # C ascends, so the first of equal scores, and so the sparsest probe, is taken. Rounding may
    # change the last digit of equal scores.
    best = int(np.argmax(np.array(scores) >= max(scores) - 1e-12))
    final = solved[-1] if known else solve([(settings.C[best], targets.weights)])[0]
    dual_gap, n_iter = float(final.dual_gap.max()), int(final.n_iter.max())
    return LayerProbe(final.coef, scores[best], settings.C[best], dual_gap, n_iter)


def _mean_and_scale(
    block: Any, center: Any, row_weights: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Measure each column, less its centre; a constant one gets an infinite scale: it becomes 0."""
    mean, scale = mean_and_deviation(block, row_weights)
    # A column that differs only in its last digits counts as constant: divided by so small a scale,
    # rounding would look like signal. So does the column of a dead neuron, whose squares are too
    # small for float32.
    float32 = np.finfo(np.float32)
    rounding = np.maximum(8 * eps * np.abs(center + mean), np.sqrt(float32.tiny) / float32.eps)
    varies = scale > rounding
    if varies.any():
        # A nearly dead neuron holds rounding of the large numbers that it is computed from: GELU
        # gives 1e-6 at -5, with an error of 1e-7 that differs by batch. A column is taken for such
        # a neuron if its scale is below half the digits of its layer's median scale.
        varies &= scale > np.sqrt(eps) * np.median(scale[varies])
    return mean, np.where(varies, scale, np.inf)


class _ProbeCache:
    """Solved probes by content, up to a number of bytes; those used longest ago are evicted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self.n_solved = 0
        self._probes: OrderedDict[bytes, LayerProbe] = OrderedDict()
        self.renew_lock()

    def renew_lock(self) -> None:
        """Start with a free lock: another thread may have held it at a fork."""
        self._lock = threading.Lock()

    @property
    def n_bytes(self) -> int:
        """What the probes take."""
        return sum(map(_size, self._probes.values()))

    def find_or_fit(
        self, block: np.ndarray, targets: Targets, validation: np.ndarray, settings: ProbeSettings
    ) -> LayerProbe:
        """Do what `_fit_layer` does, unless this process has solved the same probe before."""
        arrays = (block, targets.signs, targets.weights, targets.row_weights, validation)
        # The same signs are scored in another way if classes exclude each other.
        rest = repr((settings, targets.exclusive)).encode()
        key = xxhash.xxh3_128_digest(b"".join([*map(_digest, arrays), rest]))
        with self._lock:
            if key in self._probes:
                self._probes.move_to_end(key)
                return self._probes[key]
        probe = _fit_layer(block, targets, validation, settings)
        probe.coef.flags.writeable = False  # several callers share it
        with self._lock:
            self.n_solved += 1
            if _size(probe) <= self.limit:
                self._probes[key] = probe
            while self.n_bytes > self.limit:
                self._probes.popitem(last=False)
        return probe

    def clear(self) -> None:
        """Release all probes."""
        with self._lock:
            self._probes.clear()
            self.n_solved = 0


def _size(probe: LayerProbe) -> int:
    return probe.coef.nbytes + _ENTRY_BYTES


def _digest(array: np.ndarray) -> bytes:
    """Digest shape, dtype and values of a numeric array without copying anything large."""
    digest = xxhash.xxh3_128(f"{array.dtype.str}{array.shape}".encode())
    if array.ndim > 1 and abs(array.strides[0]) < abs(array.strides[-1]):
        digest.update(b"F")  # row by row, hashing would be many times slower
        array = array.T
    row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    for rows in gen_batches(len(array), max(1, _DIGEST_BYTES // max(1, row_bytes))):
        digest.update(np.ascontiguousarray(array[rows]).reshape(-1).view(np.uint8).data)
    return digest.digest()


# Solutions are small beside the activations they stand for: 6 layers of 1,536 neurons and 77
# classes take 6 MB.
probe_cache = _ProbeCache(256 * 2**20)
after_fork(probe_cache.renew_lock)


# From coefficients to salient neurons; a layer's salience is of shape (n_neurons,)

# How a weight becomes salience, which is then summed over classes.
SALIENCES = {"squared": np.square, "absolute": np.abs}


def most_salient(salience: np.ndarray, sparsity: float, criterion: str) -> np.ndarray:
    """Return a mask of the neurons to keep, none if all salience is zero; (n_neurons,)."""
    order = np.argsort(-salience, kind="stable")  # ties go to the lower column
    keep = np.zeros(salience.shape, dtype=bool)
    if salience.any():
        keep[order[: CRITERIA[criterion](salience[order], sparsity)]] = True
    return keep


def _fewest_that_hold(falling: np.ndarray, sparsity: float) -> int:
    """Count the largest neurons that together hold at least ``1 - sparsity`` of the salience."""
    held = np.cumsum(falling)
    # Rounding must not add a neuron: of ten neurons with 0.1 each, three hold 0.3, not four.
    rounding = falling.size * np.finfo(np.float64).eps
    return int(np.searchsorted(held, (1.0 - sparsity) * held[-1] * (1.0 - rounding))) + 1


def _share_of_neurons(falling: np.ndarray, sparsity: float) -> int:
    """Count the neurons that are left when the given share of them, rounded down, is dropped."""
    # 0.29 * 100 is 28.999999999999996
    return max(1, falling.size - int(np.floor(sparsity * falling.size + 1e-9)))


CRITERIA = {"salience": _fewest_that_hold, "count": _share_of_neurons}
