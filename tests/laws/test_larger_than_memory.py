"""Texts that are read as they are needed, output in a file, and a selector that fits from it."""

import multiprocessing
import os
import subprocess
import sys
import textwrap

import joblib
import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import SGDClassifier
from sklearn.utils import gen_batches
from tiny_models import tiny_reader

import skspin._texts
from skspin import LLMActivationTransformer, SalientNeuronSelector
from skspin._layout import Layout, Segment, layout_of
from skspin._store import open_store
from skspin._texts import open_texts
from skspin.datasets import demo_model

TINY = tiny_reader()
TEXTS = [f"text {i} " + "word " * (i % 8) for i in range(50)] + ["text 0 "]


def transformer(**params):
    return LLMActivationTransformer(**{**TINY, "max_length": 48, "cache": None, **params})


class Corpus:
    """Texts that are made when they are asked for, as a dataset on disk reads them."""

    def __init__(self, n_texts, said=None):
        self.n_texts, self.said = n_texts, n_texts if said is None else said

    def __len__(self):
        return self.said

    def __iter__(self):
        return (f"text {i} " * 1000 for i in range(self.n_texts))


class Slices(Corpus):
    def __getitem__(self, key):
        return [f"text {i} " * 1000 for i in range(self.n_texts)[key]]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(skspin._texts, "_CHUNK", 16)


@pytest.mark.parametrize(
    "container",
    [Corpus(100), Slices(100), pa.chunked_array([list(Corpus(60)), list(Corpus(40))])],
    ids=lambda container: type(container).__name__,
)
def test_texts_that_are_not_in_memory_are_read_in_chunks(small_chunks, container):
    chunks = list(open_texts(container))
    assert [len(chunk) for chunk in chunks] == [16] * 6 + [4]
    together = [text for chunk in chunks for text in chunk]
    assert together == [str(text) for text in container]


def test_an_arrow_array_in_a_file_is_read_from_its_map(small_chunks, tmp_path):
    path = str(tmp_path / "texts.arrow")
    texts = list(Corpus(100))
    table = pa.table({"text": texts})
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=30)
    held = pa.total_allocated_bytes()
    with pa.memory_map(path) as source:
        table = pa.ipc.open_file(source).read_all()
        for X in (table, table["text"], table["text"].combine_chunks()):
            assert [text for chunk in open_texts(X) for text in chunk] == texts
        del X
        assert pa.total_allocated_bytes() - held < 1000  # it stays in the file


def test_no_more_than_one_chunk_of_texts_is_held(small_chunks):
    tracemalloc = pytest.importorskip("tracemalloc")
    layout = Layout((Segment(None, 0, "hidden", "mean", 1),))
    out = np.empty((2000, 1), dtype=np.float32)

    store, start = open_store(None), 0
    tracemalloc.start()
    for texts in open_texts(Corpus(2000)):
        rows = out[start : start + len(texts)]
        start += len(texts)
        for missing in store.look_up("", texts, layout, rows):
            values = np.array([[len(text)] for text in missing.texts], dtype=np.float32)
            missing.add(np.arange(len(values)), values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(out[:, 0], [len(text) for text in Corpus(2000)])
    assert peak < 2**21 < sum(map(len, Corpus(2000))) / 4


def test_a_text_at_fault_and_a_length_that_is_not_true_are_refused(small_chunks):
    with pytest.raises(ValueError, match=r"X\[40\] is a NoneType"):
        list(open_texts(pa.array(["fine"] * 40 + [None])))
    with pytest.raises(ValueError, match="holds 4 texts, but gives 3"):
        list(open_texts(Corpus(3, said=4)))
    # One that is too small would put texts into rows that are not there.
    too_many = Corpus(41, said=40)
    with pytest.raises(ValueError, match="holds 40 texts, but gives 41 or more"):
        transformer().fit(too_many).transform(too_many)


def test_a_dataset_on_disk_is_a_container_of_texts(small_chunks):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    for container in (dataset, dataset["text"]):
        assert [text for chunk in open_texts(container) for text in chunk] == TEXTS


def test_an_output_file_holds_what_memory_would(small_chunks, tmp_path):
    expected = transformer().fit_transform(TEXTS)
    for X in (TEXTS, pa.array(TEXTS)):
        mapped = transformer(output_folder=tmp_path / "new").fit_transform(X)
        np.testing.assert_allclose(mapped, expected, atol=1e-5)
        assert layout_of(mapped) == layout_of(mapped[3:9]) == layout_of(expected)
    (file,) = (tmp_path / "new").iterdir()  # the same texts, the same file
    np.testing.assert_array_equal(np.load(file, mmap_mode="r"), mapped)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0, 0] = 1
    for params, texts in [({}, TEXTS[:2]), ({}, TEXTS[1::-1]), ({"layers": 1}, TEXTS[:2])]:
        transformer(output_folder=tmp_path / "new", **params).fit_transform(texts)
    assert len(list((tmp_path / "new").iterdir())) == 1 + 3  # other texts or columns, others


