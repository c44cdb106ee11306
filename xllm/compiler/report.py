"""What the passes did, for people: numbered text files, and one HTML page without a network.

The page holds a graph per pass as sections (a layer, or a module outside the layers), each a line
diff of its nodes' text. Layers that changed alike are one section with many members. Every line is
stored once, as a template and the numbers in it, so that 61 layers cost little more than one.
"""

from __future__ import annotations

import html as markup
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import groupby, pairwise
from pathlib import Path

from xllm.compiler.pipeline import PIPELINE
from xllm.compiler.report_diff import (
    NUMBERED,
    Ops,
    Row,
    Section,
    canonical,
    compare,
    line_of,
    line_ops,
    path_of,
    rows_of,
    split_renamed,
)
from xllm.compiler.runner import PassRecord
from xllm.errors import UserError

_SLOT = re.compile(r"(?<=[_.])(?:0|[1-9]\d{0,8})(?!\d)")
_SHOWN = ("key", "factors", "model", "schedule", "memory", "symbols", "buckets", "seconds")
_ASSETS = ("report.css", "report.js", "report_pass.js", "report_views.js")


class ReportError(UserError):
    """A report that cannot be written; names the directory."""


# --- text ---------------------------------------------------------------------------------------

def _fired(records: list[PassRecord]) -> Iterator[tuple[int, PassRecord]]:
    """The capture and the passes that changed something, with their places in the pipeline."""
    if records:
        yield 0, records[0]
    for index, (before, after) in enumerate(pairwise(records), start=1):
        if after.sites > 0 and after.snapshot != before.snapshot:
            yield index, after


def _listing(title: str, lines: list[tuple[str, str]]) -> str:
    """One piece: a comment per module, its nodes indented below it."""
    text = [title]
    for path, rows in groupby(rows_of(lines), key=path_of):
        text += ["", f"# {path}", *(f"    {line_of(row)}" for row in rows)]
    return "\n".join(text) + "\n"


def listings(records: list[PassRecord]) -> dict[str, str]:
    """``NN_pass/piece.txt`` → the graph after the capture and after each pass that fired."""
    return {
        f"{index:02d}_{record.name}/{piece}.txt":
            _listing(f"# {piece} after {record.name}: level {record.level}, sites {record.sites}",
                     lines)
        for index, record in _fired(records) for piece, lines in record.snapshot.items()
    }


def _index(records: list[PassRecord]) -> str:
    """The pass table as text."""
    head = f"{'pass':<34}{'level':<11}{'expected':>9}{'sites':>8}{'ms':>9}{'nodes':>8}  max error"
    rows = [
        f"{index:02d}_{r.name:<31}{r.level:<11}{'-' if r.expected is None else r.expected:>9}"
        f"{r.sites:>8}{r.milliseconds:>9.1f}{r.nodes:>8}"
        f"  {'not verified' if r.error is None else f'{r.error:.2e}'}"
        for index, r in enumerate(records)
    ]
    return "\n".join([head, *rows]) + "\n"


def dump(records: list[PassRecord], directory: Path) -> None:
    """Write the listings and ``index.txt`` below ``directory``; raises :class:`ReportError`."""
    try:
        for name, text in {"index.txt": _index(records), **listings(records)}.items():
            file = directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    except OSError as error:
        raise ReportError(f"cannot write the dump to {directory}: {error.strerror}") from error


# --- the page -----------------------------------------------------------------------------------

@dataclass
class _Page:
    """Tables that the page's data refers to by index."""

    templates: dict[str, int] = field(default_factory=dict)
    rows: dict[Row, int] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    diffs: dict[str, Ops] = field(default_factory=dict)

    def ids(self, rows: list[Row]) -> list[int]:
        """Indices of rows, each as the step from the one before."""
        ids = [0, *(self.rows[row] if row in self.rows else self._add(row) for row in rows)]
        return [b - a for a, b in pairwise(ids)]

    def _add(self, row: Row) -> int:
        template = _SLOT.sub("\x01", row)
        self.numbers.append(self.templates.setdefault(template, len(self.templates)))
        self.numbers += map(int, _SLOT.findall(row))
        return self.rows.setdefault(row, len(self.rows))

    def sections(self, sections: list[Section]) -> list[dict]:
        """Sections as data, alike ones as one with many members."""
        renamed: dict[str, str] = {}
        groups: dict[tuple[str, str, Ops], dict] = {}
        for section in sections:
            text = canonical(section)
            if text not in self.diffs:
                self.diffs[text] = tuple(line_ops([*map(line_of, section.left)],
                                                   [*map(line_of, section.right)]))
            ops = split_renamed(section, self.diffs[text], renamed)
            number = NUMBERED.match(section.path)
            title = section.path[:number.start(1)] + "#" if number else section.path
            group = groups.setdefault((title, text, ops), {
                "title": title, "ops": [x for op in ops for x in op], "members": []})
            group["members"].append([number.group(1) if number else "", self.ids(section.left),
                                     self.ids(section.right)])
        return list(groups.values())


def _passes(page: _Page, records: list[PassRecord]) -> list[dict]:
    """The pass table, with the sections of those that changed something."""
    docs = {item.name: item.doc for item in PIPELINE}
    fired = dict(_fired(records))
    states = [{piece: rows_of(lines) for piece, lines in r.snapshot.items()} for r in records]
    return [
        {"name": r.name, "level": r.level, "sites": r.sites, "expected": r.expected,
         "ms": round(r.milliseconds, 1), "nodes": r.nodes, "error": r.error,
         "doc": docs.get(r.name, ""),
         "pieces": [{"name": piece, "sections": page.sections(sections)} for piece, sections
                    in compare(states[max(i - 1, 0)], states[i])] if i in fired else []}
        for i, r in enumerate(records)
    ]


def html(records: list[PassRecord], manifest: dict) -> str:
    """One page, self-contained: summary, pass table, each pass before and after, schedule."""
    page = _Page()
    passes = _passes(page, records)
    final = {piece: page.ids(rows_of(lines)) for piece, lines in records[-1].snapshot.items()}
    pieces = {name: {k: v for k, v in piece.items() if k != "signature"}
              for name, piece in manifest["pieces"].items()}
    data = {"passes": passes, "final": final, "templates": list(page.templates),
            "lines": page.numbers,
            "manifest": {"pieces": pieces, **{name: manifest[name] for name in _SHOWN}}}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
    title = f"{manifest['model']['name']} on {manifest['factors']['target']['value']}"
    return _fill({"title": markup.escape(title), "data": text})


def _fill(values: dict[str, str]) -> str:
    """The page's template with its style, its code and ``values`` in their places."""
    folder = files("xllm.compiler")
    values |= {name: (folder / name).read_text() for name in _ASSETS}
    template = (folder / "report.html").read_text()
    return re.sub(r"\{\{([\w.]+)\}\}", lambda found: values[found.group(1)], template)
