"""Shards: whoever computes them, and whatever happens to them, the rows are the same."""

import os
import shutil
import signal
import sys
from dataclasses import replace

import joblib
import numpy as np
import psutil
import pytest
from bert_files import save, tiny
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import GridSearchCV

from skspin import LLMActivationTransformer, make_spin_pipeline
from skspin._model import extract
from skspin._model.parallel import _compute_shard as compute_shard
from skspin._model.parallel import cut_into_shards

TEXTS = [f"text {i} " + "word " * (i % 40) for i in range(120)] + ["text 7 " + "word " * 7, ""]


@pytest.fixture(scope="module")
def model():
    return tiny(hidden_size=16, intermediate_size=24, max_position_embeddings=64)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny-bert"), model, tokenizer)


def transformer(model, **params):
    return LLMActivationTransformer(
        model, **{"dtype": "float32", "cache": None, "site": ("hidden", "mlp"), **params}
    )


@pytest.fixture(scope="module")
def expected(folder):
    return transformer(folder).fit_transform(TEXTS)


def assert_same(X, expected):
    assert X.shape == expected.shape and X.dtype == np.float32
    np.testing.assert_allclose(X, expected, atol=1e-5)


@pytest.mark.parametrize("devices", [["cpu", "cpu"], ("cpu",) * 3, ["cpu"]])
def test_several_devices_give_what_one_gives(folder, expected, devices):
    assert_same(transformer(folder, device=devices).fit_transform(TEXTS), expected)


def refuse(*arguments):
    raise AssertionError("a text went through the model again")


def test_workers_need_no_store_and_the_caller_keeps_all_rows(
    folder, expected, tmp_path, monkeypatch
):
    several = transformer(folder, device=["cpu", "cpu"], cache=tmp_path / "store").fit(TEXTS)
    assert_same(several.transform(TEXTS), expected)
    monkeypatch.setattr("skspin._transformer.extract", refuse)  # nothing is left to compute
    with pytest.raises(AssertionError, match="again"):
        several.transform(["a new one"])
    assert_same(several.transform(TEXTS[::-1]), expected[::-1])


def test_texts_cut_off_by_all_workers_are_counted_in_one_warning(folder):
    with pytest.warns(UserWarning, match="3 of 4 texts") as warned:
        transformer(folder, device=["cpu", "cpu"], max_length=10).fit_transform(
            ["fine"] * 16 + ["word " * 11, "word " * 12, "word " * 11, "word " * 99]
        )
    assert len(warned) == 1


def test_a_model_in_memory_serves_threads_and_is_not_sent_to_processes(model, tokenizer, expected):
    with joblib.parallel_config(backend="threading", n_jobs=3):
        assert_same(transformer(model, tokenizer=tokenizer).fit_transform(TEXTS), expected)
    fitted = transformer(model, tokenizer=tokenizer, n_jobs=2).fit(TEXTS)
    with pytest.raises(ValueError, match="n_jobs=2.*no pickle holds its weights"):
        fitted.transform(TEXTS)
    with pytest.raises(ValueError, match="stays where it is"):
        fitted.set_params(n_jobs=None, device=["cpu", "cpu"]).transform(TEXTS)


def test_a_model_may_have_a_relative_path(folder, expected, monkeypatch):
    with joblib.parallel_config(backend="loky", n_jobs=2):
        joblib.Parallel()([joblib.delayed(os.getcwd)()] * 2)  # the workers start here
        monkeypatch.chdir(os.path.dirname(folder))
        assert_same(transformer(os.path.basename(folder), n_jobs=2).fit_transform(TEXTS), expected)


def test_whole_long_texts_are_shared_out(folder, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "skspin._model.parallel._compute_shard",
        lambda *shard: sizes.append(sum(map(len, shard[-1]))) or compute_shard(*shard),
    )
    windows = transformer(folder, long_texts="windows", device=["cpu", "cpu"])
    windows.fit_transform([*TEXTS, *(f"{i} " + "word " * 20_000 for i in range(4))])
    assert max(sizes) < 2.5e5


def test_two_counts_of_workers_are_one_too_many(folder):
    with pytest.raises(ValueError, match="n_jobs=3 both say"):
        transformer(folder, device=["cpu", "cpu"], n_jobs=3).fit(TEXTS).transform(TEXTS)
    with pytest.raises(ValueError, match=r"device=\[\] must name at least one device"):
        transformer(folder, device=[]).fit(TEXTS).transform(TEXTS)


def work_on(folder):
    fitted = transformer(folder).fit(TEXTS)
    return fitted._fitted_recipe(conversations=False), fitted.layout_


def test_a_worker_refuses_other_weights(folder):
    recipe, layout = work_on(folder)
    other = replace(recipe, fingerprint="folder:of-another-model", n_jobs=2)
    with (
        joblib.parallel_config(backend="threading"),
        pytest.raises(ValueError, match="A worker found model=.*fingerprint"),
    ):
        list(extract(other, TEXTS, layout))


def collect(recipe, layout, after_first):
    X = np.full((len(TEXTS), layout.n_columns), np.nan, dtype=np.float32)
    for n_seen, rows in enumerate(extract(recipe, TEXTS, layout)):
        assert np.isnan(X[rows.positions]).all()  # every row once
        X[rows.positions] = rows.values
        if n_seen == 0:
            after_first()
    return X


