"""Sums up a group of results in sentences: what steering changed, by how much, and whether that is beyond chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from vs2_plugin.report.rendering import fixed
from vs2_plugin.report.rows import Row
from vs2_plugin.report.summary import Group
from vs2_plugin.text import counted

__all__ = ["Verdict", "verdict"]


#: Protocol by which a method sees other test images -> these images in words.
_OTHERS = {"stream": "earlier test images", "transductive": "all test images at once"}


@dataclass(frozen=True)
class Verdict:
    """The summary of a group, which stands first in the report."""

    sentences: tuple[str, ...]
    """The first says what steering changed, the second which label-free row is best; or why that is not known."""
    tone: str = ""
    """``up`` or ``down`` where the change is beyond chance, else empty."""
    short: str = ""
    """A short form, for a list of several verdicts."""
    best: Row | None = None
    """The label-free row that gains most; None if none gains."""


def verdict(group: Group) -> Verdict | None:
    """Return the verdict on a group; None where there is no steered result."""
    unlabeled = _unlabeled(group)
    free = _own_images_only(unlabeled)
    usual = next(iter(sorted(free, key=lambda row: row.run.method != "vs2") or group.steered), None)
    if usual is None:
        return None
    before = usual.members[0].zero
    if before is None:
        return _not_compared(usual, group)
    changed = [row for row in free if row.change is not None]
    first, tone, short = _headline(usual, float(before.metrics["acc1"]), changed)
    sentences = [first]
    best = max(changed, key=lambda row: (row.change or 0.0, row.change_interval is not None), default=None)
    if best is not None:
        sentences.append(_best(best, usual, changed))
    if best is not None and best is not usual:
        short += f"; best without labels {best.title} {_points(best)}"
    sentences += _of_others(unlabeled)
    gains = best is not None and (best.change or 0.0) > 0
    return Verdict(tuple(sentences), tone, short, best if gains else None)


def _not_compared(usual: Row, group: Group) -> Verdict:
    accuracy = f"{usual.title}: top-1 accuracy {fixed(usual.top1)} %{_seeds(usual)}."
    same = " of the same split" if group.zero else ""  # earlier versions named no split for plain models
    missing = f"What steering changed is not known: there is no zero-shot result of {group.backbone}{same}."
    return Verdict((accuracy, missing), short=f"{usual.label} {fixed(usual.top1)} %")


def _headline(usual: Row, before: float, changed: Sequence[Row]) -> tuple[str, str, str]:
    """Return a sentence on what steering changed, its tone, and its short form. In a sweep without the default setting,
    no point stands for the others: the sentence gives their range."""
    run, given = usual.run, usual.run.parts.given
    alike = [row for row in changed if row.run.method == run.method and row.run.parts.given.keys() == given.keys()]
    if not given or len(alike) < 3:
        return _did(usual, before), _tone(usual), f"{usual.label} {_points(usual)}"
    changes = [100 * (row.change or 0.0) for row in alike]
    words = " ".join(f"@{name}" for name in given)
    sentence = (
        f"{len(alike)} settings of {run.method} ({words}) change top-1 accuracy by {min(changes):+.2f} to "
        f"{max(changes):+.2f} points; the default setting is not among them."
    )
    return sentence, "", f"{run.method}, {len(alike)} settings"


def _unlabeled(group: Group) -> list[Row]:
    """Return the rows without labels, but for those whose files were changed after they were written."""
    return [row for row in group.steered if row.run.labels == "none" and not row.is_changed]


def _own_images_only(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that see no other test images."""
    return [row for row in rows if row.run.protocol not in _OTHERS]


def _of_others(rows: Sequence[Row]) -> list[str]:
    """Return a sentence on the best row of each protocol that sees other test images."""
    sentences = []
    for protocol, words in _OTHERS.items():
        seen = [row for row in rows if row.run.protocol == protocol and row.change is not None]
        if seen:
            best = max(seen, key=lambda row: row.change or 0.0)
            sentences.append(f"Of those that see {words}, which is a different setting: {best.title}, {_points(best)} "
                        "points.")
    return sentences


def _did(row: Row, before: float) -> str:
    """Return a sentence on a row's change of the accuracy, with its interval, and whether that is beyond chance."""
    change = row.change or 0.0
    verb = "raises" if change > 0 else "lowers" if change < 0 else "leaves"
    moved = f"from {fixed(before)} % to {fixed(row.top1)} %" if change else f"at {fixed(before)} %"
    by = f": by {fixed(abs(change))} points" if change else ""
    used = "" if row.run.labels == "none" else f", which used labels ({row.run.labels}),"
    return f"{row.title}{used} {verb} top-1 accuracy {moved}{by}{_interval(row)}{_seeds(row)}. {_chance(row)}"


def _interval(row: Row) -> str:
    ends = row.change_interval
    return f" (95 % interval {fixed(ends.low, 1, True)} to {fixed(ends.high, 1, True)})" if ends else ""


def _seeds(row: Row) -> str:
    if row.spread is None:
        return ""
    return f", on average over {len(row.members)} seeds of the SAE (standard deviation {fixed(row.spread, 1)})"


def _excludes_zero(row: Row) -> bool:
    ends = row.change_interval
    return ends is not None and not ends.low <= 0 <= ends.high


def _tone(row: Row) -> str:
    if row.change_interval is None or not _excludes_zero(row) or _are_few(row):
        return ""
    return "up" if row.change_interval.low > 0 else "down"


def _are_few(row: Row) -> bool:
    """Return whether so few images changed that McNemar's exact test gives p >= 0.05: the bootstrap interval is too
    narrow then."""
    mended, broken = round(row.mended or 0), round(row.broken or 0)
    return row.change_interval is not None and binomtest(min(mended, broken), max(mended + broken, 1)).pvalue >= 0.05


def _chance(row: Row) -> str:
    if any(member.is_of_other_images for member in row.members):
        return "Zero-shot was evaluated on other images, or with other class names: the change may come from that."
    if row.change_interval is not None and row.mended == row.broken == 0:
        return "No image became right or wrong."
    if row.change_interval is None:
        return "Whether that is beyond chance is not known: there are no per-image results to compare."
    if _tone(row):
        return "That is beyond chance: the interval excludes 0."
    if _excludes_zero(row):
        return "That may be chance: too few images changed to say more."
    return "That may be chance: the interval includes 0."


def _best(best: Row, usual: Row, changed: Sequence[Row]) -> str:
    among, equal = len(changed), sum(row.change == best.change for row in changed) - 1
    rows, tied = counted(among, "row"), f" (with {counted(equal, 'other')})" if equal else ""
    if among > 1 and (best.change or 0.0) <= 0:
        return f"None of the {rows} without labels gains anything; {best.title} comes closest ({_points(best)})."
    if best is usual:
        return f"It is the best of the {rows} without labels{tied}." if among > 1 else "It used no labels."
    doubt = "which may be chance" if best.change_interval else "with no interval, for lack of per-image results"
    few = ", since few images changed" if _excludes_zero(best) else ""
    chance = "beyond chance" if _tone(best) else doubt + few
    return (
        f"Best without labels: {best.title} with {fixed(best.top1)} %, {_points(best)} points{_interval(best)}"
        f"{_seeds(best)}, {chance}. It is the best of {rows}{tied} on these very test images: on others, expect less."
    )


def _points(row: Row) -> str:
    return fixed(row.change, sign=True)
