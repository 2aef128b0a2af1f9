"""Tables and a figure of the study's runs.

    python benchmark_configs/strength/table.py DIR/report/runs.jsonl

writes results.md, results.json and figure.png beside the file, as the study itself does at its end. Runs hold the
evidence and the accuracy of each candidate, so that the choices are those of the rule as it is now.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from settings import GROUPS, METHODS

from vs2_plugin.strength import RULE, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LOSS", "NO_RUNS", "SAFE", "decide", "grid", "read", "summarize", "write"]

#: Points. A loss whose whole interval is below this is one.
LOSS = -0.3
#: What is said of a file without runs.
NO_RUNS = "{}: no runs in it; expected the runs.jsonl that python benchmark_configs/strength/run.py --out DIR writes"
#: Methods that promise not to lose to zero-shot.
SAFE = ("vs2 auto", "vs2s")


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a file, the first of each setting and seed. Lines that were cut short are left out, and runs of
    versions that did not score all candidates, or that had other evidence."""
    return [row for row in _lines(path).values() if "setting" in row]


def _lines(path: Path) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "setting" in row and not ("curves" in row and all(map(_has_evidence, row["choices"].values()))):
            continue
        found.setdefault((row["setting"], row["seed"]) if "setting" in row else number, row)
    return found


def _has_evidence(choice: Mapping[str, Any]) -> bool:
    return set(Scores._fields) <= set(choice)


def decide(row: Mapping[str, Any]) -> dict[str, Any]:
    """A run with the choices, and their accuracies, that the rule makes of its evidence."""
    choices, accuracy = dict(row["choices"]), dict(row["accuracy"])
    for method, curve in row["curves"].items():
        told = choices[method]
        index = RULE.pick(told["candidates"], Scores(**{name: told[name] for name in Scores._fields}))
        choices[method], accuracy[method] = {**told, "index": index}, curve[index]
    return {**row, "choices": choices, "accuracy": accuracy}


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean, and the ends of its 95 % t interval; None with fewer than two values."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def _paired(rows: Sequence[Mapping[str, Any]], method: str, other: str) -> dict[str, float | None]:
    pairs = [(row["accuracy"][method], row["accuracy"][other]) for row in rows]
    mean, low, high = interval([ours - theirs for ours, theirs in pairs])
    return {"mean": mean, "low": low, "high": high}


def summarize(rows: Sequence[Mapping[str, Any]], order: Sequence[str] = ()) -> dict[str, Any]:
    """All that the tables say, from the runs.

    Args:
        rows: as :func:`read` gives them.
        order: names of the settings; others are left out. By default all, in the order of their first run.
    """
    rows = [decide(row) for row in rows]
    names = list(order) or list(dict.fromkeys(row["setting"] for row in rows))
    settings = []
    for name in names:
        mine = sorted((row for row in rows if row["setting"] == name), key=lambda row: row["seed"])
        if not mine:
            continue
        methods = {}
        for method in METHODS:
            if all(method in row["accuracy"] for row in mine):
                values = [row["accuracy"][method] for row in mine]
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
                change = _paired(mine, method, "zero-shot")
                methods[method] = {"mean": float(np.mean(values)), "sd": spread, "change": change}
        chosen = {
            method: ["/".join(f"{value:g}" for value in _chosen(row["choices"][method]).values()) for row in mine]
            for method in mine[0]["choices"]
        }
        settings.append(
            {
                "setting": name, "group": mine[0]["group"], "seeds": len(mine), "images": mine[0]["images"],
                "test_images": mine[0]["test_images"], "purity": float(np.mean([row["purity"] for row in mine])),
                "fvu": float(np.mean([row["fvu"]["plain"] for row in mine])), "methods": methods, "chosen": chosen,
                "selective": _paired(mine, "vs2s", "vs2 auto"),
            }
        )  # fmt: skip
    groups = {group: [one for one in settings if one["group"] == group] for group in GROUPS}
    return {
        "runs": len(rows),
        "code": sorted({row["code"] for row in rows}),
        "settings": settings,
        "summary": {
            "losses": {method: _losses(settings, method) for method in SAFE},
            "losses_of_others": {
                method: len(_losses(settings, method)) for method in METHODS if method not in (*SAFE, "zero-shot")
            },
            "recovered": {method: _recovered(settings, method) for method in SAFE},
            "selective": _compared(settings),
            "means": {"all": _means(settings), **{group: _means(some) for group, some in groups.items() if some}},
        },
    }