def test_a_file_that_could_not_be_filled_is_removed_and_filled_from_the_store_later(
    tmp_path, monkeypatch
):
    params = {"output_folder": tmp_path / "out", "cache": tmp_path / "store", "batch_tokens": 20}
    with pytest.raises(ValueError, match="3 texts, but gives 2"):
        transformer(**params).fit_transform(Corpus(2, said=3))
    assert list((tmp_path / "out").iterdir()) == []
    resumed = transformer(**params).fit(TEXTS)
    monkeypatch.delattr("skspin._transformer.extract")  # no text goes through the model again
    assert resumed.transform(list(Corpus(2))).shape == (2, 48)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="needs forks and limits")
def test_a_disk_without_room_for_the_output_is_an_error_before_anything_is_computed(
    tmp_path, monkeypatch
):
    import resource

    fitted = transformer(output_folder=tmp_path / "out").fit(TEXTS)
    monkeypatch.delattr("skspin._transformer.extract")
    processes = multiprocessing.get_context("fork")
    here, there = processes.Pipe()

    def compute():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OSError, match="output_folder=.* has no room for 12 MB") as error:
            fitted.transform([str(i) for i in range(60_000)])
        there.send(str(error.value))

    child = processes.Process(target=compute)
    child.start()
    child.join()
    assert here.poll() and "Make room" in here.recv()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("folder", ["a file", "a file/in it", ""])
def test_an_output_folder_that_is_none_is_refused(tmp_path, folder):
    (tmp_path / "a file").touch()
    folder = f"{tmp_path / folder}" if folder else ""
    with pytest.raises(ValueError, match="output_folder=.*(is a file|names no folder)"):
        transformer(output_folder=folder).fit(TEXTS).transform(TEXTS)


def test_processes_map_the_same_file(tmp_path):
    def file_of(X):  # in here, so that it is pickled whole: workers can't import this module
        while not isinstance(X, np.memmap):
            X = X.base
        return str(X.filename)

    mapped = transformer(output_folder=tmp_path).fit_transform(TEXTS)
    (path,) = tmp_path.iterdir()
    with joblib.parallel_config(n_jobs=2):
        filenames = joblib.Parallel()(joblib.delayed(file_of)(mapped) for _ in range(2))
    assert filenames == [str(path)] * 2


def fit_under_a_limit(n_megabytes, folder):
    """Fit a selector in a process that may hold ``n_megabytes`` beyond what it starts with."""
    code = f"""
        import resource, numpy as np
        from skspin import SalientNeuronSelector
        from skspin._layout import ActivationArray, Layout, Segment

        rng = np.random.default_rng(0)
        n, width, n_layers = 16_000, 1024, 12  # 12 layers of 62 MB, 750 MB in all
        y = rng.integers(0, 2, n)
        path, shape = {str(folder / "X.npy")!r}, (n, width * n_layers)
        X = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        for start in range(0, n, 1000):
            X[start : start + 1000] = rng.standard_normal((1000, X.shape[1]), dtype=np.float32)
        X[:, 1300] += 4 * y
        X.flush()
        del X
        X = np.load(path, mmap_mode="r")
        small = SalientNeuronSelector(layer_sizes=None, C=0.01).fit(X[:50, 1290:1310], y[:50])
        with open("/proc/self/status") as status:
            held = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + {n_megabytes} * 2**20,) * 2)
        try:
            np.ones(X.shape, np.float32)
        except MemoryError:
            print("too large")
        layers = [Segment(None, layer, "mlp", "mean", width) for layer in range(n_layers)]
        X = ActivationArray(X, Layout(tuple(layers)))
        selector = SalientNeuronSelector(C=0.001, cache=None, tol=0.1).fit(X, y)
        print(selector.get_support(indices=True))
    """
    # BLAS has buffers for each of its threads.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
def test_a_selector_fits_from_a_file_larger_than_its_memory(tmp_path):
    # Well below what is promised, one layer's columns and 300 MB; a second layer has no room.
    run = fit_under_a_limit(230, tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:2] == ["too large", "[1300]"]


def test_a_head_learns_the_selected_columns_of_a_file_by_parts(tmp_path):
    texts = [f"{'fine' if i % 2 else 'bad'} film {i}" for i in range(80)]
    y = np.arange(80) % 2
    real = {"model": demo_model(), "tokenizer": None, "layers": [1, 2]}
    X = transformer(**real, output_folder=tmp_path).fit_transform(texts)
    selector = SalientNeuronSelector(C=0.1).fit(X, y)
    head = SGDClassifier(random_state=0)
    for rows in gen_batches(len(X), 20):
        head.partial_fit(selector.transform(X[rows]), y[rows], classes=[0, 1])
    assert head.score(selector.transform(X), y) > 0.9
