"""A training, from the request to the checkpoints: activations of every site, an SAE on each, and the files."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vs2_plugin import __version__
from vs2_plugin.checkpoint.checkpoint import Checkpoint, save_checkpoint
from vs2_plugin.checkpoint.records import FEW, GIVEN, TrainingData
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.clip.backbone import check_backbone, ignores_pretrained, load_backbone
from vs2_plugin.clip.hf import revision_of
from vs2_plugin.clip.sites import Site
from vs2_plugin.clip.tower import Tower
from vs2_plugin.data.cache import require_space
from vs2_plugin.data.folders import open_folder
from vs2_plugin.data.given import GivenActivations, GivenImages, read_activations
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.splits import Split, training_split
from vs2_plugin.devices import emulates_bfloat16, own_device
from vs2_plugin.distributed import ALONE, Processes
from vs2_plugin.errors import DataError, SettingError
from vs2_plugin.files import alone, json_digest
from vs2_plugin.names import library_place, with_weights
from vs2_plugin.paths import listed_once
from vs2_plugin.sae.foreign import read_foreign
from vs2_plugin.sae.train import require_enough
from vs2_plugin.seeds import seeded
from vs2_plugin.text import reason_of
from vs2_plugin.training.extract import Extraction, Part, Report, load_encoders
from vs2_plugin.training.plan import Plan, chosen_sites, fitted, make_plans
from vs2_plugin.training.request import TrainRequest
from vs2_plugin.training.saes import Saes, make_saes
from vs2_plugin.training.supplied import Supplied, require_no_images, supply

__all__ = ["train"]

_LOG = logging.getLogger(__name__)
#: Days after which the next training removes what an interrupted one left.
_FORGOTTEN = 30
#: Images or activations that are supplied in place of a data set.
_Given = GivenImages | GivenActivations


@listed_once()
def train(
    request: TrainRequest,
    processes: Processes = ALONE,
    report: Report = _LOG.info,
    given: _Given | None = None,
) -> list[Checkpoint]:
    """Train the SAEs of a request, in one process or several, and write the checkpoints.

    Args:
        request: the settings.
        processes: the processes that share the images and every training step. The first one writes and reports.
        report: shows a line to the user: sources of the data, and quality of the SAEs.
        given: images or activations in place of a data set; ``request.dataset`` is then only their name.

    Returns:
        The checkpoints, in the order of the requested values; none in a process that is not the first.

    Raises:
        Vs2Error: the training cannot be done; raised before any image is read, where possible.
    """
    with seeded(request.first_seed):  # loaders and foreign data sets draw random numbers too
        return _train(request, processes, report, given)


def _train(request: TrainRequest, processes: Processes, report: Report, given: _Given | None) -> list[Checkpoint]:
    """Train as :func:`train` does, with the random generators as they are."""
    by_python, asked = given is not None, request
    given = _supplied(request, given)
    request = replace(
        request,
        pretrained="" if ignores_pretrained(request.model) else request.pretrained,
        quiet=request.quiet or not processes.first,
    )
    say: Report = (lambda line: None) if request.quiet else report
    foreign = None if request.sae is None else read_foreign(Path(request.sae))
    if foreign is not None:
        request = fitted(request, foreign)
        say(f"{foreign} in {request.sae} is assumed to be for {request.model}")
    store = Store.default(request.store)
    splits = _splits(request, given)
    plans = make_plans(request, store, by_python)
    with _alone(store, plans, processes) as waited, _cache(store, given) as cache:
        if waited:
            plans = make_plans(request, store, by_python)
        _warn(request, plans, splits.values(), say)
        extraction, sites = _open(request, plans, store, cache, given, processes, say)
        if foreign is not None:
            foreign.require_width(sites[0].width)
        parts = [extraction.run(dataset, split) for dataset, split in splits.items()]
        data = _data(request, splits, parts, extraction.amp)
        images = [part.tower.contents.get("digests", "") for part in parts]  # activations by themselves have none
        old_saes = [plan.load_kept(data, images) for plan in plans]
        states = store.training / _identity(request, plans, sites, parts)
        trained = make_saes(request, plans, sites, parts, extraction, states, report, foreign)
        if not processes.first:
            return []
        contents = {
            "backbone": request.model,
            "pretrained": request.pretrained,
            "tower": extraction.tower,
            "data": data,
            "gallery": extraction.gallery(parts),
            "created": _created(asked, by_python),
        }
        checkpoints = _save(plans, [[*old, *new] for old, new in zip(old_saes, trained, strict=True)], contents, report)
        shutil.rmtree(states, ignore_errors=True)
    if given is None and _has_labels(request.data_sets):
        say(f"evaluate with: {store.assignment}{_evaluate_command(request, plans, extraction.amp)}")
    return checkpoints


def _supplied(request: TrainRequest, given: _Given | None) -> _Given | None:
    """Return the data supplied by Python or by a file; None if there are none.

    Raises:
        DataError: a file of activations cannot be read.
        TowerError: the model is unknown.
    """
    if given is None and request.activations is not None:
        given = read_activations(Path(os.path.expanduser(request.activations)))
    if request.model or not isinstance(given, GivenActivations):
        check_backbone(request.model, request.pretrained)  # first, since names of checkpoints contain the model's
    return given


def _created(request: TrainRequest, by_python: bool) -> dict[str, str]:
    """Return a checkpoint's record of its making: the versions, the command if there is one, and the commit of a
    model of transformers from a repository."""
    created = {"torch": version("torch"), "open_clip": version("open_clip_torch")}
    if not by_python:
        created["command"] = shlex.join(request.words())
    if library_place(request.model) is not None:
        created["transformers"] = version("transformers")
        commit = revision_of(request.model, request.model_cache_dir)
        created |= {} if commit is None else {"model_revision": commit}
    return created


def _splits(request: TrainRequest, given: _Given | None) -> dict[DataSet, Split]:
    """Return the split of each data set, and check the settings against supplied data.

    Raises:
        DataError: a data set has no split to train on, or too few images to train an SAE on.
        SettingError: a setting does not fit the supplied data.
    """
    if given is None:
        splits = {
            named: training_split(named.name, request.train_split, request.transductive, named.root)
            for named in request.data_sets
        }
        folders = [named for named in splits if named.is_folder]
        counts = [len(open_folder(named.root, splits[named].name)) for named in folders]  # its errors, before a model
        if request.sae is None and len(folders) == len(splits):
            require_enough(sum(min(count, request.max_images or count) for count in counts), "images")
        return splits
    if len(request.dataset) != 1:
        raise SettingError(f"--dataset {' '.join(request.dataset)}: expected one name for what is given")
    if isinstance(given, GivenActivations):
        require_no_images(request)
    elif given.is_once and request.retrieval_encoder:
        raise SettingError("--retrieval_encoder reads the images again, and a generator gives them once; give a list")
    return {request.data_sets[0]: Split(GIVEN, request.transductive)}


@contextmanager
def _cache(store: Store, given: _Given | None) -> Iterator[Path]:
    """Yield the folder that activations are extracted into: the store's, or one that is removed after the training if
    the images could not be recognised the next time. (A gallery links the files that it needs.)"""
    if not isinstance(given, GivenImages) or given.is_kept:
        yield store.activations
        return
    with tempfile.TemporaryDirectory(dir=store.activations, prefix="once-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _alone(store: Store, plans: Sequence[Plan], processes: Processes) -> Iterator[bool]:
    """Keep other trainings from writing the same checkpoints; yield whether one had to be waited for.

    Raises:
        DataError: another training is writing them, or the store cannot be written.
    """
    if not processes.first:
        yield False
        return
    store.require_writable()
    store.remove_unfinished(_FORGOTTEN)
    with ExitStack() as stack:
        waited = [stack.enter_context(alone(folder)) for folder in sorted({plan.folder for plan in plans})]
        yield any(waited)


def _identity(request: TrainRequest, plans: Sequence[Plan], sites: Sequence[Site], parts: Sequence[Part]) -> str:
    """Return a digest of everything that the state of the SAEs depends on, which identifies the training."""
    configs = [
        [plan.folder.name, site.hookpoint, asdict(config)] for plan in plans for _, site, config in plan.wanted(sites)
    ]
    values = [__version__, configs, [part.tower.contents for part in parts], request.calibrate_on]
    return json_digest(values)[:32]


def _save(
    plans: Sequence[Plan], saes: Sequence[Saes], contents: Mapping[str, Any], report: Report
) -> list[Checkpoint]:
    """Write the checkpoints.

    Raises:
        DataError: a checkpoint could not be written; the message says where it was written instead, if anywhere.
    """
    checkpoints, failures = [], []
    for plan, own in zip(plans, saes, strict=True):
        sorted_saes = sorted(own, key=lambda pair: pair[0].variant != "plain")
        created = {**contents["created"], "folder": os.path.realpath(plan.folder)}
        whole = {**contents, "saes": sorted_saes, "created": created}
        try:
            checkpoint = save_checkpoint(plan.folder, **whole)
        except OSError as error:
            failures.append(_keep_aside(plan.folder, error, whole))
        else:
            report(f"wrote {checkpoint.folder}")
            for line in _warnings(checkpoint):
                report(f"warning: {line}")
            checkpoints.append(checkpoint)
    if failures:
        raise DataError("; ".join(failures))
    return checkpoints


def _warnings(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a warning, with its remedy, for each SAE of a checkpoint that is useless or has learned too little."""
    for site in checkpoint.sites:
        if site.warning:
            yield f"the SAE at {site.folder} is useless: {site.warning}; {site.advice}"
        elif site.below_components:
            yield f"the SAE at {site.folder} has learned too little: {site.below_components}; {FEW}"


