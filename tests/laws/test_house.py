"""The floor plan holds: folders are entered by their doors, and imports run one way."""

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import skspin

ROOT = Path(skspin.__file__).parent
FILES = {
    ".".join(("skspin", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in ROOT.rglob("*.py")
}


def imports_of(name, *, at_once):
    """List the modules of skspin that a file imports, in its functions too or only at once."""
    tree = ast.parse(FILES[name].read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("skspin"):
            for alias in node.names:
                longest = f"{node.module}.{alias.name}"
                exported = getattr(importlib.import_module(node.module), "__all__", ())
                yield longest if longest in FILES and alias.name not in exported else node.module


def folder_of(name):
    """Name the folder that a module of a folder is in."""
    return ".".join(name.split(".")[:2])


def test_a_folder_is_entered_by_its_door():
    past = [
        (name, imported)
        for name in FILES
        for imported in imports_of(name, at_once=False)
        if imported.count(".") > 1 and folder_of(imported) != folder_of(name)
    ]
    assert past == []


def test_no_file_imports_what_imports_it():
    door = {name.removesuffix(".__init__"): name for name in FILES}
    graph = {
        name: {door[imported] for imported in imports_of(name, at_once=True)} - {name}
        for name in FILES
    }
    TopologicalSorter(graph).prepare()  # which raises if there is a circle


def test_there_are_few_files_and_few_of_them_lie_loose():
    assert len(FILES) <= 52
    assert len([path for path in ROOT.glob("*.py") if path.name != "__init__.py"]) <= 13
