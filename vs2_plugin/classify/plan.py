"""Checks a request and makes a plan: which images, which classes, which SAE. No model is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.classify.page import require_page
from vs2_plugin.classify.request import ClassifyRequest
from vs2_plugin.classify.table import require_format
from vs2_plugin.clip.backbone import check_backbone, ignores_pretrained
from vs2_plugin.data.folders import FolderImages, open_files, open_folder
from vs2_plugin.data.labels import read_lines, read_names
from vs2_plugin.data.naming import DataSet
from vs2_plugin.data.splits import split_at_hand
from vs2_plugin.errors import CheckpointNotFound, SettingError, Vs2Error
from vs2_plugin.files import LONGEST, json_digest
from vs2_plugin.method import PROTOCOLS
from vs2_plugin.model.classifier import class_names, prompts_of
from vs2_plugin.modelstring import ModelString, parse
from vs2_plugin.text import counted
from vs2_plugin.training.request import TrainRequest

__all__ = ["Plan", "make_plan"]

#: Fewest images to train an SAE on.
_LEAST = 20
#: Longest name of a checkpoint that leaves room for a digest.
_SHORTER = LONGEST - 9


@dataclass(frozen=True)
class Plan:
    """A checked request, with the images, classes and checkpoint that it stands for."""

    request: ClassifyRequest
    spec: ModelString
    images: FolderImages
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    store: Store
    checkpoint: Checkpoint | None
    """The existing checkpoint, if the method needs one."""
    training: TrainRequest | None
    """The training of the checkpoint, if the method needs one that does not exist yet."""

    @property
    def out(self) -> Path:
        """Path of the table."""
        return Path(self.request.out)


def make_plan(request: ClassifyRequest) -> Plan:
    """Make a plan from a request, and create the folder of the table.

    Raises:
        Vs2Error: the request cannot be carried out; the first problem found.
    """
    spec, store, out = parse(request.model), Store.default(request.store), Path(request.out)
    if spec.reading is not None and spec.reading.protocol in PROTOCOLS[2:]:
        raise SettingError(
            f"--model {request.model}: {spec.reading.method.name} looks at the other images being classified, but here "
            "they come batch by batch; in Python, model.classify(images) takes all of them at once"
        )
    if spec.method.labels == "oracle":
        raise SettingError(f"--model {request.model}: {spec.method.name} needs the true class of every image, which "
                           f"is unknown here; use another method, such as vs2s:{spec.backbone}")  # fmt: skip
    check_backbone(spec.backbone, request.pretrained)
    if ignores_pretrained(spec.backbone):
        request = replace(request, pretrained="")
    require_format(out)
    _require_free(out, request.overwrite)
    if request.page is not None:
        require_page(request.page)
    names, prompts = _classes(request)
    images = open_files(request.photos)
    checkpoint, training = _sae(request, spec, store)
    if training is not None and not request.train_images and len(images) < _LEAST:
        raise SettingError(
            f"{counted(len(images), 'image')} in {' '.join(request.photos[:3])}: too few to train an SAE on, which "
            f"takes {_LEAST}, and a few hundred to be useful; name more with --train_images FOLDER, or an existing "
            f"checkpoint: {spec.method.name}:{spec.backbone}@NAME"
        )
    return Plan(request, spec, images, names, prompts, store, checkpoint, training)


def _require_free(out: Path, overwrite: bool) -> None:
    """Raise SettingError if the table exists and must not be replaced; else make its folder."""
    if out.is_dir():
        raise SettingError(f"--out {str(out)!r} is a folder; expected a file in it, such as {out / 'predictions.csv'}")
    if out.exists() and not overwrite:
        raise SettingError(f"--out {str(out)!r} already exists; name another file, or replace it with --overwrite")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"--out {str(out)!r}: its folder cannot be made ({error.strerror})") from error


# -- classes and prompts


def _classes(request: ClassifyRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the classes and the prompts: from the request, else from the folders of photos."""
    prompts = None if request.prompts is None else read_lines(request.prompts, "--prompts", "one prompt")
    if request.classes is not None:
        return class_names(_named(request.classes), "--classes"), prompts_of(prompts)
    folders = [open_folder(path) for path in request.photos if os.path.isdir(path)]
    names = list(dict.fromkeys(name for folder in folders for name in folder.classes))
    if len(names) < 2:
        contents = f"one folder of images, {names[0]!r}" if names else "no folders of classes"
        raise SettingError(
            f"{' '.join(request.photos[:3])} holds {contents}, so the classes have to be named: --classes cat,dog or "
            "--classes FILE with a name per line"
        )
    if prompts is None and len(folders) == 1:
        prompts = list(folders[0].templates)
    return class_names(names), prompts_of(prompts)


