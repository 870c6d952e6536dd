"""Texts with coloured tokens, as HTML that reads well on light and on dark pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from skspin._texts import TextTokens

# Okabe and Ito's sky blue and vermilion, half transparent: on light and dark pages, text in the
# page's own colour stays legible over them.
_FOR, _AGAINST = "86,180,233", "213,94,0"
_DEEPEST = 0.65
_AROUND = 60  # characters before and after a single token
_LINE = "line-height:1.8;white-space:pre-wrap;overflow-wrap:anywhere"
_OUTSIDE = ";font-size:75%;border:1px dotted rgba(128,128,128,0.8);padding:0 3px;margin:0 2px"
_NOTE = '<div style="font-size:85%;opacity:0.75">'


def text_to_html(tokens: TextTokens, values: np.ndarray) -> str:
    """Write one text, its tokens blue for positive values and vermilion for negative ones."""
    unit = float(np.abs(values).max()) or 1.0  # what gets the deepest colour
    parts = []
    done = 0  # characters written
    for start, end, label, value in _pieces(tokens, values):
        if end > start:
            parts.append(escape(tokens.text[done:start]))
            done = end
        style = "" if end > start else _OUTSIDE
        parts.append(swatch(value / unit, escape(label), style, f"{value:+.3g}"))
    parts.append(escape(tokens.text[done:]))
    return f'<div style="{_LINE};margin:0.3em 0 0.8em 0">{"".join(parts)}</div>'


def token_to_html(text: str, start: int, end: int, value: float, *, unit: float) -> str:
    """Write one token, ``text[start:end]``, with some of the text around it."""
    before, behind = text[:start][-_AROUND:], text[end:][:_AROUND]
    before = before if len(before) == start else f"…{before}"
    behind = behind if len(behind) == len(text) - end else f"{behind}…"
    token = swatch(value / unit, escape(text[start:end]))
    number = f'<span style="font-size:75%;opacity:0.75">{value:.3g}</span>'
    return f'<div style="{_LINE}">{number}  {escape(before)}{token}{escape(behind)}</div>'


def page_to_html(legend: str, entries: Sequence[tuple[str, str]], n_left_out: int = 0) -> str:
    """Put entries, each a heading and its HTML, under one another."""
    parts = [f"{_NOTE}{legend}</div>"]
    for heading, body in entries:
        parts.append(f'<div style="font-size:85%;margin-top:0.6em">{heading}</div>{body}')
    if n_left_out:
        parts.append(f"{_NOTE}… and {n_left_out} more</div>")
    return f'<div style="max-width:60em">{"".join(parts)}</div>'


def swatch(share: float, label: str, style: str = "", title: str = "") -> str:
    """Put the colour of a value between -1 and 1 behind some HTML."""
    color = f"rgba({_FOR if share > 0 else _AGAINST},{min(abs(share), 1.0) * _DEEPEST:.2f})"
    style = f"border-radius:3px;background:{color}{style}"
    return f'<span style="{style}" title="{title}">{label}</span>'


def _pieces(tokens: TextTokens, values: np.ndarray) -> Iterator[tuple[int, int, str, float]]:
    """Join tokens that share characters, as the bytes of an emoji do."""
    i = 0
    while i < len(values):
        start, end, value = int(tokens.starts[i]), int(tokens.ends[i]), float(values[i])
        label = tokens.text[start:end] or tokens.tokens[i]
        i += 1
        while end > start and i < len(values) and tokens.in_text[i] and tokens.starts[i] < end:
            end, value = max(end, int(tokens.ends[i])), value + float(values[i])
            label = tokens.text[start:end]
            i += 1
        yield start, end, label, value
