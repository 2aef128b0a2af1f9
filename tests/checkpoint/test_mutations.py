"""Damaged checkpoints of every kind: only this package's errors come out, and the others in the store go on.

Each case changes the facts of a checkpoint that the version before wrote, as values or as text.
"""

import copy
import json
import random
import shutil
import struct
from pathlib import Path

import pytest

from vs2_plugin.checkpoint.checkpoint import MANIFEST, Checkpoint
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli.doctor import _checkpoints
from vs2_plugin.cli.main import main
from vs2_plugin.errors import Vs2Error
from vs2_plugin.sae.files import CONFIG_FILE, WEIGHTS_FILE, load_sae
from vs2_plugin.steering.gate import threshold

GOOD = Path(__file__).parent / "fixtures/version1"
SITE = "visual.transformer.resblocks.1"
CASES = 300


def nested(depth, kind=list):
    value = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


NUMBERS = [0, 1, -1, 2, 64.0, 0.5, 2**31, 2**63, 10**12, 10**30, 10**400, -(10**400), 1e39, 1e308, -0.0]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
WORDS = ["", "text", "0", "1e5", "nan", "\ud800", "../x", "/", "a/b", "a\0b", "\x1b[2J\n", "x" * 5000, "\xb2", "\u0661"]
VALUES = [None, True, False, *NUMBERS, *WORDS, [], {}, [[]], [None], {"": {}}, [0.5] * 16]
VALUES += [nested(depth, kind) for depth in (25, 200, 400) for kind in (list, dict)]
TEXTS = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, '"\\ud800"', "true", "null", "-", "\xff"]


def places(value, way=()):
    """All places of a value, each as the keys that lead there."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(min(len(value), 4)):
            yield (*way, key)
            yield from places(value[key], (*way, key))


def change_value(facts, rng):
    """Change one to three values of ``facts``, or their names, or how many there are."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        everywhere = list(places(facts))
        if not everywhere:
            return facts
        *way, last = rng.choice(everywhere)
        inner = facts
        for key in way:
            inner = inner[key]
        action = rng.choice(["value", "value", "value", "leave out", "twice", "name", "elsewhere"])
        if action == "value":
            inner[last] = copy.deepcopy(rng.choice(VALUES))
        elif action == "leave out":
            del inner[last]
        elif action == "twice" and isinstance(inner, list):
            inner.insert(last, copy.deepcopy(inner[last]))
        elif action == "name" and isinstance(inner, dict):
            inner[rng.choice(WORDS)] = inner.pop(last)
        else:
            other = facts
            for key in rng.choice(everywhere):
                other = other[key]
            inner[last] = copy.deepcopy(other)
    return facts


def change_text(text, rng):
    """Change a few bytes anywhere, or put something else in place of a few."""
    data = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(data) or 1)
        action = rng.choice(["flip", "cut", "put", "end"])
        if action == "flip" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif action == "end" and rng.random() < 0.3:
            del data[at:]
        else:
            data[at : at + rng.choice([0, 1, 5])] = rng.choice(TEXTS).encode("utf-8") if action == "put" else b""
    return bytes(data)


def changed(text, rng):
    if rng.random() < 0.3:
        return change_text(text, rng)
    return json.dumps(change_value(json.loads(text), rng)).encode()


def change_header(data, rng):
    """Change the header of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    header = changed(data[8 : 8 + length], rng)
    size = rng.choice([len(header), len(header), length, 0, 2**63, rng.randrange(2**20)])
    return struct.pack("<Q", size) + header + data[8 + length :]


def damage(folder, rng):
    """Change a checkpoint; its digests are made to fit now and then, so that what they guard is read too."""
    which = rng.choice([MANIFEST, MANIFEST, MANIFEST, CONFIG_FILE, WEIGHTS_FILE])
    path = folder / which if which == MANIFEST else folder / SITE / which
    path.write_bytes((change_header if which == WEIGHTS_FILE else changed)(path.read_bytes(), rng))


def use(folder, done):
    """Do everything with a checkpoint; ``done`` collects this package's errors."""

    def attempt(action, *args):
        try:
            return action(*args)
        except Vs2Error as error:
            assert "\n" not in str(error).replace(str(folder), "") or isinstance(error.__cause__, OSError)
            done.append(error)

    checkpoint = attempt(Checkpoint.open, folder)
    if checkpoint is not None:
        for blocks, variant in ((None, "plain"), ("all", "plain"), ("0+1", "pass")):
            for site in attempt(checkpoint.select, blocks, variant) or ():
                attempt(checkpoint.load, site)
                attempt(threshold, site.fvu_quantiles, 0.99)
        attempt(checkpoint.verify)
        attempt(checkpoint.require_tower, Checkpoint.open(GOOD).tower)
        attempt(checkpoint.require_gallery, True, "clip", 50)
    attempt(load_sae, folder / SITE)


def check(store, seed, capsys):
    folder, rng = store.checkpoints / "damaged", random.Random(seed)
    shutil.copytree(GOOD, folder)
    damage(folder, rng)
    done = []
    use(folder, done)
    assert main(["store", "--store", str(store.root), "list"]) == 0
    listed = capsys.readouterr().out
    assert "\n  damaged  " in listed and "\n  whole  " in listed
    listed.encode()
    if seed % 10 == 0:  # this reads all of all checkpoints
        findings = {finding.text.partition(":")[0]: finding for finding in _checkpoints(store)}
        assert findings["whole"].good
    shutil.rmtree(folder)
    return done


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    shutil.copytree(GOOD, store.checkpoints / "whole")
    return store


@pytest.mark.parametrize("start", range(0, CASES, 50))
def test_only_errors_of_this_package_come_out_of_a_damaged_checkpoint(start, store, capsys):
    refused = [bool(check(store, seed, capsys)) for seed in range(start, start + 50)]
    assert sum(refused) > 25