def _keep_aside(folder: Path, error: OSError, contents: Mapping[str, Any]) -> str:
    """Write a checkpoint to a temporary folder, without its gallery if that does not fit. Return the error message."""
    problem = f"the checkpoint {folder.name!r} is trained but could not be written to {folder} ({reason_of(error)})"
    for gallery in (contents["gallery"], None):
        with suppress(OSError):
            aside = Path(tempfile.mkdtemp(prefix="vs2-")) / folder.name
            save_checkpoint(aside, **{**contents, "gallery": gallery})
            without = " without its gallery" if gallery is None and contents["gallery"] is not None else ""
            move = shlex.join(["mv", str(aside), str(folder)])
            return f"{problem}; it is kept{without} in {aside}: when the store can be written again, {move}"
    return f"{problem}, nor among the temporary files; make room and run the same command, which continues from here"


def _warn(request: TrainRequest, plans: Sequence[Plan], splits: Iterable[Split], say: Report) -> None:
    """Tell the user which marks the checkpoints will bear, and which checkpoints of other models they replace."""
    model = with_weights(request.model, request.pretrained)
    for existing in (plan.existing for plan in plans if plan.existing and not plan.kept):
        if existing.model != model:
            say(f"checkpoint {existing.name!r}, which was for {existing.model}, is replaced by one for {model}")
    if any("pass" in plan.variants for plan in plans):
        say("PASS: the training labels are read; the checkpoint and every result of pass: say so")
    if any(split.transductive for split in splits):
        say("transductive: images that are evaluated are trained on; the checkpoint and every result say so")


