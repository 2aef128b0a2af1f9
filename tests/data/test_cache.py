import json
from contextlib import contextmanager, suppress
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import IterableDataset

from vs2_plugin.arrays import ROWS, whole_rows
from vs2_plugin.clip.edits import reading
from vs2_plugin.clip.sites import Sites
from vs2_plugin.data import cache as cache_module
from vs2_plugin.data.cache import ActivationCache, extract, require_space
from vs2_plugin.data.folders import LeftOut
from vs2_plugin.data.images import TrainingImages, image_digest
from vs2_plugin.distributed import Processes
from vs2_plugin.errors import DataError
from vs2_plugin.files import LOCKS, part_of
from vs2_plugin.training.extract import activations_at

KEY = {
    "tower": {"parameters": "abc"},
    "dataset": "wds/x",
    "split": "train",
    "images": [["0.tar", 7]],
    "dtype": "float32",
}


@pytest.fixture
def cache(tmp_path):
    return ActivationCache(tmp_path / "activations")


@pytest.fixture(scope="module")
def model(make_clip):
    return make_clip()


COLUMN = "visual.transformer.resblocks.2"


def pictures(count, labels=False):
    made = list(torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    source = [(image, 10 - number) for number, image in enumerate(made)] if labels else made
    return TrainingImages(source, None, None, labels)


def run(model, images, cache, *, key=KEY, sites=None, batch_size=4, amp=False, dtype=np.float32):
    sites = sites or [Sites.of(model).default]
    return extract(
        activations_at(model, sites, amp),
        widths(sites),
        images,
        cache,
        key,
        device="cpu",
        batch_size=batch_size,
        num_workers=0,
        dtype=np.dtype(dtype),
        quiet=True,
    )


def widths(sites):
    return {site.hookpoint: site.width for site in sites}


# ---- extraction


def test_the_activations_of_every_site_are_those_of_one_pass(model, cache):
    images, sites = pictures(10), [*Sites.of(model).blocks, Sites.of(model).output]
    found = run(model, images, cache, sites=sites)
    with torch.no_grad(), reading(model, sites) as expected:
        model.encode_image(torch.stack(images.source[:4]))
    assert len(found) == 10 and found.columns.keys() == widths(sites).keys()
    for site in sites:
        column = found.columns[site.hookpoint]
        assert column.shape == (10, site.width)
        assert isinstance(column, np.memmap)
        assert np.array_equal(column[:4], expected[site].numpy())
    assert not np.array_equal(found.columns[sites[0].hookpoint], found.columns[sites[1].hookpoint])


def test_columns_of_any_encoder_are_stored_and_others_passed_over(cache):
    images = pictures(5)

    def encode(batch):
        return {"mean": batch.mean((2, 3)), "not asked for": batch}

    settings = {"device": "cpu", "batch_size": 2, "num_workers": 0, "dtype": np.dtype("float32"), "quiet": True}
    found = extract(encode, {"mean": 3}, images, cache, KEY, **settings)
    assert list(found.columns) == ["mean"]
    assert np.allclose(found.columns["mean"], torch.stack(images.source).mean((2, 3)).numpy())


def test_digests_tell_the_images_apart_and_labels_stand_beside_them(model, cache):
    images = pictures(7, labels=True)
    images.source[5] = (images.source[2][0].clone(), 3)
    found = run(model, images, cache)
    assert found.digests.dtype == np.uint64 and found.labels.dtype == np.int64
    assert found.digests.tolist() == [image_digest(image) for image, _ in images.source]
    assert len(set(found.digests.tolist())) == 6 and found.digests[5] == found.digests[2]
    assert found.labels.tolist() == [10, 9, 8, 7, 6, 3, 4]
    again = cache.open(KEY, widths([Sites.of(model).default]), labels=True)
    assert np.array_equal(again.labels, found.labels) and np.array_equal(again.digests, found.digests)
    assert cache.open(KEY, widths([Sites.of(model).default])).labels is None


def test_labels_that_were_not_read_count_as_not_there(model, cache):
    assert run(model, pictures(5), cache).labels is None
    assert cache.open(KEY, widths([Sites.of(model).default]), labels=True) is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 0), (np.float16, 1e-3)])