def _chosen(choice: Mapping[str, Any]) -> Mapping[str, float]:
    return choice["candidates"][choice["index"]]


def _losses(settings: Sequence[Mapping[str, Any]], method: str) -> list[dict[str, Any]]:
    """Settings where the method loses to zero-shot, with the whole interval below :data:`LOSS`."""
    found = [(one["setting"], one["methods"][method]["change"]) for one in settings if method in one["methods"]]
    return [{"setting": name, **change} for name, change in found if change["high"] is not None
            and change["high"] < LOSS]  # fmt: skip


def _recovered(settings: Sequence[Mapping[str, Any]], method: str) -> dict[str, float | None]:
    """The pooled gain over zero-shot, beside that of the best strength in hindsight."""
    gain, best = (
        sum(one["methods"][name]["change"]["mean"] for one in settings) / max(len(settings), 1)
        for name in (method, "vs2 hindsight")
    )
    return {"gain": gain, "hindsight": best, "share": gain / best if best > 0 else None}


def _compared(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """vs2s against vs2 auto."""
    told = [one["selective"] for one in settings]
    mean, low, high = interval([one["mean"] for one in told])
    return {
        "settings": len(told),
        "higher": sum(one["mean"] > 0 for one in told),
        "equal": sum(one["mean"] == 0 for one in told),
        "lower": sum(one["mean"] < 0 for one in told),
        "surely_better": [one["setting"] for one in settings if (one["selective"]["low"] or 0) > 0],
        "surely_worse": [one["setting"] for one in settings if (one["selective"]["high"] or 0) < 0],
        "mean": mean, "low": low, "high": high,
    }  # fmt: skip


def _means(settings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each method that all of the settings have: mean accuracy, mean change and the worst change."""
    found = {}
    for method in METHODS:
        if all(method in one["methods"] for one in settings):
            told = [one["methods"][method] for one in settings]
            changes = [one["change"]["mean"] for one in told]
            accuracy = float(np.mean([one["mean"] for one in told]))
            found[method] = {"accuracy": accuracy, "change": float(np.mean(changes)), "worst": float(min(changes))}
    return found


# -- Markdown --------------------------------------------------------------------------------------------------------


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first column on the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"


def _between(told: Mapping[str, float | None]) -> str:
    if told["low"] is None:
        return _signed(told["mean"])
    return f"{_signed(told['mean'])} ({_signed(told['low'])} to {_signed(told['high'])})"


def markdown(results: Mapping[str, Any], half: str, sessions: Sequence[Mapping[str, Any]]) -> str:
    """The tables."""
    settings, summary = results["settings"], results["summary"]
    seeds = sorted({one["seeds"] for one in settings})
    told = f"{results['runs']} runs, {len(settings)} settings with {' or '.join(map(str, seeds))} seeds"
    parts = [f"# Strength: the {half} half", f"{told}. Accuracy in percent, changes in points over zero-shot."]
    for one in sessions:
        parts.append(
            f"{one['runs']} of the runs took {one['seconds'] / 60:.1f} minutes with {one['jobs']} jobs, on "
            f"{one['date']} ({one['cpu']}, {one['cores']} cores, load before {one['load_before'][0]})."
        )
    if len(results["code"]) > 1:
        parts.append(f"**The runs were made by {len(results['code'])} versions of the code.**")
    parts += ["## Summary", _summary(summary), "## Mean over settings", _means_table(summary["means"])]
    parts += ["Change over zero-shot by group:", _groups_table(summary["means"])]
    have = [method for method in METHODS if any(method in one["methods"] for one in settings)]
    parts += ["## Accuracy", "Mean ± standard deviation over seeds.", _accuracy_table(settings, have)]
    parts += ["## Change over zero-shot", "Mean of the paired differences, with the 95 % t interval over seeds."]
    parts += [_change_table(settings, have[1:]), "## What was chosen"]
    parts += [
        "Of each seed: alpha for vs2, p/alpha for vs2s. Purity is the share of an image's neighbours in the gallery "
        "that are of its true class; FVU is the SAE's on held-out images of the gallery.",
        _chosen_table(settings),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(summary: Mapping[str, Any]) -> str:
    lines = []
    for method, losses in summary["losses"].items():
        named = "".join(f"\n  - {one['setting']}: {_between(one)}" for one in losses)
        lines.append(f"- {method} loses to zero-shot, with the whole interval below {LOSS} points, in {len(losses)} "
                     f"settings{':' if losses else '.'}{named}")  # fmt: skip
    others = ", ".join(f"{method} {count}" for method, count in summary["losses_of_others"].items())
    lines.append(f"- The same of the others: {others}.")
    for method, one in summary["recovered"].items():
        share = "no gain" if one["share"] is None else f"{100 * one['share']:.0f} %"
        lines.append(
            f"- {method} gains {one['gain']:+.2f} points in the mean, vs2 at the best strength in hindsight "
            f"{one['hindsight']:+.2f}: {share} recovered."
        )
    one = summary["selective"]
    lines.append(
        f"- vs2s against vs2 auto, in {one['settings']} settings: higher in {one['higher']}, equal in {one['equal']}, "
        f"lower in {one['lower']}; with an interval without 0, better in {len(one['surely_better'])} and worse in "
        f"{len(one['surely_worse'])}. Mean difference {one['mean']:+.2f}"
        + (f" (95 % t interval over settings {one['low']:+.2f} to {one['high']:+.2f})." if one["low"] is not None
           else ".")
    )  # fmt: skip
    lines += [f"  - better: {name}" for name in one["surely_better"]]
    lines += [f"  - worse: {name}" for name in one["surely_worse"]]
    return "\n".join(lines)


def _means_table(means: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    rows = [[name, _points(one["accuracy"]), _signed(one["change"]), _signed(one["worst"])]
            for name, one in means["all"].items()]  # fmt: skip
    return grid(["method", "accuracy", "change", "worst change"], rows)


def _groups_table(means: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    groups = [group for group in means if group != "all"]
    rows = []
    for method in METHODS:
        told = [means[group].get(method, {}).get("change") for group in groups]
        if any(value is not None for value in told) and method != "zero-shot":
            rows.append([method, *map(_signed, told)])
    return grid(["method", *groups], rows)


def _accuracy_table(settings: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    def cell(one: Mapping[str, Any] | None) -> str:
        if one is None:
            return "-"
        return _points(one["mean"]) + ("" if one["sd"] is None else f" ± {one['sd']:.1f}")

    rows = [[one["setting"], *(cell(one["methods"].get(method)) for method in methods)] for one in settings]
    return grid(["setting", *methods], rows)


def _change_table(settings: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    def cell(one: Mapping[str, Any] | None) -> str:
        return "-" if one is None else _between(one["change"])

    rows = [[one["setting"], *(cell(one["methods"].get(method)) for method in methods)] for one in settings]
    return grid(["setting", *methods], rows)


def _chosen_table(settings: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            one["setting"], str(one["images"]), str(one["test_images"]), f"{one['purity']:.2f}", f"{one['fvu']:.2f}",
            *("; ".join(one["chosen"].get(method, ["-"])) for method in SAFE),
        ]
        for one in settings
    ]  # fmt: skip
    return grid(["setting", "images", "test images", "purity", "FVU", *SAFE], rows)


#: Methods of the figure, from the top of a row to its bottom -> marker, colour and words.
_DRAWN = {
    "vs2 hindsight": ("|", "#616c79", "vs2, best strength in hindsight"),
    "vs2": ("x", "#b54e00", "vs2, the paper's strength"),
    "vs2 auto": ("o", "#0072b2", "vs2@alpha=auto"),
    "vs2s": ("^", "#008a63", "vs2s"),
}
#: Groups of settings that share a row of the figure; those at the centre have one each.
_ROWS = {
    "CLIP": "other CLIPs",
    "classes": "uneven or missing classes",
    "gallery": "fewer images",
    "latents": "more or fewer latents",
    "k": "other k",
}


def _by_row(settings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Row of the figure -> source -> settings; single settings first, those that gain most at the top."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for one in settings:
        source, _, what = one["setting"].partition(", ")
        row = what or source if one["group"] == "centre" else _ROWS[one["group"]]
        found.setdefault(row, {}).setdefault(source, []).append(one)

    def gain(row: str) -> float:
        return float(np.mean([_change(one, "vs2 hindsight") for some in found[row].values() for one in some]))

    groups = list(_ROWS.values())
    rows = sorted(found, key=lambda row: (groups.index(row) if row in groups else -1, -gain(row)))
    return {row: found[row] for row in rows}


def _change(one: Mapping[str, Any], method: str) -> float:
    return float(one["methods"][method]["change"]["mean"])


def figure(results: Mapping[str, Any], path: Path) -> None:
    """Change over zero-shot, a panel for each source: a row for each kind of images, and one for each other factor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _by_row(results["settings"])
    sources = list(dict.fromkeys(source for some in rows.values() for source in some))
    drawn = Figure(figsize=(8.3, 1.6 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(1, len(sources), sharex=True, sharey=True, squeeze=False)[0]
    for axes, source in zip(panels, sources, strict=True):
        axes.set_title(source, loc="left", fontsize=10, fontweight="bold")
        axes.set_title("zero-shot", loc="right", fontsize=9, color="0.4")
        axes.axvline(0, color="0.6", linewidth=0.8)
        for place, some in enumerate(rows.values()):
            if place % 2:
                axes.axhspan(place - 0.5, place + 0.5, color="0.96", linewidth=0)
            _draw_row(axes, place, some.get(source, []))
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel("change of accuracy, points")
    panels[0].set_yticks(range(len(rows)), list(rows), fontsize=10)
    low, high = panels[0].get_xlim()
    panels[0].set_xlim(low, high + 0.15 * (high - low))  # room for the accuracies
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    handles = [panels[0].plot([], [], mark, color=colour, label=words)[0] for mark, colour, words in _DRAWN.values()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    drawn.savefig(path, dpi=200)


def _draw_row(axes: Axes, place: int, settings: Sequence[Mapping[str, Any]]) -> None:
    """Draw the mean of some settings for each method, and pale marks for each where there are several."""
    if not settings:
        return
    for number, (method, (marker, colour, _)) in enumerate(_DRAWN.items()):
        told = [_change(one, method) for one in settings]
        height = place - 0.27 + 0.18 * number
        if len(told) > 1:
            axes.plot(told, [height] * len(told), ".", color=colour, alpha=0.35, markersize=4)
        axes.plot(np.mean(told), height, marker, color=colour, markersize=6)
    plain = np.mean([one["methods"]["zero-shot"]["mean"] for one in settings])
    axes.annotate(
        f"{plain:.0f} %", (1, place), xycoords=axes.get_yaxis_transform(), xytext=(0, 0), textcoords="offset points",
        horizontalalignment="right", verticalalignment="center", fontsize=9, color="0.4",
    )  # fmt: skip


def write(folder: Path, half: str, order: Sequence[str] = ()) -> str:
    """Write tables and figure of the runs in a folder; the summary, in words."""
    path = folder / "runs.jsonl"
    results = summarize(read(path), order)
    sessions = [row["session"] for row in _lines(path).values() if "session" in row]
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown(results, half, sessions), encoding="utf-8")
    figure(results, folder / "figure.png")
    return f"{_summary(results['summary'])}\nwrote {folder / 'results.md'}, results.json and figure.png"


def main() -> None:
    """Read the command line, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", type=Path, help="the study's runs.jsonl")
    args = parser.parse_args()
    if not read(args.runs):
        parser.error(NO_RUNS.format(args.runs))
    folder = args.runs.resolve().parent
    print(write(folder, folder.name))


if __name__ == "__main__":
    main()