def _named(classes: str) -> list[str]:
    """Return the class names that ``--classes`` gives: a file, a folder of classes, or a list separated by commas."""
    if os.path.isfile(classes):
        return read_names(classes)
    if os.path.isdir(classes):
        return open_folder(classes, split_at_hand(DataSet.of(Path(classes)))).classes
    if "," not in classes:
        raise SettingError(
            f"--classes {classes!r}: there is no such file or folder, and one name is not enough; expected a file "
            "with a name per line, a folder of class folders, or names separated by commas, such as cat,dog"
        )
    return [name for part in classes.split(",") if (name := part.strip())]


# -- the SAE


def _sae(request: ClassifyRequest, spec: ModelString, store: Store) -> tuple[Checkpoint | None, TrainRequest | None]:
    """Return the checkpoint that the method needs, or else the training of one; neither if it needs none."""
    if not spec.needs_checkpoint:
        return None, None
    if spec.checkpoint is not None:
        return store.find(spec.checkpoint), None
    folders = dict.fromkeys(request.train_images or request.photos)
    sets = [_data_set(folder, bool(request.train_images)) for folder in folders]
    name = store.name_for(spec.backbone, request.pretrained, "+".join(dict.fromkeys(dataset.name for dataset in sets)))
    homes = [dataset.home for dataset in sets]
    digested = f"{name[:_SHORTER]}-{json_digest(homes)[:8]}"
    names = (name, digested) if len(name) <= LONGEST else (digested,)
    for own in names:  # the first may be of other folders
        try:
            checkpoint = store.find(own)
        except CheckpointNotFound:
            return None, _training(request, spec, [dataset.root for dataset in sets], store, own)
        if _is_of(checkpoint, homes):
            return checkpoint, None
    raise SettingError(
        f"the checkpoint {checkpoint.name} in the store {store.root} was not trained on {' '.join(homes)}; remove it: "
        f"vs2 store remove {checkpoint.name}"
    )


def _is_of(checkpoint: Checkpoint, homes: Sequence[str]) -> bool:
    """Return whether a checkpoint was trained on exactly these folders, in this order."""
    data = checkpoint.data
    own = [replace(data, folders=(folder,)) for folder in data.folders]
    return len(own) == len(homes) and all(part.is_of(home) for part, home in zip(own, homes, strict=True))


def _data_set(folder: str, given: bool) -> DataSet:
    if not os.path.isdir(folder):
        if given:
            raise SettingError(f"--train_images {folder!r} is not a folder; expected one with images in it")
        raise SettingError(
            f"an SAE is trained on folders, but {folder!r} is a file; name its folder, or folders to train on with "
            "--train_images FOLDER, or an existing checkpoint: vs2s:MODEL@NAME"
        )
    return DataSet.of(Path(folder))


def _training(
    request: ClassifyRequest, spec: ModelString, folders: Sequence[str], store: Store, name: str
) -> TrainRequest:
    """Return the request of a training whose checkpoint a model string can use."""
    options = spec.options
    if spec.method.sae == "pass" or spec.labels_used != "none":
        raise SettingError(
            f"--model {request.model}: {spec.method.name} reads training labels, but here an SAE is trained without; "
            f"use vs2-train-sae to train one with labels and name it, {spec.method.name}:{spec.backbone}@NAME, or use "
            f"another method, such as vs2s:{spec.backbone}"
        )
    blocks, encoder = options.get("blocks"), options.get("encoder") or "clip"
    try:
        return TrainRequest(
            model=spec.backbone,
            pretrained=request.pretrained,
            dataset=tuple(os.path.join(folder, "") for folder in folders),
            batch_size=request.batch_size,
            num_workers=request.num_workers,
            amp=request.amp,
            seed=(request.seed,),
            model_cache_dir=request.model_cache_dir,
            store=None if request.store is None else str(store.root),
            name=name,
            blocks=("last",) if blocks is None else tuple(str(blocks).split("+")),
            retrieval_encoder=() if encoder == "clip" else (str(encoder),),
        )
    except Vs2Error as error:
        raise SettingError(f"no SAE can be trained for --model {request.model}: {error}") from error