def _open(
    request: TrainRequest,
    plans: Sequence[Plan],
    store: Store,
    cache: Path,
    given: _Given | None,
    processes: Processes,
    say: Report,
) -> tuple[Extraction | Supplied, list[Site]]:
    """Return the source of the activations, with its models loaded, and the sites of the SAEs to train.

    Whatever the gallery of an existing checkpoint that keeps SAEs holds, its new gallery will hold too.
    """
    device = own_device(processes)
    if isinstance(given, GivenActivations):
        supplied = supply(request, given, _amp(request), device, processes)
        require_space(store.root, _room(plans, [supplied.site]), "the checkpoints")
        say(f"{len(given.rows):,} activations of width {supplied.site.width}; without images, there is no gallery")
        return supplied, [supplied.site]
    with seeded(request.first_seed):  # random weights as clip_benchmark draws them for this seed
        loaded = load_backbone(request.model, request.pretrained, request.model_cache_dir, device)
    tower = Tower.of(loaded.model, loaded.transform)
    sites = chosen_sites(loaded.sites, request.blocks)
    existing = [plan.existing for plan in plans if plan.existing is not None and plan.kept]
    for checkpoint in existing:
        checkpoint.require_tower(tower, request.model)
    staying_sites = [loaded.sites.find(site.hookpoint) for plan in plans for site in plan.kept]
    reserved = _room(plans, sites)
    require_space(store.root, reserved, "the checkpoints")
    held = [checkpoint.gallery for checkpoint in existing if checkpoint.gallery] if request.gallery else []
    labels = request.gallery_labels or any(gallery.labels for gallery in held)
    extraction = Extraction(
        request=request,
        cache=cache,
        given=given,
        loaded=loaded,
        tower=tower,
        sites=loaded.sites.in_order([*sites, *staying_sites]),
        encoders=load_encoders(request, held, tower.preprocessing, device),
        labels=labels or any("pass" in plan.variants for plan in plans),
        amp=_amp(request),
        device=device,
        say=say,
        processes=processes,
        reserved=reserved,
    )
    return extraction, sites


