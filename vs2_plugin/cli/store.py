"""``vs2 store``: lists, shares, imports, exports or removes checkpoints and cached activations."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Collection, Iterable
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.exporting import FORMATS, export
from vs2_plugin.checkpoint.records import SiteSAE
from vs2_plugin.checkpoint.store import Store, folder_size, last_change
from vs2_plugin.cli.common import Commands, add_flags, add_store_option
from vs2_plugin.errors import CheckpointError, DataError, SettingError
from vs2_plugin.messages import say
from vs2_plugin.names import Repository, repository
from vs2_plugin.sae.config import TrainConfig
from vs2_plugin.text import counted, gigabytes
from vs2_plugin.training.request import TrainRequest

__all__ = ["add_store"]


def add_store(commands: Commands) -> None:
    """Add ``vs2 store``."""
    store = commands.add_parser(
        "store",
        help="list, share, import, export or remove checkpoints and cached activations",
        epilog="examples: vs2 store list; vs2 store remove ViT-B-32-quickgelu_openai_cifar100",
    )
    add_store_option(store)
    actions = store.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list the contents", epilog="example: vs2 store list --store store")
    listing.set_defaults(run=_list)
    remove = actions.add_parser(
        "remove", help="delete checkpoints, or cached activations", epilog="example: vs2 store remove --cache"
    )
    remove.add_argument("names", nargs="*", metavar="NAME", help="checkpoints to delete")
    remove.add_argument(
        "--cache",
        action="store_true",
        help="delete all cached activations (they are extracted again when needed), and what interrupted runs left",
    )
    remove.set_defaults(run=_remove)
    _add_sharing(actions)
    for action in actions.choices.values():
        add_store_option(action, default=argparse.SUPPRESS)  # --store may stand before or after the action
    _add_foreign(actions)


def _add_sharing(actions: Commands) -> None:
    push = actions.add_parser(
        "push",
        help="put a checkpoint on a model hub",
        description="Put a checkpoint into a repository of a model hub, with a model card (README.md). Log in first, "
        "with `hf auth login` or HF_TOKEN. The command that trained it, which may name local folders, is left out.",
        epilog="example: vs2 store push my-sae owner/my-sae --license cc-by-4.0",
    )
    push.add_argument("name", metavar="NAME", help="the checkpoint, or its folder")
    push.add_argument("repository", metavar="OWNER/NAME", help="the repository; it is created if it does not exist")
    push.add_argument("--license", help="license of the SAEs, as the hub calls it, such as mit (default: stated as "
                                        "unknown)")
    push.add_argument("--private", action="store_true", default=None, help="if the repository is created: only its "
                                                                           "owner sees it")
    push.add_argument(
        "--gallery", action="store_true", help="push the gallery too: activations and embeddings of the training images"
    )
    push.set_defaults(run=_push)
    pull = actions.add_parser(
        "pull",
        help="fetch a checkpoint from a model hub into the store",
        description="Fetch a checkpoint from a model hub, check it against its digests, and put it into the store. "
        "vs2:MODEL@hf:OWNER/NAME uses it without that, from the hub's cache.",
        epilog="example: vs2 store pull owner/my-sae",
    )
    pull.add_argument("repository", metavar="OWNER/NAME[#REVISION]", help="the repository, and a branch, tag or commit")
    pull.add_argument("--name", help="name of the checkpoint in the store (default: that of the repository)")
    pull.add_argument("--overwrite", action="store_true", help="replace a checkpoint of that name")
    pull.set_defaults(run=_pull)


def _add_foreign(actions: Commands) -> None:
    taking = actions.add_parser(
        "import",
        help="make a checkpoint from an SAE by sparsify, SAELens or Prisma",
        description="Make a checkpoint from an SAE that another library trained: the same as vs2-train-sae --sae "
        "FOLDER. How well the SAE fits is measured on the data set.",
        epilog="example: vs2 store import their-sae --model ViT-B-32 --pretrained datacomp_xl_s13b_b90k --dataset "
        "cifar100 --name theirs",
        argument_default=argparse.SUPPRESS,
    )
    taking.add_argument("sae", metavar="FOLDER", help="the folder of the SAE")
    of_training = {field.name for field in fields(TrainConfig)} - {"seed"}
    add_flags(taking, TrainRequest, leave_out={"sae", "recipe", "save_every", *of_training})
    taking.set_defaults(run=_import, interrupted="; what was read so far is kept: run the same command to continue")
    giving = actions.add_parser(
        "export",
        help="write the SAEs of a checkpoint for sparsify or SAELens",
        description="Write the SAEs of a checkpoint for another library, each into a folder of its own. These "
        "formats cannot hold the mean activation, the thresholds of the gate, the gallery and the tower's digest.",
        epilog="example: vs2 store export my-sae exported --format saelens",
    )
    giving.add_argument("name", metavar="NAME", help="the checkpoint, its folder, or hf:OWNER/NAME")
    giving.add_argument("folder", type=Path, metavar="FOLDER", help="where to write")
    giving.add_argument("--format", required=True, choices=FORMATS, help="whose")
    giving.set_defaults(run=_export)


def _list(args: argparse.Namespace) -> None:
    store = Store.default(args.store)
    say(f"store {store.root}")
    for name in store.names():
        folder = store.checkpoints / name
        try:
            checkpoint = Checkpoint.load(folder)
        except CheckpointError as error:
            say(f"  {name}  cannot be used: {error}")
            continue
        data, sites = checkpoint.data, checkpoint.sites
        names = [f"{name} ({folder})" if folder else name for name, folder in zip_longest(data.datasets, data.folders)]
        marks = "  transductive" if checkpoint.transductive else ""
        marks += "".join(f"  useless at {site.folder}: {site.warning}" for site in sites if site.warning)
        say(
            f"  {name}  {checkpoint.backbone} {checkpoint.pretrained or ''} on "
            f"{' '.join(names)} ({data.images:,} images), "
            f"{counted(len(sites), 'SAE')}, FVU {_span([site.fvu for site in sites], '.4f')}{_shares(sites)}, "
            f"{gigabytes(folder_size(folder))}{marks}"
        )
    if not store.names():
        say(f"  no checkpoints; train one with {shlex.join(['vs2-train-sae', *store.words])}")
    cached = list(store.cached())
    say(f"  cached activations: {counted(len(cached), 'set')}, {gigabytes(folder_size(*cached))}")
    folders = [*(store.checkpoints / name for name in store.names()), *cached]
    if folder_size(*folders) < sum(map(folder_size, folders)):
        say(f"  both together: {gigabytes(folder_size(*folders))}, since galleries share files with the cache")
    for left in store.unfinished():
        age = int((time.time() - last_change(left)) / 3600)
        say(
            f"  unfinished: {left.relative_to(store.root)}, {gigabytes(folder_size(left))}, written "
            f"{counted(age, 'hour') + ' ago' if age else 'within the last hour'}; the command that began it continues "
            f"it, and {shlex.join(['vs2', 'store', *store.words, 'remove', '--cache'])} deletes it"
        )


def _shares(sites: Iterable[SiteSAE]) -> str:
    """Return the shares of dead and dense latents and of accuracy recovered, as text; unrecorded ones are left out."""
    words = {"dead": "dead", "dense": "dense", "recovered": "of the accuracy recovered"}
    figures = {name: [share for site in sites if isinstance(share := site.training.get(name), float)] for name in words}
    return "".join(f", {_span(shares, '.1%')} {words[name]}" for name, shares in figures.items() if shares)


def _span(figures: Collection[float], form: str) -> str:
    """Return the smallest and the largest figure as text; only one where both read the same."""
    return " to ".join(dict.fromkeys(format(figure, form) for figure in (min(figures), max(figures))))


def _remove(args: argparse.Namespace) -> None:
    store = Store.default(args.store)
    if not args.names and not args.cache:
        listing = shlex.join(["vs2", "store", *store.words, "list"])
        raise SettingError(f"nothing to remove: name checkpoints (see {listing}), or give --cache")
    for name in args.names:
        say(f"removed {name}: {gigabytes(store.remove(name))}")
    if args.cache:
        say(f"removed cached activations: {gigabytes(store.remove_cache())}")


def _push(args: argparse.Namespace) -> None:
    checkpoint, target = Store.default(args.store).find(args.name), _repository(args.repository)
    if target.revision is not None:
        raise SettingError(f"{args.repository}: a push goes to the main branch; omit #{target.revision}")
    if checkpoint.gallery is not None and not args.gallery:
        say(
            f"its gallery of {checkpoint.gallery.count:,} images is not pushed; methods that use one (vs2s, auto, "
            "vs2pp, ...) need --gallery"
        )
    where = checkpoint.push_to_hub(target.name, gallery=args.gallery, license=args.license, private=args.private)
    say(f"pushed {checkpoint.name}: {where}")
    if checkpoint.tower is not None:
        say(f"use it as vs2:{checkpoint.backbone}@{target}")


def _pull(args: argparse.Namespace) -> None:
    store, source = Store.default(args.store), _repository(args.repository)
    folder = store.folder(args.name or source.name.rpartition("/")[2])
    if folder.exists() and not args.overwrite:
        raise DataError(f"checkpoint {folder.name!r} is already in the store; give --name, or --overwrite")
    store.require_writable()
    checkpoint = Checkpoint.from_hub(*source, refresh=True).save(folder, overwrite=args.overwrite)
    say(f"pulled {source}: {checkpoint.folder}")
    if checkpoint.tower is not None:
        say(f"use it as vs2:{checkpoint.backbone}@{checkpoint.name}, with {checkpoint.model}")


def _import(args: argparse.Namespace) -> None:
    from vs2_plugin.cli.train_sae import train

    names = {field.name for field in fields(TrainRequest)}
    train({name: value for name, value in vars(args).items() if name in names})


def _export(args: argparse.Namespace) -> None:
    checkpoint = Store.default(args.store).find(args.name)
    for folder in export(checkpoint, args.folder, args.format):
        say(f"wrote {folder}")
    say(f"{FORMATS[args.format]} reads {'it' if args.format == 'sparsify' else 'each'}")
    gallery = ", the gallery" if checkpoint.gallery else ""
    labels = ", which SAE was trained with labels" if any(site.labels != "none" for site in checkpoint.sites) else ""
    say(
        f"not exported, as the format cannot hold them: the mean activation, the thresholds of the gate{gallery}, "
        f"which tower and data it is for{labels}; vs2 store import measures again what can be measured"
    )


def _repository(text: str) -> Repository:
    parsed = repository(text, prefixed=False)
    if parsed is None:
        raise SettingError(f"{text!r} is not a repository; expected OWNER/NAME")
    return parsed
