"""Damaged checkpoints of every kind: only this package's errors come out, and the others in the store go on.

Each case changes the facts of a checkpoint that the version before wrote, as values or as text.
"""

import copy
import json
import random
import shutil
import struct
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vs2_plugin.checkpoint.checkpoint import Checkpoint
from vs2_plugin.checkpoint.manifest import MANIFEST
from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli.doctor import _checkpoints
from vs2_plugin.cli.main import main
from vs2_plugin.errors import CheckpointError, Vs2Error
from vs2_plugin.sae.files import CONFIG_FILE, WEIGHTS_FILE, load_sae
from vs2_plugin.steering.gate import threshold

GOOD = Path(__file__).parent / "fixtures/version1"
SITE = "visual.transformer.resblocks.1"
CASES = 100


NUMBERS = [0, 1, -1, 2, 64.0, 0.5, 2**31, 2**63, 10**12, 10**30, 10**400, -(10**400), 1e39, 1e308, -0.0]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
WORDS = ["", "text", "0", "1e5", "nan", "\ud800", "../x", "/", "a/b", "a\0b", "\x1b[2J\n", "x" * 5000, "\xb2", "\u0661"]
VALUES = [None, True, False, *NUMBERS, *WORDS, [], {}, [[]], [None], {"": {}}, [0.5] * 16]
VALUES += ["@nested"] * 5  # stands for lists or objects within each other
TEXTS = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, '"\\ud800"', "true", "null", "-", "\xff"]


def some_place(value, rng):
    """A place in a value: what holds it, and under which key."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        inner = value[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.2:
            return value, key
        value = inner


def change_value(facts, rng):
    """Change one to three values of ``facts``, or their names, or how many there are."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not facts:
            return facts
        inner, key = some_place(facts, rng)
        action = rng.choice(["value", "value", "value", "leave out", "twice", "name", "elsewhere"])
        if action == "value":
            inner[key] = copy.deepcopy(rng.choice(VALUES))
        elif action == "leave out":
            del inner[key]
        elif action == "twice" and isinstance(inner, list):
            inner.insert(key, copy.deepcopy(inner[key]))
        elif action == "name" and isinstance(inner, dict):
            inner[rng.choice(WORDS)] = inner.pop(key)
        else:
            other, elsewhere = some_place(facts, rng)
            inner[key] = copy.deepcopy(other[elsewhere])
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
    depth = rng.choice([20, 100, 500, 800, 900, 950, 5000])
    nested = rng.choice(["[", '{"a":'])
    text = json.dumps(change_value(json.loads(text), rng))
    return text.replace('"@nested"', nested * depth + "0" + ("]" if nested == "[" else "}") * depth).encode()


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
            done.append(error)

    checkpoint = attempt(Checkpoint.load, folder)
    if checkpoint is not None:
        for blocks, variant in ((None, "plain"), ("all", "plain"), ("0+1", "pass")):
            for site in attempt(checkpoint.select, blocks, variant) or ():
                attempt(checkpoint.sae, site)
                attempt(threshold, site.fvu_quantiles, 0.99)
        attempt(checkpoint.verify)
        attempt(checkpoint.require_tower, Checkpoint.load(GOOD).tower, "ViT-B-32")
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


# ---- the same, one file at a time, in cases that hypothesis finds


@given(st.randoms())
@settings(max_examples=15 * settings.default.max_examples)
def test_any_facts_are_read_or_refused(folder, rng):
    (folder / MANIFEST).write_bytes(changed((GOOD / MANIFEST).read_bytes(), rng))
    try:
        found = Checkpoint.load(folder)
    except CheckpointError:
        return
    assert Checkpoint.load(folder) == found and found.select("all" if found.sites[-1].block is not None else None)
    for site in found.sites:
        with suppress(Vs2Error):
            threshold(site.fvu_quantiles, 0.99)


@given(st.randoms())
@settings(max_examples=10 * settings.default.max_examples)
def test_any_configuration_of_an_sae_is_read_or_refused(folder, rng):
    (folder / CONFIG_FILE).write_bytes(changed((GOOD / SITE / CONFIG_FILE).read_bytes(), rng))
    (folder / WEIGHTS_FILE).write_bytes(WEIGHTS)
    with little_memory():
        read_or_refused(folder)


WEIGHTS = (GOOD / SITE / WEIGHTS_FILE).read_bytes()
LENGTH = struct.unpack("<Q", WEIGHTS[:8])[0]
HEADER, NUMBERS_OF = WEIGHTS[8 : 8 + LENGTH], WEIGHTS[8 + LENGTH :]
LENGTHS = st.integers(0, 2**64 - 1) | st.sampled_from([0, LENGTH - 1, LENGTH + 1, 10**8, 10**8 + 1, 2**31, 2**63])


@st.composite
def headers(draw):
    """A safetensors file with another header: of any bytes, of any length, or of other facts."""
    header = draw(st.binary(max_size=200) | st.randoms().map(lambda rng: changed(HEADER, rng)) | st.just(HEADER))
    data = struct.pack("<Q", draw(st.just(len(header)) | LENGTHS)) + header + NUMBERS_OF
    return data[: draw(st.just(len(data)) | st.integers(0, len(data)))]


@given(headers())
@settings(max_examples=20 * settings.default.max_examples)
def test_any_file_of_weights_is_read_or_refused(folder, data):
    shutil.copy(GOOD / SITE / CONFIG_FILE, folder)
    (folder / WEIGHTS_FILE).write_bytes(data)
    with little_memory():
        read_or_refused(folder)


def read_or_refused(folder):
    with suppress(CheckpointError):
        sae = load_sae(folder)
        assert sae.W_dec.shape == (sae.config.num_latents, sae.config.d_in) == (64, 16)
        assert all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())


@contextmanager
def little_memory():
    """Let this process have a gigabyte more than it has, and no more."""
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("changed")
