"""The page of a classification: a contact sheet by class, the images first whose class steering changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappush, heappushpop
from pathlib import Path
from typing import Any, NamedTuple

from vs2_plugin.classify.table import Row
from vs2_plugin.data.pictures import open_picture
from vs2_plugin.errors import DataError
from vs2_plugin.inspection.pictures import Thumbnail, thumbnail
from vs2_plugin.report.rendering import render, save

__all__ = ["Sheet"]

_MARK = "vs2 classify"
#: Pictures on a page, and of a class at most, and at least.
_PICTURES, _MOST, _LEAST = 300, 24, 4
#: Unreadable images that are named.
_NAMED = 50


class _Ranked(NamedTuple):
    """A row by how much there is to see in it."""

    changed: bool
    difference: float
    """Between the probabilities with steering and without; of a changed class, the new one's."""
    earlier: int
    row: Row


class Shown(NamedTuple):
    """An image on the page."""

    row: Row
    picture: Thumbnail | None


@dataclass
class _Class:
    """The images of one class."""

    name: str
    count: int = 0
    changed: int = 0
    ranked: list[_Ranked] = field(default_factory=list)
    """A heap of those that may be shown."""
    images: list[Shown] = field(default_factory=list)
    """Those that are shown, those with most to see first."""

    @property
    def more(self) -> int:
        """Images of the class that are not shown."""
        return self.count - len(self.images)

    def add(self, row: Row, number: int) -> None:
        """Count an image, and keep it if it is among those with most to see."""
        self.count += 1
        self.changed += row["changed"]
        change = row["probability"] - (0 if row["changed"] else row["plain_probability"])
        ranked = _Ranked(row["changed"], abs(change), -number, row)
        if len(self.ranked) < _MOST:
            heappush(self.ranked, ranked)
        else:
            heappushpop(self.ranked, ranked)


@dataclass
class Sheet:
    """What the page shows of a table."""

    classes: dict[str, _Class] = field(default_factory=dict)
    unreadable: list[Row] = field(default_factory=list)
    unreadable_count: int = 0

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Sheet:
        """Read the rows of a table. However many there are, few stay in memory."""
        sheet = cls()
        for number, row in enumerate(rows):
            if row.get("error"):
                sheet.unreadable_count += 1
                sheet.unreadable += [row] if len(sheet.unreadable) < _NAMED else []
            else:
                sheet.classes.setdefault(row["class"], _Class(row["class"])).add(row, number)
        return sheet

    @property
    def count(self) -> int:
        """Images that were read."""
        return sum(one.count for one in self.classes.values())

    @property
    def changed(self) -> int:
        """Images whose class steering changed."""
        return sum(one.changed for one in self.classes.values())

    def groups(self) -> list[_Class]:
        """The classes that are shown, those first in which steering changed most."""
        each = min(_MOST, max(_LEAST, _PICTURES // max(1, len(self.classes))))
        ordered = sorted(self.classes.values(), key=lambda one: (-one.changed, -one.count, one.name))
        for one in (shown := ordered[: _PICTURES // each]):
            rows = (ranked.row for ranked in sorted(one.ranked, reverse=True)[:each])
            one.images = [Shown(row, _picture(row["path"])) for row in rows]
        return shown

    def write(self, path: str | Path, title: Sequence[tuple[str, str]]) -> Path:
        """Write the page, which opens from disk and needs nothing else.

        Args:
            path: the file.
            title: names and values that say what was classified by what.

        Raises:
            DataError: a file is there that is no such page, or none can be written.
        """
        groups = self.groups()
        hidden = self.count - sum(group.count for group in groups)
        context: dict[str, Any] = {
            "sheet": self, "groups": groups, "title": title, "hidden": hidden,
            "hidden_classes": len(self.classes) - len(groups),
        }  # fmt: skip
        page = Path(path)
        files = {page.name: render("classify.html", _MARK, context)}
        return save(page.parent, files, _MARK, remedy="another file with --page")[0]


def _picture(path: str) -> Thumbnail | None:
    try:
        return thumbnail(open_picture(path))
    except DataError:  # it was there a moment ago
        return None
