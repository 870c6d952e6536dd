"""What docstrings and pages say is true: their examples run, and they name what is there."""

import ast
import doctest
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


def test_the_reference_lists_every_public_name():
    page = (ROOT / "docs/api.rst").read_text()
    listed = set(re.findall(r"^(?:   |\.\. data:: )(\w+)$", page, re.MULTILINE))
    assert listed >= set(skspin.__all__) | {"load_docstrings", "demo_model"}


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
