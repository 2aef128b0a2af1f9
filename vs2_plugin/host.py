"""All that is read from clip_benchmark, the host: an evaluation's settings, data sets, tasks, output names, metrics."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from vs2_plugin.data.labels import has_place
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.own import build_folder, build_listed, texts_in
from vs2_plugin.errors import DataError, HarnessError
from vs2_plugin.text import reason_of

__all__ = [
    "Evaluation",
    "build",
    "default_task",
    "not_built",
    "require_texts",
    "unknown_data_set",
    "with_texts",
    "zero_shot_classification",
]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a clip_benchmark command, with clip_benchmark's names for the settings."""

    model: str
    """A model of open_clip or transformers, or a model string."""
    pretrained: str
    """open_clip's weights tag, or a file."""
    dataset: str
    """A data set of clip_benchmark; ``wds/NAME`` for webdataset shards."""
    dataset_root: str = "root"
    """Folder of the data set; ``{dataset}`` is filled in."""
    split: str = "test"
    """The split under evaluation."""
    num_workers: int = 4
    """Processes that load images."""
    batch_size: int = 64
    """Images that go through the tower at a time."""
    custom_classname_file: str | None = None
    """Class names in place of the data set's own."""
    custom_template_file: str | None = None
    """Prompts in place of the data set's own."""
    task: str = "auto"
    """The task; ``auto`` for the data set's own."""
    language: str = "en"
    """Language of class names and prompts."""
    output: str = "{dataset}_{pretrained}_{model}_{language}_{task}.json"
    """The results file; the fields of :attr:`output_file` are filled in."""
    model_type: str = "open_clip"
    """clip_benchmark's name for the library that loads the model."""
    amp: bool = True
    """Whether to evaluate under autocast."""
    seed: int = 0
    """Seed of random weights."""
    model_cache_dir: str | None = None
    """Where downloaded models are kept."""
    wds_cache_dir: str | None = None
    """Where downloaded shards are kept."""
    skip_load: bool = False
    """Whether to load no model, and so to evaluate nothing."""
    skip_existing: bool = False
    """Whether to skip the evaluation if its results file exists."""

    @classmethod
    def of(cls, settings: object, **changed: Any) -> Evaluation:
        """Return the evaluation that attributes of ``settings`` (clip_benchmark's Namespace) describe.

        Args:
            settings: an object with the settings as attributes; a missing one takes its default.
            changed: values that replace those of ``settings``.
        """
        values = {f.name: getattr(settings, f.name) for f in fields(cls) if hasattr(settings, f.name)}
        return cls(**{**values, **changed})

    @property
    def data_set(self) -> DataSet:
        """The data set."""
        return DataSet.of(self.dataset, self.dataset_root)

    @property
    def own_task(self) -> str:
        """The task, with ``auto`` replaced by the data set's own."""
        return default_task(self.dataset) if self.task == "auto" else self.task

    @property
    def output_file(self) -> str:
        """Name of the results file, formed as in clip_benchmark's ``cli.run``.

        Raises:
            HarnessError: ``output`` has a field that clip_benchmark does not fill in.
        """
        is_file = os.path.isfile(self.pretrained)
        values = {
            "model": self.model,
            "pretrained": os.path.basename(self.pretrained) if is_file else self.pretrained,
            "pretrained_full_path": self.pretrained.replace("/", "_") if is_file else self.pretrained,
            "task": self.own_task,
            "dataset": self.dataset.removeprefix("wds/").replace("/", "_"),
            "language": self.language,
        }
        try:
            return self.output.format(**values)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            names = ", ".join(f"{{{name}}}" for name in values)
            raise HarnessError(
                f"--output {self.output!r} cannot be filled in ({error}); known fields: {names}"
            ) from None


def default_task(dataset: str) -> str:
    """Return the task that clip_benchmark evaluates on a data set by default."""
    from clip_benchmark.datasets.builder import get_dataset_default_task

    task: str = get_dataset_default_task(dataset.removeprefix("wds/"))
    return task


