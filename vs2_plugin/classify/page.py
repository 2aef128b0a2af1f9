"""The page of a classification: a contact sheet by class, which shows images whose class steering changed first."""

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
from vs2_plugin.report.rendering import render, require_place, save

__all__ = ["Sheet", "require_page"]

#: Mark near the beginning of the page, so that only such pages are overwritten.
_MARK = "vs2 classify"
#: Most pictures on a page, and most and fewest pictures of a class.
_PICTURES, _MOST, _LEAST = 300, 24, 4
#: What to do where the page cannot be written.
_REMEDY = "another file with --page"
#: Most unreadable images that are listed.
_NAMED = 50


def require_page(path: str | Path) -> None:
    """Raise DataError if :meth:`Sheet.write` could not write the file, before anything is classified."""
    require_place(Path(path).parent, (Path(path).name,), _MARK, remedy=_REMEDY)


class _Ranked(NamedTuple):
    """A row of the table, ordered by how much steering changed the prediction."""

    changed: bool
    difference: float
    """Change of the class's probability by steering, without sign; for a changed class, the new class's probability."""
    earlier: int
    """Minus the number of the row, so that the earlier of equal rows ranks higher."""
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
    """A heap of the rows that may be shown."""
    images: list[Shown] = field(default_factory=list)
    """The images that are shown, those with the largest change first."""

    @property
    def more(self) -> int:
        """Number of images of the class that are not shown."""
        return self.count - len(self.images)

    def add(self, row: Row, number: int) -> None:
        """Count an image, and keep its row if its change is among the largest."""
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
    """The contents of the page: classes with a selection of their images, and unreadable images."""

    classes: dict[str, _Class] = field(default_factory=dict)
    unreadable: list[Row] = field(default_factory=list)
    unreadable_count: int = 0

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Sheet:
        """Build a sheet from the rows of a table; only rows that may be shown stay in memory."""
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
        """Number of images that could be read."""
        return sum(group.count for group in self.classes.values())

    @property
    def changed(self) -> int:
        """Number of images whose class steering changed."""
        return sum(group.changed for group in self.classes.values())

    def groups(self) -> list[_Class]:
        """Return the classes that are shown, with their pictures; those with the most changed images come first."""
        each = min(_MOST, max(_LEAST, _PICTURES // max(1, len(self.classes))))
        ordered = sorted(self.classes.values(), key=lambda one: (-one.changed, -one.count, one.name))
        for one in (shown := ordered[: _PICTURES // each]):
            rows = (ranked.row for ranked in sorted(one.ranked, reverse=True)[:each])
            one.images = [Shown(row, _picture(row["path"])) for row in rows]
        return shown

    def write(self, path: str | Path, title: Sequence[tuple[str, str]]) -> Path:
        """Write the page as one file that opens from disk, and return its path.

        Args:
            path: the file to write.
            title: names and values that describe the model and the classification.

        Raises:
            DataError: another file of that name is there, or the file cannot be written.
        """
        groups = self.groups()
        hidden = self.count - sum(group.count for group in groups)
        context: dict[str, Any] = {
            "sheet": self, "groups": groups, "title": title, "hidden": hidden,
            "hidden_classes": len(self.classes) - len(groups),
        }  # fmt: skip
        page = Path(path)
        files = {page.name: render("classify.html", _MARK, context)}
        return save(page.parent, files, _MARK, remedy=_REMEDY)[0]


def _picture(path: str) -> Thumbnail | None:
    try:
        return thumbnail(open_picture(path))
    except DataError:  # the file has changed since it was classified
        return None
