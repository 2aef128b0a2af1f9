"""``vs2 store``: list or remove checkpoints and cached activations."""

from __future__ import annotations

import argparse
import shlex
import time

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.store import Store, folder_size, last_change
from vs2_plugin.cli.common import add_store_option
from vs2_plugin.errors import CheckpointError, SettingError
from vs2_plugin.messages import say
from vs2_plugin.text import counted, gigabytes

__all__ = ["add_store"]


def add_store(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``vs2``."""
    store = commands.add_parser(
        "store",
        help="list or remove checkpoints and cached activations",
        epilog="examples: vs2 store list; vs2 store remove ViT-B-32-quickgelu_openai_cifar100",
    )
    add_store_option(store)
    actions = store.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="what is there", epilog="example: vs2 store --store store list")
    listing.set_defaults(run=_list)
    remove = actions.add_parser(
        "remove", help="delete checkpoints, or cached activations", epilog="example: vs2 store remove --cache"
    )
    remove.add_argument("names", nargs="*", metavar="NAME", help="checkpoints to delete")
    remove.add_argument(
        "--cache",
        action="store_true",
        help="delete all cached activations (they are made again when needed), and what interrupted runs left",
    )
    remove.set_defaults(run=_remove)


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
        marks = "  transductive" if checkpoint.transductive else ""
        marks += "".join(f"  of no use at {site.folder}: {site.warning}" for site in sites if site.warning)
        say(
            f"  {name}  {checkpoint.backbone} {checkpoint.pretrained or ''} on "
            f"{' '.join(data.datasets)} ({data.images:,} images), "
            f"{len(sites)} site(s), FVU {sites[-1].fvu:.4f}, {gigabytes(folder_size(folder))}{marks}"
        )
    if not store.names():
        say(f"  no checkpoints; train one with {shlex.join(['vs2-train-sae', *store.words])}")
    cached = list(store.cached())
    say(f"  cached activations: {len(cached)} set(s), {gigabytes(sum(map(folder_size, cached)))}")
    for left in store.unfinished():
        age = int((time.time() - last_change(left)) / 3600)
        say(
            f"  unfinished: {left.relative_to(store.root)}, {gigabytes(folder_size(left))}, written "
            f"{counted(age, 'hour') + ' ago' if age else 'within the last hour'}; the command that began it goes on "
            f"with it, and {shlex.join(['vs2', 'store', *store.words, 'remove', '--cache'])} deletes it"
        )


def _remove(args: argparse.Namespace) -> None:
    store = Store.default(args.store)
    if not args.names and not args.cache:
        listing = shlex.join(["vs2", "store", *store.words, "list"])
        raise SettingError(f"nothing to remove: name checkpoints (see {listing}), or give --cache")
    for name in args.names:
        say(f"removed {name}: {gigabytes(store.remove(name))}")
    if args.cache:
        say(f"removed cached activations: {gigabytes(store.remove_cache())}")
