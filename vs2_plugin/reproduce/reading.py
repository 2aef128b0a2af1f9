"""Reads a table of the paper from a YAML file into cells.

A file declares columns, rows and published numbers; ``benchmark_configs/paper/README.md`` describes the format. Errors
are one line, with the file's name and the place in it. No heavy imports.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vs2_plugin import settings
from vs2_plugin.data.labels import has_place
from vs2_plugin.errors import ModelStringError, SettingError
from vs2_plugin.modelstring import ModelString, parse
from vs2_plugin.names import is_steered
from vs2_plugin.reproduce.cells import METRICS, Cell, Sae, Table
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.text import one_line
from vs2_plugin.training.request import TrainRequest

__all__ = ["PAPER", "SAE_FLAGS", "read", "read_all"]

#: The folder of the paper's tables: beside the installed package, or in `benchmark_configs` of a clone.
PAPER = Path(__file__).parents[2] / "vs2_plugin_paper"
if not PAPER.is_dir():
    PAPER = Path(__file__).parents[2] / "benchmark_configs" / "paper"
#: The word for all tables of the paper.
_ALL = "paper"
#: The flags of ``vs2-train-sae`` that a file may set under ``sae``: those that the SAE itself depends on.
SAE_FLAGS = (
    "recipe", "blocks", *(name for name in settings.settings_of(TrainConfig) if name not in ("seed", "rescale")),
    "calibrate_on", "gallery_labels", "retrieval_encoder", "max_images", "no_amp",
)  # fmt: skip
#: Settings that are allowed at the top of a file, in a column and in a row. A row overrides a column, a column the top;
#: the mappings sae and options are merged.
_SETTINGS = ("model", "options", "backbone", "dataset", "prompts", "metric", "class", "seeds", "sae", "train_on")
_TOP = ("title", "source", "notes", "transductive", "columns", "rows", "published", *_SETTINGS)
#: The word for clip_benchmark's own prompts.
_HARNESS = "harness"
_DEFAULTS: dict[str, Any] = {
    "metric": "accuracy", "prompts": _HARNESS, "class": None, "train_on": None, "seeds": [0], "best_of": [],
}  # fmt: skip


def read_all(paths: Iterable[Path]) -> list[Table]:
    """Read files, the files in folders, and tables of the paper by their names.

    Raises:
        SettingError: a file is wrong; the message names the file and the place.
    """
    files = list({file.resolve(): file for path in paths for file in _files(path)}.values())
    for stem, count in sorted(Counter(file.stem for file in files).items()):
        if count > 1:
            raise SettingError(f"two files are called {stem!r}, and would write the same table; rename one")
    return [read(file) for file in files]


def _files(path: Path) -> list[Path]:
    """Return the files that a word names. An existing path takes precedence over a table of the same name."""
    shipped = {file.stem: file for file in sorted(PAPER.glob("*.yaml"))}
    if path.is_dir() or (str(path) == _ALL and not path.exists()):
        tables = sorted(path.glob("*.yaml")) if path.is_dir() else list(shipped.values())
        if not tables:
            raise SettingError(f"no *.yaml in the folder {path}; expected tables such as those of {PAPER}")
        return tables
    if path.exists() or path.suffix or len(path.parts) > 1:
        return [path]
    if str(path) not in shipped:
        raise SettingError(
            f"no file {str(path)!r}, and no table of the paper of that name; expected a file, a folder of them, {_ALL} "
            f"for all tables, or one of {', '.join(shipped)}"
        )
    return [shipped[str(path)]]


def read(path: Path) -> Table:
    """Read a file.

    Raises:
        SettingError: the file is wrong; the message names the file and the place.
    """
    return _Reader(path).table()


class _Reader:
    """Reads one file; every error names the file."""

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
        title, source = (self.text(top.get(name, ""), name) for name in ("title", "source"))
        notes, transductive = (self.texts(top.get(name, []), name) for name in ("notes", "transductive"))
        columns = self.part("columns", top, _SETTINGS)
        rows = self.part("rows", top, (*_SETTINGS, "best_of"))
        published = self.published(top.get("published") or {}, rows, columns)
        above = {name: top[name] for name in _SETTINGS if name in top}
        cells = tuple(
            self.cell(row, column, [above, columns[column], rows[row]], published.get((row, column)), transductive)
            for row in rows
            for column in columns
        )
        self.best_of(cells)
        return Table(self.path, title, source, notes, cells)

    def part(self, kind: str, top: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Read the columns or the rows: title -> settings."""
        parts = {}
        for title, content in self.mapping(top[kind], kind).items():
            place = f"{kind}: {title}"
            parts[title] = self.mapping({} if content is None else content, place)
            self.known(parts[title], names, place)
        if not parts:
            raise self.wrong(kind, "is empty")
        return parts

    def best_of(self, cells: Iterable[Cell]) -> None:
        """Raise SettingError for a ``best_of`` that names a row without a comparable number."""
        places = {(cell.row, cell.column): cell for cell in cells}
        for cell in places.values():
            for row in cell.best_of:
                other = places.get((row, cell.column))
                if other is None or other.model is None or other.metric != cell.metric or cell.metric == "fvu":
                    raise self.wrong(
                        f"rows: {cell.row}: best_of",
                        f"{row!r}; expected other rows that are run, of the same metric: accuracy, coverage or gain",
                    )

    def published(self, given: Any, rows: Iterable[str], columns: Sequence[str] | Mapping[str, Any]) -> dict[Any, Any]:
        """Return (row, column) -> published number."""
        numbers = {}
        for row, values in self.mapping(given, "published").items():
            place = f"published: {row}"
            if row not in rows:
                raise self.wrong(place, f"there is no such row; the rows: {', '.join(rows)}")
            if len(self.items(values, place)) != len(columns):
                raise self.wrong(
                    place, f"{len(values)} numbers for {len(columns)} columns ({', '.join(columns)}); null for none"
                )
            for column, value in zip(columns, values, strict=True):
                numbers[row, column] = self.number(value, f"{place}: {column}")
        return numbers

    def number(self, value: Any, place: str) -> float | tuple[float, float] | None:
        if value is None or _is_number(value):
            return value  # type: ignore[no-any-return]  # returned as written: 25 stays an int
        if isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] <= value[1]:
            return value[0], value[1]
        raise self.wrong(place, f"{value!r}; expected a number, an interval [low, high], or null")

    def cell(
        self, row: str, column: str, levels: Sequence[dict[str, Any]], published: Any, transductive: Sequence[str]
    ) -> Cell:
        place = f"row {row!r}, column {column!r}"
        entries = self.merged(levels, place)
        best_of = self.texts(entries["best_of"], f"{place}: best_of")
        if best_of:
            if "model" in levels[-1]:
                raise self.wrong(place, "best_of takes its number from other rows; leave out model")
            entries["model"] = None
        for needed in ("model", "backbone", "dataset"):
            if needed not in entries:
                raise self.wrong(place, f"no {needed!r}, neither in the row nor in the column nor at the top")
        backbone, comma, weights = self.text(entries["backbone"], f"{place}: backbone").partition(",")
        if not comma or is_steered(backbone):
            raise self.wrong(place, f"backbone {entries['backbone']!r}; expected MODEL,WEIGHTS with a plain model")
        dataset = self.text(entries["dataset"], f"{place}: dataset")
        model = self.model(entries, backbone, place)
        spec = self.spec(model, backbone, place)
        self.check_metric(entries, model, spec, place)
        seeds = self.seeds(entries["seeds"], f"{place}: seeds")
        datasets = self.texts(entries["train_on"] or [dataset], f"{place}: train_on")
        transductive_here = not set(datasets).isdisjoint(transductive)
        flags = self.flags(entries["sae"], f"{place}: sae")
        has_sae = spec is not None and spec.method.needs_checkpoint
        return Cell(
            row=row,
            column=column,
            metric=entries["metric"],
            published=published,
            model=model,
            backbone=backbone,
            weights=weights,
            dataset=dataset,
            prompts=self.prompts(entries["prompts"], f"{place}: prompts"),
            sae=Sae(backbone, weights, datasets, flags, transductive_here) if has_sae else None,
            seeds=seeds if has_sae else (0,),
            of_class=None if entries["class"] is None else self.text(entries["class"], f"{place}: class"),
            best_of=best_of,
        )

    def merged(self, levels: Iterable[dict[str, Any]], place: str) -> dict[str, Any]:
        """Return the settings of a cell, merged from the top, its column and its row."""
        entries, merged = dict(_DEFAULTS), {name: dict[str, Any]() for name in ("sae", "options")}
        for level in levels:
            entries |= level
            for name in merged:
                merged[name] |= self.mapping(level.get(name) or {}, f"{place}: {name}")
        return entries | merged

    def model(self, given: Mapping[str, Any], backbone: str, place: str) -> str | None:
        if given["model"] is None:
            return None
        name = self.text(given["model"], f"{place}: model").replace("{backbone}", backbone)
        return name + "".join(f"@{key}={value}" for key, value in given["options"].items())

    def spec(self, model: str | None, backbone: str, place: str) -> ModelString | None:
        if model is None:
            return None
        try:
            spec = parse(model) if is_steered(model) else None
        except ModelStringError as error:
            raise self.wrong(place, str(error)) from None
        if backbone != (model if spec is None else spec.backbone):
            raise self.wrong(place, f"model {model!r} does not have the backbone {backbone!r}; write {{backbone}} "
                                    "instead")
        if spec is not None and spec.checkpoint:
            raise self.wrong(place, f"model {model!r} names a checkpoint; leave it out: sae says how it is trained")
        return spec

    def check_metric(self, given: Mapping[str, Any], model: str | None, spec: ModelString | None, place: str) -> None:
        metric = given["metric"]
        if metric not in METRICS:
            raise self.wrong(place, f"metric {metric!r}; expected {', '.join(METRICS)}")
        if given["class"] is not None and metric != "gain":
            raise self.wrong(place, "a class is only for the metric gain")
        if model is None or metric == "accuracy":
            return
        if spec is None or (metric == "fvu" and not spec.method.needs_checkpoint):
            raise self.wrong(place, f"metric {metric} is not for the plain model {model!r}")

    def prompts(self, value: Any, place: str) -> tuple[str, ...]:
        if value == _HARNESS:
            return ()
        prompts = self.texts(value if isinstance(value, list) else [value], place)
        if not prompts or not all(map(has_place, prompts)):
            raise self.wrong(place, f"{value!r}; expected prompts with {{c}} for the class, or the word {_HARNESS}")
        return prompts

    def seeds(self, value: Any, place: str) -> tuple[int, ...]:
        declared = settings.settings_of(TrainRequest)["seed"]
        different = isinstance(value, list) and len({repr(seed) for seed in value}) == len(value)
        if not different or declared.check(tuple(value)) is not None:
            raise self.wrong(place, f"{value!r:.80}; expected a list of different whole numbers, at least 0")
        return tuple(value)

    def flags(self, given: Mapping[str, Any], place: str) -> tuple[tuple[str, Any], ...]:
        """Return flags and values as written, lists as tuples, without flags that are null or false."""
        self.known(given, SAE_FLAGS, place)
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        try:
            settings.read(TrainRequest, given)
        except SettingError as error:
            raise self.wrong(place, str(error)) from None
        flags = {}
        for name, value in given.items():
            in_list = isinstance(value, list)
            if isinstance(settings.flags_of(TrainRequest)[name].setting.default, tuple):  # one or several words
                flags[name] = tuple(value) if in_list else (value,)
            elif in_list:
                raise self.wrong(place, f"{name} is {value!r}; expected one value: each SAE has a row or column")
            else:
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
                raise self.wrong(place, f"key {key!r} is not text; put it in quotes")
        return dict(value)

    def items(self, value: Any, place: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.wrong(place, f"{value!r:.80}; expected a list")
        return value

    def texts(self, value: Any, place: str) -> tuple[str, ...]:
        return tuple(self.text(one, place) for one in self.items(value, place))

    def text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            raise self.wrong(place, f"{value!r:.80}; expected text")
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _load(path: Path) -> Any:
    """Return the content of a YAML file. Raises SettingError if it cannot be read or holds a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for key, _ in node.value:
                if names.count(key.value) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: Any) -> int:
            number: int = super().construct_yaml_int(node)
            if abs(number) >= 2**63:
                raise yaml.constructor.ConstructorError(None, None, "a number with too many digits", node.start_mark)
            return number

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader)  # a SafeLoader, which creates plain values only
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else "the file"
        problem = getattr(error, "problem", None) or one_line(str(error), 200)
        raise SettingError(f"{path}: {place}: not valid YAML: {problem}") from None
