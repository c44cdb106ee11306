"""Two states of a program side by side: sections, the lines that differ, and which are alike.

A node is shown as a row, ``module path<TAB>line``. Rows of one layer, or of one module outside the
layers, form a section; sections of the same path are diffed line by line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import groupby

Row = str
#: Runs of (kind, rows left, rows right). Kinds: ``=`` the same text, ``r`` the same but for names,
#: ``~`` the same op on other operands, ``!`` replaced.
Ops = tuple[tuple[str, int, int], ...]

NUMBERED = re.compile(r"(?:[^.]+\.)*?(\d+)(?=\.|$)")
_PLACEHOLDER = re.compile(r"%\w+ : [^=]* <- ")
_LEAF = re.compile(r"Leaf\(name=('[^']*')\)")
_KEYWORD = re.compile(r"\b(?:recipe|parts?|name|kind)=")
_NAME = re.compile(r"%(\w+)")
_DEFINED = re.compile(r"\t%([\w#]+)")
_LONG_NAME = re.compile(r"%([\w#]+)")


# --- rows ---------------------------------------------------------------------------------------

def _place(line: str, path: str, last: str) -> tuple[str, str]:
    """A line made shorter and the path that it is shown under; ``last`` is the node's before."""
    if _PLACEHOLDER.match(line):
        leaf = _LEAF.search(line)
        layer = NUMBERED.match(leaf.group(1)[1:-1]) if leaf else None
        short = _KEYWORD.sub("", _LEAF.sub(r"\1", line))
        return short, f"inputs.{layer.group()}" if layer else "inputs"
    if line.startswith("return"):
        return line, "outputs"
    return line, last if not path or path.startswith("_") else path


def rows_of(lines: Iterable[tuple[str, str]]) -> list[Row]:
    """``path<TAB>line`` per node; a node without a module joins the one before it."""
    rows, last = [], "top"
    for line, path in lines:
        line, path = _place(line, path, last)
        last = last if path.startswith(("inputs", "outputs")) else path
        rows.append(f"{path}\t{line}")
    layers = {path_of(row) for row in rows if row.startswith("inputs.")}
    return rows if len(layers) > 1 else [re.sub(r"^inputs[^\t]*", "inputs", r) for r in rows]


def path_of(row: Row) -> str:
    """Where a row is shown."""
    return row.partition("\t")[0]


def line_of(row: Row) -> str:
    """A row's node."""
    return row.partition("\t")[2]


@cache
def _layer(path: str) -> str:
    """The layer that a path lies in, or the path itself outside the layers."""
    found = NUMBERED.match(path)
    return found.group() if found else path


# --- differences --------------------------------------------------------------------------------

@dataclass
class Section:
    """Rows of a layer or module before and after."""

    path: str
    left: list[Row]
    right: list[Row]


def _sections(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Runs of rows of one layer or module, with its path."""
    return [(path, list(group)) for path, group in groupby(rows, lambda r: _layer(path_of(r)))]


def _align(before: list[Row], after: list[Row]) -> list[Section]:
    """Sections of a piece, those of the same path side by side, in order."""
    left, right = _sections(before), _sections(after)
    matcher = SequenceMatcher(None, [p for p, _ in left], [p for p, _ in right], False)
    sections = []
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            sections += [Section(a[0], a[1], b[1])
                         for a, b in zip(left[i:i_end], right[j:j_end], strict=True)]
        else:
            sections += [Section(path, rows, []) for path, rows in left[i:i_end]]
            sections += [Section(path, [], rows) for path, rows in right[j:j_end]]
    return sections


def line_ops(left: list[str], right: list[str]) -> Iterator[tuple[str, int, int]]:
    """Diff by text, and what differs there by text without names."""
    for tag, i, i_end, j, j_end in SequenceMatcher(None, left, right, False).get_opcodes():
        if tag == "equal":
            yield "=", i_end - i, j_end - j
            continue
        bare = [[_NAME.sub("%", line) for line in part] for part in (left[i:i_end], right[j:j_end])]
        for again, k, k_end, m, m_end in SequenceMatcher(None, *bare, False).get_opcodes():
            yield "~" if again == "equal" else "!", k_end - k, m_end - m


def _same_but_names(left: str, right: str, renamed: dict[str, str]) -> bool:
    """Whether two lines that differ in names only mean the same; notes the name they define."""
    a, b = _NAME.findall(left), _NAME.findall(right)
    own = left.startswith("%")
    same = all(renamed.get(x, x) == y for x, y in zip(a[own:], b[own:], strict=True))
    if own:
        renamed[a[0]] = b[0]
    return same


def split_renamed(section: Section, ops: Ops, renamed: dict[str, str]) -> Ops:
    """Turn the ``~`` rows whose operands are the same values under new names into ``r`` rows."""
    i, j, result = 0, 0, []
    for kind, n, m in ops:
        if kind == "~":
            same = [_same_but_names(line_of(a), line_of(b), renamed) for a, b
                    in zip(section.left[i:i + n], section.right[j:j + m], strict=True)]
            runs = [(flag, len(list(run))) for flag, run in groupby(same)]
            result += [("r" if flag else "~", size, size) for flag, size in runs]
        else:
            result.append((kind, n, m))
        i, j = i + n, j + m
    return tuple(result)


def canonical(section: Section) -> str:
    """Text that sections of like layers share: own number, own names, values from outside."""
    same = section.left == section.right
    text = "\n".join(section.left) + "\0" + ("=" if same else "\n".join(section.right))
    number = NUMBERED.match(section.path)
    if number:
        text = re.sub(rf"(?<=[._]){number.group(1)}(?=[._\t])", "#", text)
    own = set(_DEFINED.findall(text))
    seen: dict[str, str] = {}

    def rename(found: re.Match[str]) -> str:
        name = found.group(1)
        if name not in seen:
            base = name.rstrip("_0123456789") if name in own else "outside"
            given = "#" in name or name.startswith(("p_", "b_"))
            seen[name] = name if given else f"{base}:{len(seen)}"
        return seen[name]

    return _LONG_NAME.sub(rename, text)


def _defined(row: Row) -> str:
    """Name of the value that a row defines; ``return`` defines nothing and has no name."""
    line = line_of(row)
    return _NAME.match(line).group(1) if line.startswith("%") else ""


def compare(before: dict[str, list[Row]],
            after: dict[str, list[Row]]) -> Iterator[tuple[str, list[Section]]]:
    """Sections per piece.

    Where pieces change, a row goes to the piece that has its name now; the others make up the
    piece ``(folded)``.
    """
    if before.keys() != after.keys():
        owner = {_defined(row): piece for piece in reversed(after) for row in after[piece]}
        owner[""] = "(folded)"
        shared: dict[str, list[Row]] = {piece: [] for piece in after}
        for rows in before.values():
            for row in rows:
                shared.setdefault(owner.get(_defined(row), "(folded)"), []).append(row)
        before = shared
    for piece in before:
        yield piece, _align(before[piece], after.get(piece, []))
