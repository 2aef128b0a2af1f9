"""Labels: class numbers, checked when they are read. No heavy imports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from vs2_plugin.errors import DataError, SettingError

__all__ = [
    "CLASS_NAMES", "LONGEST_LABEL", "PROMPT", "TEMPLATES", "UNKNOWN", "Classes", "has_place", "read_label",
    "read_lines", "read_names",
]  # fmt: skip

#: The file of a webdataset folder that names its classes, one per line.
CLASS_NAMES = "classnames.txt"
#: The file beside it with the prompts, one per line, and CLIP's usual prompt, used without such a file.
TEMPLATES, PROMPT = "zeroshot_classification_templates.txt", "a photo of a {c}."
#: If the number of classes is unknown, labels must be below this bound, which exceeds that of any data set.
_MOST = 1_000_000
#: Bytes of a ``.cls`` file that are read.
LONGEST_LABEL = 64


def has_place(prompt: str) -> bool:
    """Tell whether a prompt has a place for the name of a class, and nothing else to be filled in.

    >>> [has_place(prompt) for prompt in ("a photo of a {c}.", "a photo", "{c} and {d}", "{c:>9}")]
    [True, False, False, False]
    """
    try:
        fields = [field for _, *field in Formatter().parse(prompt) if field[0] is not None]
    except ValueError:
        return False
    return bool(fields) and all(field == ["c", "", None] for field in fields)  # neither a format nor a conversion


def read_lines(file: str | os.PathLike[str], flag: str, what: str) -> list[str]:
    """Return the non-empty lines of a file, stripped. Raises SettingError, which names ``flag`` and ``what``."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise SettingError(f"{flag} {str(file)!r} {problem}; expected {what} per line") from None
    except UnicodeDecodeError:
        raise SettingError(f"{flag} {str(file)!r} is not UTF-8 text; expected {what} per line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_names(file: str | os.PathLike[str]) -> list[str]:
    """Return the class names in a file given by ``--classes``: its lines, or the names in lines FOLDER<tab>NAME, as in
    ``classnames.txt``.

    Raises:
        SettingError: the file cannot be read, or only some of its lines have a tab.
    """
    lines = read_lines(file, "--classes", "one name")
    if not any("\t" in line for line in lines):
        return lines
    for line in lines:
        if "\t" not in line:
            raise SettingError(
                f"--classes {str(file)!r}: {line!r} has no tab; expected FOLDER<tab>NAME as in other lines"
            )
    return [line.partition("\t")[2].strip() for line in lines]


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, which its labels number from 0."""

    count: int | None = None
    """Number of classes; None if unknown."""
    source: str = ""
    """File or data set that names the classes, for messages."""

    @classmethod
    def in_text(cls, text: str, source: str) -> Classes:
        """Return the classes that the text of a ``classnames.txt`` names, as clip_benchmark reads it."""
        return cls(len(text.splitlines()), source)

    @classmethod
    def in_folder(cls, root: Path) -> Classes:
        """Return the classes of a webdataset folder; ``UNKNOWN`` if it has no ``classnames.txt``.

        Raises:
            DataError: the file cannot be read, or names no class.
        """
        file = root / CLASS_NAMES
        try:
            classes = cls.in_text(file.read_text(encoding="utf-8", errors="replace"), str(file))
        except FileNotFoundError:
            return UNKNOWN
        except OSError as error:
            raise DataError(f"cannot read {file} ({error.strerror}); expected one class name per line") from None
        if not classes.count:
            raise DataError(f"{file} names no class; expected one class name per line")
        return classes

    def check(self, label: int, where: str) -> int:
        """Return ``label`` if it numbers one of the classes; else raise DataError, which begins with ``where``."""
        below = _MOST if self.count is None else self.count
        if 0 <= label < below:
            return int(label)
        reason = "no file names the classes" if self.count is None else f"{self.source} names {self.count:,} classes"
        raise DataError(f"{where}: the label is {label}; expected a class number from 0 to {below - 1} ({reason})")


UNKNOWN = Classes()


def read_label(data: bytes, classes: Classes, where: str) -> int:
    """Return the label that a ``.cls`` file holds. Raises DataError, which begins with ``where``."""
    try:
        label = int(data[:LONGEST_LABEL])
    except ValueError:
        raise DataError(f"{where} holds {data[:20]!r}; expected the number of a class") from None
    return classes.check(label, where)
