"""Tables of benchmarks: what the documentation shows of the rows that were measured."""

import importlib
from pathlib import Path

import pytest

MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "threads": 1,
    "instructions": "AVX2",
    "gpus": [],
    "python": "3.11.7",
    "versions": {"skspin": "0.1", "torch": "2.13"},
}


@pytest.fixture
def as_page(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return importlib.import_module("tables").as_page


def cells(page):
    rows = page.partition(":header-rows: 1")[2].split("   * - ")[1:]
    return [[cell.strip() for cell in row.partition("\n\n")[0].split("     -")] for row in rows]


def test_a_value_that_a_row_lacks_leaves_its_cell_empty(as_page):
    rows = [{"set": "a", "test": 0.96}, {"set": "b"}, {"set": "c", "test": None}]
    page = as_page(
        "accuracy", [{"machine": MACHINE, "rows": rows}], {"data": "{set}", "test": "{test:.3f}"}
    )
    assert cells(page) == [["data", "test"], ["a", "0.960"], ["b", ""], ["c", ""]]


def test_rows_show_their_own_names_where_no_columns_are_given(as_page):
    page = as_page("prune", [{"machine": MACHINE, "rows": [{"layers": 2, "ratio": 0.4}]}], {})
    assert cells(page) == [["layers", "ratio"], ["2", "0.4"]]


def test_settings_become_a_phrase(as_page):
    rows = [{"chosen": {"C": 0.001, "site": "mlp"}}]
    page = as_page("accuracy", [{"machine": MACHINE, "rows": rows}], {"chosen": "{chosen}"})
    assert cells(page)[1] == ["C 0.001, site mlp"]


def test_a_machine_is_described_once_for_all_parts_measured_on_it(as_page):
    parts = [
        {"machine": MACHINE | {"load": load}, "rows": [{"set": "a"}], "more": load}
        for load in (0.1, 0.9)
    ]
    page = as_page("accuracy", parts, {})
    assert page.count("Measured on a processor") == 1
    assert "torch 2.13" in page
    other = {"machine": MACHINE | {"threads": 2}, "rows": [{"set": "b"}]}
    assert as_page("accuracy", [*parts, other], {}).count("Measured on a processor") == 2


def test_an_overview_puts_each_figure_where_its_line_and_column_meet(as_page):
    rows = [
        {"set": "a", "method": "one", "test": 0.9},
        {"set": "b", "method": "one", "test": 0.8},
        {"set": "b", "method": "two", "test": 0.7},
    ]
    overview = ("On test texts", "method", "set", "{test:.1f}")
    columns = {"data": "{set}", "method": "{method}", "test": "{test:.2f}"}
    page = as_page("accuracy", [{"machine": MACHINE, "rows": rows}], columns, overview)
    first, of_a, of_b = page.split(".. list-table::")[1:]
    assert first.startswith(" On test texts\n")
    assert cells(first) == [["method", "a", "b"], ["one", "0.9", "0.8"], ["two", "", "0.7"]]
    assert page.count(".. dropdown::") == 2
    assert cells(of_a) == [["method", "test"], ["one", "0.90"]]
    assert cells(of_b) == [["method", "test"], ["one", "0.80"], ["two", "0.70"]]