def _room(plans: Sequence[Plan], sites: Sequence[Site]) -> int:
    """Return the bytes that the checkpoints take: weights, and for a saved state of the training also the best weights
    and Adam's moments. Galleries are links."""
    size = 0
    for plan in plans:
        for _, site, config in plan.wanted(sites):
            latents = config.expansion_factor * site.width
            size += 5 * 4 * (2 * latents * site.width + latents + site.width)
    return size


def _amp(request: TrainRequest) -> bool:
    return not emulates_bfloat16() if request.amp is None else request.amp


def _data(request: TrainRequest, splits: Mapping[DataSet, Split], parts: Sequence[Part], amp: bool) -> TrainingData:
    """Return a checkpoint's record of its training images."""
    folders = tuple(part.folder for part in parts)
    return TrainingData(
        datasets=tuple(named.name for named in splits),
        splits=tuple(split.name for split in splits.values()),
        images=sum(map(len, parts)),
        calibrated_on=tuple(named.name for named in request.calibration_sets),
        transductive=any(split.transductive for split in splits.values()),
        amp=amp,
        max_images=request.max_images,
        folders=folders if any(folders) else (),
    )


def _has_labels(data_sets: Iterable[DataSet]) -> bool:
    """Return whether every folder among the data sets has test images in folders of classes, as an evaluation needs."""
    try:
        for named in data_sets:
            if named.is_folder:
                open_folder(named.root, "test").require_labels()
    except DataError:
        return False
    return True


def _evaluate_command(request: TrainRequest, plans: Sequence[Plan], amp: bool) -> str:
    """Return the command that evaluates the checkpoints, in the precision of the training."""
    methods = ["vs2" if variant == "plain" else "pass" for variant in plans[0].variants]
    by_name = request.name or len(plans) > 1 or len(set(request.dataset)) > 1
    names = [f"@{plan.folder.name}" if by_name else "" for plan in plans]
    models = [f"{method}:{request.model}{name}" for name in names for method in methods]
    words = ["clip_benchmark", "eval", "--model", request.model, *models]
    words += ["--pretrained", request.pretrained] if library_place(request.model) is None else []
    words += ["--dataset", *request.dataset]
    words += [] if all(map(DataSet.is_path, request.dataset)) else ["--dataset_root", request.dataset_root]
    return shlex.join([*words, *_as_trained(request), *([] if amp else ["--no_amp"])])


def _as_trained(request: TrainRequest) -> list[str]:
    """Return the flags that an evaluation shares with the training, so that it finds the same tower and data."""
    settings = {"model_cache_dir": request.model_cache_dir, "wds_cache_dir": request.wds_cache_dir}
    if not request.pretrained and not ignores_pretrained(request.model) and request.first_seed:
        settings["seed"] = str(request.first_seed)  # with random weights, the same seed gives the same tower
    return [word for flag, value in settings.items() if value for word in (f"--{flag}", value)]