def kill_a_worker():
    workers = [p for p in psutil.Process().children() if "loky" in " ".join(p.cmdline())]
    os.kill(max(workers, key=lambda p: p.memory_info().rss).pid, signal.SIGKILL)


def test_several_processes_give_what_one_gives_and_one_that_dies_costs_its_shard_once_more(
    folder, expected
):
    with joblib.parallel_config(n_jobs=2):
        assert_same(collect(*work_on(folder), kill_a_worker), expected)


def test_no_worker_of_a_search_loads_a_model_if_texts_were_read_into_a_folder_before(
    folder, tmp_path
):
    copy = str(shutil.copytree(folder, tmp_path / "copy"))

    def models_loaded(estimator, X, y):  # in here, so that workers need not import this module
        registry = sys.modules.get("skspin._model.registry")
        return 0 if registry is None else sum(key[0].model == copy for key in registry._loaded)

    def process_id(estimator, X, y):
        return os.getpid()

    texts, y = TEXTS[:60], np.arange(60) % 2
    store = tmp_path / "store"
    spin = make_spin_pipeline(copy, dtype="float32", cache=store, site="hidden", pooling="mean")
    spin.set_params(select__C=10).fit(texts, y)
    scoring = {"models": models_loaded, "process": process_id}
    grid = {"activations__cache": [store, None]}  # in this order
    search = GridSearchCV(spin, grid, cv=3, n_jobs=2, scoring=scoring, refit=False)
    with joblib.parallel_config(backend="loky"):
        found = search.fit(texts, y).cv_results_
    splits = [found[f"split{i}_test_models"] for i in range(3)]
    assert np.unique(splits, axis=0).tolist() == [[0, 1]]
    assert os.getpid() not in np.unique([found[f"split{i}_test_process"] for i in range(3)])


@pytest.mark.filterwarnings("default")  # of dask's own
def test_a_dask_cluster_survives_the_death_of_a_worker(folder, expected):
    distributed = pytest.importorskip("distributed")
    recipe, layout = work_on(folder)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask"),
    ):
        assert joblib.effective_n_jobs(None) == 2
        workers = list(client.run(os.getpid).values())
        X = collect(recipe, layout, lambda: os.kill(workers[0], signal.SIGKILL))
    assert_same(X, expected)


@given(
    lengths=st.lists(st.integers(0, 10**5), min_size=1, max_size=300),
    n_workers=st.integers(2, 8),
    row_bytes=st.sampled_from([4, 2**20, 2**26, 2**28]),
)
def test_every_text_is_in_one_shard_and_shards_are_alike(lengths, n_workers, row_bytes):
    shards = cut_into_shards(lengths, n_workers, most_bytes=4096, row_bytes=row_bytes)
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(len(lengths)))
    assert all(len(shard) == 1 or len(shard) * row_bytes <= 2**26 for shard in shards)
    costs = np.minimum(lengths, 4096) + 16
    work = [costs[shard].sum() for shard in shards]
    # No shard has more than its part of the work by more than one text.
    assert max(work) <= costs.sum() / n_workers + costs.max()
    order = np.concatenate([costs[shard] for shard in shards])
    assert (np.diff(order) <= 0).all()  # the longest first


@pytest.mark.filterwarnings("default")  # of ray's own
def test_ray_gives_what_one_process_gives_and_survives_the_death_of_a_worker(folder, expected):
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    register_ray()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    recipe, layout = work_on(folder)
    try:
        with joblib.parallel_config(backend="ray", n_jobs=-1):
            assert joblib.effective_n_jobs(None) == 2
            assert_same(transformer(folder).fit_transform(TEXTS), expected)
            X = collect(recipe, layout, kill_a_ray_worker)
    finally:
        ray.shutdown()
    assert_same(X, expected)


def kill_a_ray_worker():
    processes = psutil.Process().children(recursive=True)
    actors = [p for p in processes if "ray::PoolActor" in " ".join(p.cmdline())]
    os.kill(actors[0].pid, signal.SIGKILL)


SCRIPTS = {
    "short": "a fine film that nobody saw",
    "chinese": "一部没有人看过的好电影" * 4,
    "russian": "хороший фильм, который никто не видел " * 3,
    "long": "a fine film that nobody saw " * 18,
}


@pytest.mark.parametrize("n_workers", [2, 5])
@pytest.mark.parametrize(
    # Bytes say less about tokens where scripts differ. (Characters say far less: 1.55.)
    ("scripts", "most"),
    [(["short", "long"], 1.05), (list(SCRIPTS), 1.25)],
)
def test_shards_of_very_unequal_texts_hold_like_numbers_of_tokens(
    tokenizer, scripts, most, n_workers
):
    rng = np.random.default_rng(0)
    texts = [
        f"{i} {SCRIPTS[rng.choice(scripts)]}"[: int(rng.pareto(1) * 20) + 1] for i in range(3000)
    ]
    ids = tokenizer(texts, verbose=False)["input_ids"]
    n_tokens = np.array([len(row) for row in ids])
    assert n_tokens.max() > 20 * n_tokens.min()
    n_bytes = [len(text.encode()) for text in texts]
    shards = cut_into_shards(n_bytes, n_workers, most_bytes=4096, row_bytes=4)
    of_shard = np.array([n_tokens[shard].sum() for shard in shards])
    # Each worker takes the next shard when it is done with one, so it has four or so.
    by_worker = np.zeros(n_workers)
    for tokens in of_shard:
        by_worker[by_worker.argmin()] += tokens
    assert by_worker.max() < most * by_worker.mean()
