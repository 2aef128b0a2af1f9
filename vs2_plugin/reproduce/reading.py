"""Reads a table of the paper, written down in YAML, into its cells.

A file names what the columns and rows are, and the published numbers; ``benchmark_configs/paper/README.md`` says how.
Whatever is wrong in it is one line, with the file's name and the place. No heavy imports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vs2_plugin.errors import ModelStringError, SettingError
from vs2_plugin.modelstring import ModelString, is_steered, parse
from vs2_plugin.reproduce.cells import METRICS, Cell, Sae, Table
from vs2_plugin.text import one_line

__all__ = ["FLAGS", "read", "read_all"]

#: Flags of ``vs2-train-sae`` that a file may set -> what their values are. A list: one or several words.
FLAGS = {
    "recipe": ("default", "paper"),
    "blocks": list,
    "expansion_factor": int,
    "k": int,
    "activation": ("relu", "abs"),
    "lr": float,
    "warmup": float,
    "samples": int,
    "sae_batch_size": int,
    "auxk": float,
    "init": ("data", "random"),
    "pass_weight": float,
    "pass_means": ("batch", "running"),
    "dead_after": int,
    "calibrate_on": list,
    "gallery_labels": bool,
    "retrieval_encoder": list,
    "max_images": int,
    "no_amp": bool,
}
#: What may stand at the top of a file, in a column and in a row. A row goes before a column, a column before the top;
#: those with several values, sae and options, are merged.
_SETTINGS = ("model", "options", "backbone", "dataset", "prompts", "metric", "class", "seeds", "sae", "train_on")
_TOP = ("title", "source", "notes", "transductive", "columns", "rows", "published", *_SETTINGS)
#: The word for clip_benchmark's own prompts.
_HARNESS = "harness"


def read_all(paths: Iterable[Path]) -> list[Table]:
    """Read files, and those in folders.

    Raises:
        SettingError: what is wrong, with the file and the place.
    """
    files = []
    for path in paths:
        found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not found:
            raise SettingError(
                f"no *.yaml in the folder {path}; expected tables such as those of benchmark_configs/paper"
            )
        files += found
    files = list({file.resolve(): file for file in files}.values())
    stems = [file.stem for file in files]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise SettingError(f"two files are called {twice[0]!r}, and would write the same table; rename one")
    return [read(file) for file in files]


def read(path: Path) -> Table:
    """Read a file.

    Raises:
        SettingError: what is wrong, with the file and the place.
    """
    return _Reader(path).table()


class _Reader:
    """Reads one file; every complaint names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, place: str, problem: str) -> SettingError:
        return SettingError(f"{self.path}: {place}: {problem}")

    def table(self) -> Table:
        top = self.mapping(_load(self.path), "the file")
        self.known(top, _TOP, "at the top")
        for needed in ("title", "columns", "rows"):
            if needed not in top:
                raise self.wrong("at the top", f"no {needed!r}; expected title, columns, rows and their settings")
        texts = {name: self.text(top.get(name, ""), name) for name in ("title", "source")}
        notes = tuple(self.text(note, "notes") for note in self.list(top.get("notes", []), "notes"))
        transductive = [self.text(name, "transductive") for name in self.list(top.get("transductive", []), "")]

        parts = {}
        for kind in ("columns", "rows"):
            parts[kind] = self.mapping(top[kind], kind)
            for title, settings in parts[kind].items():
                parts[kind][title] = self.mapping({} if settings is None else settings, f"{kind}: {title}")
                self.known(parts[kind][title], (*_SETTINGS, "best_of") if kind == "rows" else _SETTINGS,
                           f"{kind}: {title}")  # fmt: skip
            if not parts[kind]:
                raise self.wrong(kind, "is empty")
        columns, rows = parts["columns"], parts["rows"]
        published = self.published(top.get("published") or {}, rows, columns)
        above = {name: top[name] for name in _SETTINGS if name in top}
        cells = tuple(
            self.cell(
                row, column, [above, columns[column], rows[row]], published.get(row, {}).get(column), transductive
            )
            for row in rows
            for column in columns
        )
        self.best_of(cells)
        return Table(self.path, texts["title"], texts["source"], notes, cells)

    def best_of(self, cells: Iterable[Cell]) -> None:
        """Refuse rows that cannot be the best of those they name."""
        found = {(cell.row, cell.column): cell for cell in cells}
        for cell in found.values():
            for row in cell.best_of:
                other = found.get((row, cell.column))
                if other is None or other.model is None or other.metric != cell.metric or cell.metric == "fvu":
                    raise self.wrong(
                        f"rows: {cell.row}: best_of",
                        f"{row!r}; expected other rows that are run, of the same metric: accuracy, coverage or gain",
                    )

    def published(self, given: Any, rows: Mapping, columns: Mapping) -> dict[str, dict[str, Any]]:
        """Row -> column -> published number."""
        found = {}
        for row, values in self.mapping(given, "published").items():
            place = f"published: {row}"
            if row not in rows:
                raise self.wrong(place, f"there is no such row; the rows: {', '.join(rows)}")
            values = self.list(values, place)
            if len(values) != len(columns):
                raise self.wrong(
                    place, f"{len(values)} numbers for {len(columns)} columns ({', '.join(columns)}); null for none"
                )
            for column, value in zip(columns, values, strict=True):
                found.setdefault(row, {})[column] = self.number(value, f"{place}: {column}")
        return found

    def number(self, value: Any, place: str) -> float | tuple[float, float] | None:
        if value is None or (_is(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, list) and len(value) == 2 and all(_is(one, float) and math.isfinite(one) for one in value):
            if value[0] <= value[1]:
                return tuple(value)
        raise self.wrong(place, f"{value!r}; expected a number, an interval [low, high], or null")

    def cell(
        self,
        row: str,
        column: str,
        levels: list[dict[str, Any]],
        published: Any,
        transductive: list[str],
    ) -> Cell:
        place = f"row {row!r}, column {column!r}"
        given: dict[str, Any] = {
            "metric": "accuracy",
            "prompts": _HARNESS,
            "class": None,
            "train_on": None,
            "seeds": [0],
            "best_of": [],
        }
        merged: dict[str, dict[str, Any]] = {"sae": {}, "options": {}}
        for level in levels:
            given |= level
            for name, settings in merged.items():
                settings |= self.mapping(level.get(name) or {}, f"{place}: {name}")
        best_of = tuple(self.text(one, f"{place}: best_of") for one in self.list(given["best_of"], f"{place}: best_of"))
        if best_of:
            if "model" in levels[-1]:
                raise self.wrong(place, "best_of takes its number from other rows; leave out model")
            given["model"] = None
        for needed in ("model", "backbone", "dataset"):
            if needed not in given:
                raise self.wrong(place, f"no {needed!r}, neither in the row nor in the column nor at the top")
        if given["metric"] not in METRICS:
            raise self.wrong(place, f"metric {given['metric']!r}; expected {', '.join(METRICS)}")
        if given["class"] is not None and given["metric"] != "gain":
            raise self.wrong(place, "a class belongs to the metric gain")
        backbone, comma, weights = self.text(given["backbone"], f"{place}: backbone").partition(",")
        if not comma or is_steered(backbone):
            raise self.wrong(place, f"backbone {given['backbone']!r}; expected MODEL,WEIGHTS with a plain model")
        dataset = self.text(given["dataset"], f"{place}: dataset")
        train_on = given["train_on"] or [dataset]
        datasets = tuple(self.text(name, f"{place}: train_on") for name in self.list(train_on, f"{place}: train_on"))
        model = given["model"]
        if model is not None:
            model = self.text(model, f"{place}: model").replace("{backbone}", backbone)
            model += "".join(f"@{key}={value}" for key, value in merged["options"].items())
        spec = self.spec(model, backbone, place)
        has_sae = spec is not None and spec.method.needs_checkpoint
        fits = {"accuracy": True, "fvu": has_sae}.get(given["metric"], spec is not None)
        if model is not None and not fits:
            raise self.wrong(place, f"metric {given['metric']} is not of the plain model {model!r}")
        seeds = self.seeds(given["seeds"], f"{place}: seeds")
        flags = self.flags(merged["sae"], f"{place}: sae")
        trained = Sae(backbone, weights, datasets, flags, any(name in transductive for name in datasets))
        return Cell(
            row,
            column,
            given["metric"],
            published,
            model,
            backbone,
            weights,
            dataset,
            self.prompts(given["prompts"], f"{place}: prompts"),
            trained if has_sae else None,
            seeds if has_sae else (0,),
            None if given["class"] is None else self.text(given["class"], f"{place}: class"),
            best_of,
        )

    def spec(self, model: str | None, backbone: str, place: str) -> ModelString | None:
        if model is None or not is_steered(model):
            if model not in (None, backbone):
                raise self.wrong(place, f"model {model!r} is not of backbone {backbone!r}; write {{backbone}} for it")
            return None
        try:
            spec = parse(model)
        except ModelStringError as error:
            raise self.wrong(place, str(error)) from None
        if spec.backbone != backbone:
            raise self.wrong(place, f"model {model!r} is not of backbone {backbone!r}; write {{backbone}} for it")
        if spec.checkpoint:
            raise self.wrong(place, f"model {model!r} names a checkpoint; leave it out: sae says how it is trained")
        return spec

    def prompts(self, value: Any, place: str) -> tuple[str, ...]:
        if value == _HARNESS:
            return ()
        prompts = [self.text(one, place) for one in (value if isinstance(value, list) else [value])]
        if not prompts or not all("{c}" in prompt for prompt in prompts):
            raise self.wrong(place, f"{value!r}; expected prompts with {{c}} for the class, or the word {_HARNESS}")
        return tuple(prompts)

    def seeds(self, value: Any, place: str) -> tuple[int, ...]:
        good = isinstance(value, list) and value and all(_is(one, int) and 0 <= one < 2**32 for one in value)
        if not good or len(set(value)) < len(value):
            raise self.wrong(place, f"{value!r:.80}; expected a list of different whole numbers, at least 0")
        return tuple(value)

    def flags(self, given: Mapping[str, Any], place: str) -> tuple[tuple[str, Any], ...]:
        """Flags as they are, without those that say nothing."""
        self.known(given, FLAGS, place)
        flags = {}
        for name, value in given.items():
            kind = FLAGS[name]
            if value is None or value is False:
                continue
            if kind is list:
                value = tuple(value) if isinstance(value, list) else (value,)
                good = all(_is(one, int) or isinstance(one, str) for one in value) and value
                what = "words"
            elif isinstance(kind, tuple):
                good, what = value in kind, " or ".join(kind)
            else:
                good, what = _is(value, kind), {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            if not good:
                raise self.wrong(place, f"{name} is {value!r}; expected {what}")
            flags[name] = value
        return tuple(sorted(flags.items()))

    def known(self, given: Iterable[str], names: Iterable[str], place: str) -> None:
        for name in given:
            if name not in names:
                raise self.wrong(place, f"unknown key {name!r}; expected {', '.join(names)}")

    def mapping(self, value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(place, f"{value!r:.80}; expected keys with values")
        for key in value:
            if not isinstance(key, str):
                raise self.wrong(place, f"key {key!r} is no text; put it in quotes")
        return dict(value)

    def list(self, value: Any, place: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.wrong(place, f"{value!r:.80}; expected a list")
        return value

    def text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            raise self.wrong(place, f"{value!r:.80}; expected text")
        return value


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of that kind: whole numbers are numbers, true and false are none."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def _load(path: Path) -> Any:
    """The content of a YAML file, in which no key stands twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for key, _ in node.value:
                if names.count(key.value) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            return super().construct_mapping(node, deep)

    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader)  # a SafeLoader, which makes plain values only
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else "the file"
        problem = getattr(error, "problem", None) or one_line(str(error), 200)
        raise SettingError(f"{path}: {place}: no valid YAML: {problem}") from None
