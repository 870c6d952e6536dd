"""What docstrings and pages say is true: their examples run, and they name what is there."""

import ast
import doctest
import functools
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import skspin
import skspin.datasets

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for folder in (".", "user_guide", "how_to")
    for page in sorted((ROOT / "docs" / folder).glob("*.rst"))
]
README = ROOT / "README.md"
SOURCES = sorted((ROOT / "skspin").rglob("*.py"))
DATASETS = ("load_docstrings", "demo_model", "demo_llm")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(skspin.__path__, "skspin.")
    if not module.name.rpartition(".")[2].startswith("__")
]


ABOUT = doctest.register_optionflag("ABOUT")  # numbers may differ by 0.15
NUMBER = re.compile(r"-?\d+\.\d+")


class Checker(doctest.OutputChecker):
    """Compares output, of which numbers may depend on versions of what is installed."""

    def check_output(self, want, got, optionflags):
        if not optionflags & ABOUT:
            return super().check_output(want, got, optionflags)
        numbers = [np.array(NUMBER.findall(text), dtype=float) for text in (want, got)]
        want, got = (" ".join(NUMBER.sub("0", text).split()) for text in (want, got))
        return want == got and bool(np.allclose(*numbers, rtol=0, atol=0.15))


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_examples_in_pages_run(page):
    text = page.read_text()
    examples = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert doctest.DocTestRunner(checker=Checker()).run(examples).failed == 0


def test_the_reference_lists_every_public_name_and_leads_on():
    page = (ROOT / "docs/api.rst").read_text()
    listed = set(re.findall(r"^(?:   |\.\. data:: )(\w+)$", page, re.MULTILINE))
    assert listed >= {*skspin.__all__, *DATASETS}
    for name in {*skspin.__all__, *DATASETS} - {"TRUSTED_TYPES"}:  # a value, without a docstring
        documented = getattr(skspin if name in skspin.__all__ else skspin.datasets, name)
        for what in ("See Also\n", "Examples\n", ":doc:`/"):
            assert what in documented.__doc__, name


def strings_in(path):
    """Join the constant parts of every string in a source file, as users see them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_that_troubleshooting_explains_are_those_that_skspin_gives():
    given = "\n".join(text for path in (ROOT / "skspin").rglob("*.py") for text in strings_in(path))
    page = (ROOT / "docs/user_guide/troubleshooting.rst").read_text()
    explained = [
        phrase
        for term in re.findall(r"^(``.*)\n   \S", page, re.MULTILINE)
        for phrase in re.findall(r"``(.+?)``", term)
    ]
    assert len(explained) > 20
    assert [phrase for phrase in explained if phrase not in given] == []


def test_every_example_has_a_place_in_the_course(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    lessons = importlib.import_module("gallery_order").LESSONS
    sys.modules.pop("gallery_order")
    assert set(lessons) >= {path.name for path in (ROOT / "docs/examples").glob("*.py")}


@pytest.mark.parametrize("path", [*PAGES, README, *SOURCES], ids=name_of)
def test_pages_show_code_that_runs_or_says_that_it_is_only_shown_and_fits_the_column(path):
    text = path.read_text()
    lines = re.findall(r"^ *((?:>>>|\.\.\.) .*?)(?:  # doctest: .*)?$", text, re.MULTILINE)
    lines += "\n".join(re.findall(r"```(.*?)```", text, re.DOTALL)).split("\n")
    pattern = r"^\.\. code-block:: (\w+)\n((?:   :.+\n)*)\n((?:   .*\n|\n)+)"
    for language, options, block in re.findall(pattern, text, re.MULTILINE):
        assert language != "python" or ":caption: Only shown" in options
        lines += [line[3:] for line in block.splitlines()]
    assert [line for line in lines if len(line) > 79] == []
    # Pictures say in words what they show.
    options = re.findall(r"^ *\.\. (?:image|figure):: .+\n((?: +:.+\n)*)", text, re.MULTILINE)
    assert all(":alt:" in given for given in options)


def test_what_people_search_for_is_on_a_page():
    pages = "\n".join(page.read_text() for page in PAGES)
    terms = ("embedding", "hidden states", "GPU", "cache", "GridSearchCV", "guard")
    assert [term for term in terms if term not in pages] == []


def test_the_code_in_the_readme_runs(monkeypatch, capsys):
    few = functools.partial(skspin.datasets.load_docstrings, 20)
    monkeypatch.setattr(skspin.datasets, "load_docstrings", few)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    assert "select__sparsity" in capsys.readouterr().out


def test_a_bug_report_says_what_there_is_and_what_there_is_not(capsys):
    skspin.show_versions()
    report = capsys.readouterr().out
    assert f"skspin: {skspin.__version__}\n" in report
    for word in ("python", "platform", "scikit-learn", "torch", "transformers", 'dtype="auto"'):
        assert f"{word}: " in report
