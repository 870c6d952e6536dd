import numpy as np
import pytest

from skspin._store.digest import array_digest, text_digest

LARGE = np.random.default_rng(0).standard_normal((700, 900)).astype(np.float32)


def test_texts_differ_in_their_exact_code_points():
    texts = ["", "\0", "é", "e\u0301", "\ud800", "\udc00", "\ufffd", "a", "a "]
    assert len({text_digest(text) for text in texts}) == len(texts)
    assert all(len(text_digest(text)) == 16 for text in texts)


@pytest.mark.parametrize(
    "cut",
    [np.s_[:], np.s_[::2], np.s_[:, 100:484], np.s_[::-1], np.s_[3:4], np.s_[:, 5], np.s_[:, :0]],
    ids=str,
)
def test_an_array_cut_out_of_another_has_the_digest_of_its_copy(cut):
    assert array_digest(LARGE[cut]) == array_digest(LARGE[cut].copy())


def test_a_memory_map_has_the_digest_of_its_values(tmp_path):
    np.save(tmp_path / "rows.npy", LARGE)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert array_digest(mapped) == array_digest(LARGE)
    assert array_digest(mapped[:, 3:200]) == array_digest(LARGE[:, 3:200])


def test_fortran_order_has_a_digest_of_its_own_that_a_cut_keeps():
    fortran = np.asfortranarray(LARGE)
    assert array_digest(fortran) == array_digest(np.asfortranarray(LARGE.copy()))
    assert array_digest(fortran[:, 100:484]) == array_digest(np.asfortranarray(LARGE[:, 100:484]))


def test_shape_dtype_and_every_value_count():
    changed = LARGE.copy()
    changed[-1, -1] += 1
    arrays = [
        LARGE,
        changed,
        LARGE.reshape(900, 700),
        LARGE.reshape(-1),
        LARGE.view(np.int32),
        LARGE.T,
        np.zeros(0, np.float32),
        np.zeros((0, 3), np.float32),
        np.zeros(0),
        np.float32(0),
        np.zeros(1, np.float32),
        np.zeros((1, 1), np.float32),
    ]
    assert len({array_digest(array) for array in arrays}) == len(arrays)


def test_strings_have_a_digest_and_python_objects_have_none():
    assert array_digest(np.array(["a", "b"])) != array_digest(np.array(["a", "c"]))
    with pytest.raises(TypeError, match="astype"):
        array_digest(np.array(["a", None], dtype=object))
