"""``vs2.json``, the file in which a checkpoint keeps this package's own facts, as plain JSON values.

No heavy imports, since the harness looks a checkpoint up before it loads anything.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vs2_plugin import __version__
from vs2_plugin.errors import CheckpointError, CheckpointNotFound
from vs2_plugin.files import atomic_file, hidden, json_digest

__all__ = ["AGAIN", "MANIFEST", "manifest_digest", "read_manifest", "write_manifest"]

MANIFEST = "vs2.json"
#: Advice for a damaged checkpoint.
AGAIN = "train the checkpoint again"
_FORMAT = "vs2-checkpoint"
_VERSION = 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the values of ``vs2.json`` in ``folder``, of which only format and version are checked.

    Raises:
        CheckpointNotFound: the file is missing or cannot be read.
        CheckpointError: this user may not read the file, or it is not JSON, or of another format or version.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        if problem := hidden(error, path):
            raise CheckpointError(problem) from error
        raise CheckpointNotFound(
            f"no SAE checkpoint in {folder}: no readable {MANIFEST} ({error.strerror})"
        ) from error
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__} {error}; {AGAIN}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a {_FORMAT} file")
    if values.get("format_version") != _VERSION:
        raise CheckpointError(
            f"{path} has format version {reprlib.repr(values.get('format_version'))}, this vs2-plugin "
            f"({__version__}) reads {_VERSION}; {AGAIN} or install the version that wrote it"
        )
    return values


def write_manifest(folder: Path, values: Mapping[str, Any]) -> None:
    """Write ``vs2.json`` in ``folder``: the values, with format, version and digest."""
    whole = {"format": _FORMAT, "format_version": _VERSION, **values, "digest": manifest_digest(values)}
    with atomic_file(folder / MANIFEST) as scratch:
        scratch.write_text(json.dumps(whole, indent=1) + "\n")


def manifest_digest(values: Mapping[str, Any]) -> str:
    """Return the digest of the values that results depend on. It leaves out times, versions and commands, so that the
    same training gives the same digest."""
    sites = [{key: value for key, value in site.items() if key != "training"} for site in values["sites"]]
    return json_digest([values["tower"], values["data"], sites, values.get("gallery")])