def build(dataset: DataSet, split: str, *, remedy: str = "", **settings: Any) -> Any:
    """Build a split of a data set for evaluation: folders and listed shards by this package, other data sets by
    clip_benchmark's own function, which downloads them if it can.

    A steered model that waits for its data set is not bound to this one.

    Args:
        dataset: the data set.
        split: the split's name.
        remedy: advice to the user that is added to the error.
        settings: other arguments of ``build_dataset``.

    Raises:
        DataError: the data set, its split or its files are not there.
    """
    if dataset.home:
        try:
            own = build_folder(dataset, split, **settings) if dataset.is_folder else build_listed(dataset, **settings)
            return with_texts(own, **settings)
        except DataError as error:
            raise DataError("; ".join(filter(None, (str(error), remedy)))) from error
    from clip_benchmark.datasets.builder import build_dataset

    stock = inspect.unwrap(build_dataset)
    require_texts(**settings)
    try:
        built = stock(dataset_name=dataset.name, root=dataset.root, split=split, download=True, **settings)
        return with_texts(built, **settings)
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # a failed download, a missing file, package or tool: any exception
        raise not_built(dataset.name, dataset.root, split, error, remedy) from error


def require_texts(
    custom_classname_file: str | None = None, custom_template_file: str | None = None, **others: Any
) -> None:
    """Raise DataError if a file of class names or prompts cannot be read, before clip_benchmark reads it."""
    for file in filter(None, (custom_classname_file, custom_template_file)):
        texts_in(file)


def with_texts(
    dataset: Any, custom_classname_file: str | None = None, custom_template_file: str | None = None, **others: Any
) -> Any:
    """Return a data set whose class names and prompts, where files of the user's name them, are texts that fit.

    Raises:
        DataError: class names or prompts are no texts, or no prompt has a place for the class.
    """
    names, prompts = (getattr(dataset, name, None) for name in ("classes", "templates"))  # none for retrieval
    if custom_classname_file and names is not None and not _are_texts(names):
        raise DataError(
            f"--custom_classname_file {custom_classname_file!r} gives the class names {names!r:.80}; expected a list "
            "of texts, as many as there are classes"
        )
    if custom_template_file and prompts is not None and not _are_prompts(prompts):
        raise DataError(
            f"--custom_template_file {custom_template_file!r} gives the prompts {prompts!r:.80}; expected a list of "
            "texts with {c} for the class, or class names with a list of texts each"
        )
    return dataset


def _are_texts(values: object) -> bool:
    return isinstance(values, (list, tuple)) and bool(values) and all(isinstance(value, str) for value in values)


def _are_prompts(prompts: Any) -> bool:
    if isinstance(prompts, dict):  # of each class, complete texts
        return bool(prompts) and all(map(_are_texts, prompts.values()))
    return _are_texts(prompts) and any(map(has_place, prompts)) and all(has_place(p) or "{" not in p for p in prompts)


def not_built(dataset: str, root: str, split: str, error: BaseException, remedy: str = "") -> DataError:
    """Return the error that says why :func:`build` failed, and what the user can do."""
    if str(error).startswith("Unsupported dataset"):  # neither a network nor a file is to blame
        return DataError(unknown_data_set(dataset) or f"clip_benchmark knows no data set {dataset!r}")
    why = "it ended with the line above" if isinstance(error, SystemExit) else reason_of(error)
    problem = f"clip_benchmark could not build the split {split!r} of {dataset!r} in {root!r}: {why}"
    is_other = isinstance(error, (ImportError, ValueError))  # a missing package, or something that no data mend
    return DataError("; ".join(filter(None, (problem, "" if is_other else remedy))))


def unknown_data_set(dataset: str) -> str | None:
    """Return a message that clip_benchmark knows no data set called ``dataset``, with similar names.

    None if clip_benchmark knows the data set, as far as can be told without building it."""
    from clip_benchmark.datasets.builder import build_dataset, dataset_collection

    names = {name for group in dataset_collection.values() for name in group}
    names |= {text for text in inspect.unwrap(build_dataset).__code__.co_consts if isinstance(text, str)}
    if "/" in dataset or dataset in names or not {"cifar10", "food101"} <= names:
        return None
    close = difflib.get_close_matches(dataset.lower(), sorted(names), n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    if os.path.isdir(dataset):
        hint = f"the folder of that name is --dataset {dataset}/; "
    return (
        f"clip_benchmark knows no data set {dataset!r}; {hint}a folder of images is named by its path, as photos/, and "
        "webdataset shards are called wds/NAME"
    )


@contextmanager
def zero_shot_classification() -> Iterator[Any]:
    """Yield clip_benchmark's module ``zeroshot_classification``, with its progress bars off within the block."""
    from clip_benchmark.metrics import zeroshot_classification as module

    bars, module.tqdm = module.tqdm, lambda items: items
    try:
        yield module
    finally:
        module.tqdm = bars
