"""Rows of benchmarks as tables of the documentation."""

from __future__ import annotations


def as_page(name, records, columns, overview=None):
    """Write a table, with what it was measured on.

    Parameters
    ----------
    name : str
        The benchmark's.
    records : list of dict
        ``rows`` and ``machine`` of each of its parts.
    columns : dict of str
        A title and a format for each column; empty for the rows' own names and values.
    overview : tuple of str, length 4, default=None
        The caption of a smaller table that comes first, the row's key that it goes down by, the one
        that it goes across by, and the format of its cells. All columns then follow in a folded
        table for each value of the key that it goes across by.
    """
    rows = [row for record in records for row in record["rows"]]
    columns = columns or {
        key: f"{{{key}}}" for key in rows[0] if not isinstance(rows[0][key], list)
    }
    lines = [
        ".. This file is written by a command; what is changed here by hand is lost:",
        f"   python tests/benchmarks/run.py --data FOLDER --only {name}",
        "",
    ]
    if overview is None:
        lines += table(rows, columns)
    else:
        lines += [*overview_table(rows, *overview), *folded_tables(rows, columns, overview[2])]
    sentences = dict.fromkeys(describe(record["machine"]) for record in records)  # each one once
    return "\n".join([*lines, "", *sentences]) + "\n"


def overview_table(rows, caption, down, across, template):
    """Write one figure of each row where its column and its line meet."""
    columns = list(dict.fromkeys(row[across] for row in rows))
    lines = table_head([down, *columns], caption)
    for name in dict.fromkeys(row[down] for row in rows):
        figures = {row[across]: cell(row, template) for row in rows if row[down] == name}
        lines += table_row([name, *(figures.get(column, "") for column in columns)])
    return [*lines, ""]


def folded_tables(rows, columns, key):
    """Write a table for each value of a key, folded until somebody opens it, without that key."""
    columns = {title: template for title, template in columns.items() if template != f"{{{key}}}"}
    lines = []
    for value in dict.fromkeys(row[key] for row in rows):
        own = table([row for row in rows if row[key] == value], columns)
        lines += [f".. dropdown:: {value}: all figures and settings", ""]
        lines += [f"   {line}".rstrip() for line in own] + [""]
    return lines[:-1]


def table(rows, columns):
    """Write rows as a list-table, a column for each title and format."""
    lines = table_head(columns)
    for row in rows:
        lines += table_row(cell(row, template) for template in columns.values())
    return lines


def table_head(titles, caption=""):
    """Begin a list-table."""
    return [f".. list-table:: {caption}".rstrip(), "   :header-rows: 1", "", *table_row(titles)]


def table_row(cells):
    """Write one row of a list-table."""
    first, *others = cells
    return [f"   * - {first}", *(f"     - {other}".rstrip() for other in others)]


def cell(row, template):
    """Fill a row's values in; empty where it lacks one."""
    values = {name: in_words(value) for name, value in row.items()}
    try:
        return template.format(**values)
    except (KeyError, TypeError):  # a missing value, or None where a number is formatted
        return ""


def in_words(value):
    """Turn settings into a phrase; leave everything else as it is."""
    if not isinstance(value, dict):
        return value
    return ", ".join(
        f"{name} {format(v, 'g') if isinstance(v, float) else v}" for name, v in value.items()
    )


def describe(machine):
    """Say in a sentence what rows were measured on, as far as they tell."""
    facts = [
        machine.get("processor"),
        *(f"{name}: {machine[name]}" for name in ("cores", "threads") if name in machine),
        machine.get("instructions"),
        *machine.get("8 bits", []),
        *(machine.get("gpus") or ["no GPU"]),
        f"Python {machine['python']}" if "python" in machine else None,
        *(f"{name} {number}" for name, number in machine["versions"].items()),
    ]
    return f"Measured on {', '.join(fact for fact in facts if fact)}."