def test_a_column_is_a_plain_npy_file(dtype, tolerance, model, cache):
    found = run(model, pictures(10), cache, dtype=dtype)
    assert {path.name for path in cache.folder(KEY).glob("*.npy")} == {f"{COLUMN}.npy", "digests.npy"}
    file = found.folder / f"{COLUMN}.npy"
    plain = np.load(file, allow_pickle=False)
    assert (plain.dtype, plain.shape) == (dtype, (10, 32))
    exact = run(model, pictures(10), cache, key={"other": 1}).columns[COLUMN]
    assert np.allclose(plain, exact, rtol=tolerance, atol=tolerance)
    assert np.array_equal(plain, found.columns[COLUMN])
    assert file.stat().st_size == 128 + plain.nbytes


def test_extraction_under_autocast_stores_what_the_tower_gives_there(model, cache):
    images = pictures(4)
    found = run(model, images, cache, amp=True).columns[COLUMN]
    with torch.no_grad(), torch.autocast("cpu"), reading(model, [Sites.of(model).default]) as expected:
        model.encode_image(torch.stack(images.source))
    assert np.array_equal(found, expected[Sites.of(model).default].float().numpy())
    assert not np.array_equal(found, run(model, images, cache, amp=False).columns[COLUMN])


class Casts(TorchDispatchMode):
    """Counts how often a tensor is cast."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor, self.counted = tensor, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.tensor.data_ptr():
            self.counted += 1
        return function(*args, **(kwargs or {}))


def test_autocast_casts_the_weights_once_and_not_for_each_batch(model, cache):
    with Casts(model.visual.transformer.resblocks[0].mlp.c_fc.weight) as casts:
        run(model, pictures(8), cache, amp=True, batch_size=2)
    assert casts.counted == 1
    assert not torch.is_autocast_enabled("cpu")


def test_what_was_extracted_is_found_again(model, cache):
    sites = Sites.of(model).blocks
    assert cache.open(KEY, widths(sites)) is None
    found = run(model, pictures(5), cache, sites=sites)
    again = cache.open(KEY, widths(sites))
    assert again.folder == found.folder and again.columns.keys() == found.columns.keys() == widths(sites).keys()
    assert all(np.array_equal(found.columns[name], again.columns[name]) for name in widths(sites))
    facts = json.loads((cache.folder(KEY) / "activations.json").read_text())
    assert (facts["count"], facts["key"], facts["contents"].keys()) == (5, KEY, {*widths(sites), "digests"})


def test_extracting_again_replaces(model, cache):
    run(model, pictures(5), cache)
    run(model, pictures(7), cache)
    assert len(cache.open(KEY, widths([Sites.of(model).default])).columns[COLUMN]) == 7
    assert names(cache) == [cache.folder(KEY).name]


def names(cache):
    return [path.name for path in cache.root.iterdir() if path.name != LOCKS]


def test_no_images_at_all_are_a_data_error(model, cache):
    with pytest.raises(DataError, match="there are no training images"):
        run(model, pictures(0), cache)
    assert cache.open(KEY, widths([Sites.of(model).default])) is None
    assert names(cache) == []


class Interrupted(TrainingImages):
    """Images that end in an exception after some batches."""

    error, after = None, 1

    def batches(self, batch_size, num_workers, first=0):
        yield from islice(super().batches(batch_size, num_workers, first), self.after)
        raise self.error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), DataError("b.png is broken"), MemoryError()], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("before", [False, True], ids=["nothing there", "earlier run there"])
def test_an_interrupted_extraction_leaves_what_was_there_and_a_later_one_works(error, before, model, cache):
    if before:
        run(model, pictures(5), cache)
    broken = Interrupted(pictures(8).source, None, None)
    broken.error = error
    with pytest.raises(type(error)):
        run(model, broken, cache)
    assert names(cache) == ([cache.folder(KEY).name] if before else [])
    found = cache.open(KEY, widths([Sites.of(model).default]))
    assert len(found) == 5 if before else found is None
    assert len(run(model, pictures(8), cache)) == 8


@pytest.mark.parametrize(
    ("bias", "dtype", "fits"), [(7e4, "float16", False), (6e4, "float16", True), (7e4, "float32", True)]
)
def test_an_activation_that_float16_cannot_hold_is_a_data_error(bias, dtype, fits, make_clip, cache):
    model = make_clip()
    with torch.no_grad():
        model.visual.transformer.resblocks[-1].mlp.c_proj.bias[0] = bias
    if fits:
        run(model, pictures(3), cache, dtype=dtype)
        return
    with pytest.raises(
        DataError, match=rf"an activation at {COLUMN} is 7e\+04, which float16 cannot hold; use --cache_dtype float32"
    ):
        run(model, pictures(3), cache, dtype=dtype)
    assert names(cache) == []


# ---- an interrupted extraction goes on


def mean(batch):
    return {"mean": batch.mean((2, 3))}


class Stream(IterableDataset):
    """Images that come one after the other."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def many(stream=False, limit=None):
    made = torch.rand(2 * ROWS + 300, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    items = [(image, number % 7) for number, image in enumerate(made)]
    return (Stream(items) if stream else items), limit, None, True


SETTINGS = {"device": "cpu", "batch_size": 48, "num_workers": 0, "dtype": np.dtype("float32"), "quiet": True}


@pytest.mark.parametrize(
    ("stream", "limit"), [(False, None), (True, None), (True, ROWS + 500)], ids=["indexed", "stream", "part of it"]
)
def test_it_goes_on_after_the_last_whole_chunk_with_the_same_bytes(stream, limit, cache, tmp_path, caplog):
    caplog.set_level("INFO", "vs2_plugin")
    images = TrainingImages(*many(stream, limit))
    whole = extract(mean, {"mean": 3}, images, ActivationCache(tmp_path / "other"), KEY, **SETTINGS)
    encoded = []

    def counting(batch):
        encoded.append(len(batch))
        return mean(batch)

    for after, kept in ((10, 0), (24, ROWS), (5, ROWS), (22, 2 * ROWS)):
        broken = Interrupted(*many(stream, limit))
        broken.error, broken.after = KeyboardInterrupt(), after
        encoded.clear()
        with pytest.raises(KeyboardInterrupt):
            extract(counting, {"mean": 3}, broken, cache, KEY, **SETTINGS)
        assert cache.open(KEY, {"mean": 3}) is None
        left = whole_rows(part_of(cache.folder(KEY)) / "mean.npy", 3, np.float32)
        assert left == min(kept, (images.limit or 10**9) // ROWS * ROWS)
    encoded.clear()
    found = extract(counting, {"mean": 3}, TrainingImages(*many(stream, limit)), cache, KEY, **SETTINGS)
    assert f"activations of {left:,} images are already there from an interrupted run" in caplog.text
    assert sum(encoded) <= len(whole) - left + 2 * 48
    for name in ("mean", "digests", "labels"):
        for suffix in ("npy", "npy.sha256"):
            assert (found.folder / f"{name}.{suffix}").read_bytes() == (whole.folder / f"{name}.{suffix}").read_bytes()
    assert found.contents == whole.contents


def some_unreadable(which):
    """As many, but that the images numbered so cannot be read."""
    items, *rest = many()
    for number in which:
        items[number] = LeftOut(f"{number}.jpg", f"{number}.jpg is not a readable image"), -1
    return TrainingImages(items, *rest)


@pytest.mark.parametrize(
    "which", [(0,), (5, 47, 48), range(96, 144), (ROWS - 1, ROWS, ROWS + 1), (2 * ROWS + 299,)], ids=str
)
@pytest.mark.parametrize("after", [10, 24, 43])
def test_images_that_cannot_be_read_have_no_row_also_after_an_interruption(which, after, cache, tmp_path, caplog):
    items, *_ = many()
    kept = [number for number in range(len(items)) if number not in which]
    broken = Interrupted(some_unreadable(which).source, None, None, True)
    broken.error, broken.after = KeyboardInterrupt(), after
    with pytest.raises(KeyboardInterrupt):
        extract(mean, {"mean": 3}, broken, cache, KEY, **SETTINGS)
    found = extract(mean, {"mean": 3}, some_unreadable(which), cache, KEY, **SETTINGS)
    assert found.left_out == tuple(f"{number}.jpg" for number in which)
    assert found.digests.tolist() == [image_digest(items[number][0]) for number in kept]
    assert found.labels.tolist() == [items[number][1] for number in kept]
    expected = torch.stack([items[number][0] for number in kept]).mean((2, 3)).numpy()
    assert np.allclose(found.columns["mean"], expected, atol=1e-6)
    assert f"left out: {which[0]}.jpg is not a readable image" in caplog.text
    assert cache.open(KEY, {"mean": 3}).left_out == found.left_out


def test_images_that_cannot_be_read_are_told_of_all_parts(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "wait", lambda: None)
    for rank in (1, 0):
        with suppress(DataError):  # the first has not joined them
            found = extract(
                mean, {"mean": 3}, some_unreadable((3, 2000)), cache, KEY, processes=Processes(rank, 2), **SETTINGS
            )
    assert found.left_out == ("3.jpg", "2000.jpg") and len(found) == 2 * ROWS + 298


def test_a_part_that_was_extracted_before_all_were_killed_is_not_extracted_again(cache, tmp_path):
    """As under torchrun, but one process after the other."""
    whole = extract(mean, {"mean": 3}, TrainingImages(*many()), ActivationCache(tmp_path / "other"), KEY, **SETTINGS)

    def run(encode, rank):
        return extract(
            encode, {"mean": 3}, TrainingImages(*many()), cache, KEY, processes=Processes(rank, 2), **SETTINGS
        )

    for _ in range(2):
        with pytest.raises(DataError, match="what was just extracted is missing"):  # the first has not joined them
            run(mean, 1)
    encoded = []

    def counting(batch):
        encoded.append(len(batch))
        return mean(batch)

    found = run(counting, 0)
    assert sum(encoded) < 0.6 * len(whole)
    assert found.contents == whole.contents
    assert names(cache) == [cache.folder(KEY).name]  # the parts are gone


def test_a_part_that_lies_in_another_folder_is_missed(cache):
    """As where the machines share none."""
    with pytest.raises(DataError, match=r"what another process extracted is missing; start all .* same --store"):
        extract(mean, {"mean": 3}, TrainingImages(*many()), cache, KEY, processes=Processes(0, 2), **SETTINGS)


def test_a_fresh_extraction_does_not_go_on(cache):
    broken = Interrupted(*many())
    broken.error, broken.after = KeyboardInterrupt(), 30
    with pytest.raises(KeyboardInterrupt):
        extract(mean, {"mean": 3}, broken, cache, KEY, **SETTINGS)
    first = []

    def counting(batch):
        first.append(batch)
        return mean(batch)

    images = TrainingImages(*many())
    extract(counting, {"mean": 3}, images, cache, KEY, fresh=True, **SETTINGS)
    assert torch.equal(first[0][0], images.source[0][0])


def test_a_second_process_waits_and_takes_what_the_first_extracted(cache, caplog, monkeypatch):
    caplog.set_level("INFO", "vs2_plugin")

    @contextmanager
    def waited(path, seconds, waiting):
        waiting()
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "alone", stock)
            extract(mean, {"mean": 3}, TrainingImages(*many()), cache, KEY, **SETTINGS)
        yield True

    stock = cache_module.alone
    monkeypatch.setattr(cache_module, "alone", waited)
    found = extract(
        lambda batch: pytest.fail("extracted twice"), {"mean": 3}, TrainingImages(*many()), cache, KEY, **SETTINGS
    )
    assert len(found) == 2 * ROWS + 300
    assert "another process is extracting the same activations: waiting for it" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_activation_that_is_no_number_is_not_blamed_on_the_cache(dtype, make_clip, cache):
    model = make_clip()
    with torch.no_grad():
        model.visual.transformer.resblocks[-1].mlp.c_proj.bias[0] = float("nan")
    with pytest.raises(DataError, match=rf"{COLUMN} is not a finite number as the model computes it, which no"):
        run(model, pictures(3), cache, dtype=dtype)


# ---- the cache


CHANGES = [
    {"tower": {"parameters": "abd"}},
    {"dataset": "wds/y"},
    {"split": "trainval"},
    {"images": [["0.tar", 8]]},
    {"images": []},
    {"dtype": "float16"},
    {"amp": True},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_the_key_changes_with_each_ingredient(change, cache):
    assert cache.folder({**KEY, **change}) != cache.folder(KEY)


def test_the_order_of_the_key_does_not_matter(cache):
    assert cache.folder(dict(reversed(KEY.items()))) == cache.folder(KEY)


def cut(folder, file):
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])


def drop(folder, file):
    (folder / file).unlink()


def swap(folder, file):
    np.save(folder / file, np.zeros((4, 32), np.float32))


def garbage(folder, file):
    (folder / file).write_bytes(b"garbage")


def clear(folder, file):
    (folder / file).write_bytes(b"")


def braces(folder, file):
    (folder / file).write_text("{}")


FACTS = "activations.json"
DAMAGE = [
    *(
        (file, damage)
        for file in (f"{COLUMN}.npy", "digests.npy", "labels.npy")
        for damage in (cut, drop, swap, garbage, clear)
    ),
    *((FACTS, damage) for damage in (drop, garbage, clear, braces)),
]


def flip(folder, file):
    raw = bytearray((folder / file).read_bytes())
    raw[-3] ^= 1
    (folder / file).write_bytes(raw)


DAMAGE += [(file, flip) for file in (f"{COLUMN}.npy", "digests.npy", "labels.npy", f"{COLUMN}.npy.sha256")]


def test_damage_is_named_before_it_is_extracted_again(model, cache, caplog):
    run(model, pictures(5), cache)
    flip(cache.folder(KEY), f"{COLUMN}.npy")
    assert cache.open(KEY, widths([Sites.of(model).default])) is None
    assert f"{COLUMN}.npy: its rows 0 to 4 are not those that were written" in caplog.text


@pytest.mark.parametrize(("file", "damage"), DAMAGE)
def test_what_is_not_whole_counts_as_not_there(file, damage, model, cache):
    run(model, pictures(5, labels=True), cache)
    damage(cache.folder(KEY), file)
    assert cache.open(KEY, widths([Sites.of(model).default]), labels=True) is None


def test_a_site_that_was_not_extracted_counts_as_not_there(model, cache):
    run(model, pictures(5), cache)
    assert cache.open(KEY, widths(Sites.of(model).blocks)) is None


# ---- space


def test_space_is_measured_where_the_folder_will_be(tmp_path):
    assert require_space(tmp_path / "not" / "there" / "yet", 1) > 1
    assert not (tmp_path / "not").exists()


def test_too_little_space_is_a_data_error_with_both_figures(tmp_path):
    with pytest.raises(
        DataError, match=rf"need 1000000000\.0 GB but {tmp_path} has .* GB free; .*--store.*--max_images"
    ):
        require_space(tmp_path / "cache", 10**18)
