import signal

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from vs2_plugin.data import images as images_module
from vs2_plugin.data.images import TrainingImages, image_digest, open_images
from vs2_plugin.data.naming import DataSet
from vs2_plugin.errors import DataError, SettingError


class Unreadable(tuple):
    """A sample whose label must not be touched."""

    __slots__ = ()

    def __getitem__(self, index):
        assert index == 0, "a label was read"
        return tuple.__getitem__(self, index)

    def __iter__(self):
        raise AssertionError("a label was read")


class Labelled(Dataset):
    """Images ``[1]`` that hold their own number, each with a label that must not be touched."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Unreadable((torch.tensor([index]), "label"))


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return (Unreadable((torch.tensor([index]), "label")) for index in range(self.count))


class StreamOfKnownLength(Stream):
    """As clip_benchmark's vtab/ and tfds/ data sets."""

    def __len__(self):
        return self.count


@pytest.fixture
def built(monkeypatch):
    """Put a data set in the place of what clip_benchmark builds."""
    return lambda dataset: monkeypatch.setattr(images_module, "build", lambda *args, **settings: dataset)


def numbers(images, batch_size=4, num_workers=0):
    return [row.item() for batch in images.batches(batch_size, num_workers) for row in batch.images]


def open_any(**options):
    return open_images(DataSet.of("any", "root"), "train", None, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", [Labelled(10), StreamOfKnownLength(10)], ids=["map", "stream"])
def test_every_image_comes_once_in_order_and_no_label_is_read(source, num_workers, built):
    built(source)
    images = open_any()
    assert images.count == 10
    assert numbers(images, num_workers=num_workers) == list(range(10))
    assert numbers(images, num_workers=num_workers) == list(range(10))


def test_batches_have_the_size_asked_for(built):
    built(Labelled(10))
    assert [len(batch.images) for batch in open_any().batches(4, 0)] == [4, 4, 2]


def test_bare_images_and_lists_are_images_too():
    for sample in (torch.ones(1), [torch.ones(1), "label"]):
        assert numbers(TrainingImages([sample], None, None)) == [1]


# ---- digests and labels


def test_the_digest_is_of_the_pixels_alone():
    image = torch.rand(3, 4, 5)
    other = image.clone()
    other[2, 3, 4] += 1e-6
    assert image_digest(image) == image_digest(image.clone()) != image_digest(other)
    assert image_digest(image) == image_digest(image.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    half = image.half()
    assert image_digest(half) == image_digest(half.float())
    assert 0 <= image_digest(image) < 2**64


def test_equal_images_have_one_digest_whatever_the_batch():
    images = TrainingImages([torch.ones(2), torch.zeros(2), torch.ones(2)], None, None)
    whole = np.concatenate([batch.digests for batch in images.batches(3, 0)])
    parted = np.concatenate([batch.digests for batch in images.batches(2, 0)])
    assert whole.dtype == np.uint64 and np.array_equal(whole, parted)
    assert whole[0] == whole[2] != whole[1]
    assert all(batch.labels is None for batch in images.batches(2, 0))


LABELS = [[3, 1, 2], [np.int32(3), np.int64(1), np.uint8(2)], [torch.tensor(3), torch.tensor(1), torch.tensor(2)]]


@pytest.mark.parametrize("labels", LABELS, ids=["int", "numpy", "tensor"])
def test_labels_are_read_where_they_are_asked_for(labels):
    source = [(torch.tensor([index]), label) for index, label in enumerate(labels)]
    found = [batch.labels for batch in TrainingImages(source, None, None, labels=True).batches(2, 0)]
    assert all(part.dtype == np.int64 for part in found) and np.concatenate(found).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    "sample", [(torch.ones(1), "a dog"), (torch.ones(1), torch.ones(5)), (torch.ones(1), None), torch.ones(1)]
)
def test_what_is_no_class_number_is_refused_where_labels_are_asked_for(sample):
    with pytest.raises(DataError, match=r"labels are needed, but this data set gives .* one class number"):
        list(TrainingImages([sample], None, None, labels=True).batches(1, 0))


@pytest.mark.parametrize(("label", "below"), [(-1, 9), (10, 9), (np.int64(9999999999), 9), (torch.tensor(99), 9)])
def test_a_label_that_is_none_of_the_classes_of_a_data_set_is_refused(label, below, built):
    class Classified(Labelled):
        classes = [f"class {number}" for number in range(10)]

        def __getitem__(self, index):
            return torch.ones(1), label

    built(Classified(3))
    with pytest.raises(DataError, match=rf"the label is {int(label)}; .* 0 to {below} \(any names 10 classes"):
        list(open_any(labels=True).batches(2, 0))


@pytest.mark.parametrize("label", [-1, 10**6, 10**18])
def test_a_label_that_can_number_no_class_is_refused(label, built):
    with pytest.raises(DataError, match=rf"the label is {label}; .* 0 to 999999 \(no file names the classes"):
        list(TrainingImages([(torch.ones(1), label)], None, None, labels=True).batches(1, 0))


@pytest.mark.parametrize("limit", [1, 3, 4])
def test_a_stream_is_cut_with_its_digests_and_labels(limit):
    class Labels(IterableDataset):
        def __iter__(self):
            return ((torch.tensor([index]), 9 - index) for index in range(10))

    images = TrainingImages(Labels(), limit, None, labels=True)
    found = list(images.batches(3, 0))
    for batch in found:
        assert len(batch.images) == len(batch.digests) == len(batch.labels)
    assert np.concatenate([batch.labels for batch in found]).tolist() == [9 - index for index in range(limit)]


# ---- subsets


def test_a_subset_is_random_in_order_and_the_same_each_time(built):
    built(Labelled(100))
    chosen = numbers(open_any(max_images=10))
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen != list(range(10))
    torch.manual_seed(3)
    assert numbers(open_any(max_images=10)) == chosen


def test_a_subset_leaves_the_random_numbers_of_the_rest_alone(built):
    built(Labelled(100))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    open_any(max_images=10)
    assert torch.rand(1) == expected


def test_no_subset_is_made_of_fewer_images_than_asked_for(built):
    built(Labelled(5))
    images = open_any(max_images=5)
    assert images.count == 5
    assert images.fingerprint == open_any().fingerprint
    assert numbers(images) == list(range(5))


def test_the_fingerprint_tells_subsets_and_sizes_apart(built):
    found = []
    for count, options in (
        (100, {}),
        (101, {}),
        (100, {"max_images": 9}),
        (100, {"max_images": 10}),
    ):
        built(Labelled(count))
        found.append(str(open_any(**options).fingerprint))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("limit", "batch_size", "expected"), [(None, 4, 10), (3, 4, 3), (4, 4, 4), (5, 4, 5), (99, 4, 10)]
)
def test_a_stream_of_unknown_length_is_cut(limit, batch_size, expected, built):
    built(Stream(10))
    images = open_any(max_images=limit)
    assert images.count is None
    assert numbers(images, batch_size) == list(range(expected))


def test_a_stream_of_known_length_is_cut(built):
    built(StreamOfKnownLength(10))
    images = open_any(max_images=4)
    assert images.count == 4
    assert numbers(images) == [0, 1, 2, 3]


def test_an_empty_split_is_refused(built):
    built(Labelled(0))
    with pytest.raises(DataError, match="the split 'train' of any in root is empty"):
        open_any()


# ---- data sets that clip_benchmark builds


def write_faces(root, picture):
    for split, value in (("train", 10), ("test", 200)):
        for label in ("angry", "happy"):
            (root / split / label).mkdir(parents=True)
            (root / split / label / "1.png").write_bytes(picture(value))


def grey(image):
    return torch.tensor([image.getpixel((0, 0))[0]])


@pytest.mark.parametrize(("split", "expected"), [("train", [10, 10]), ("test", [200, 200])])
def test_clip_benchmark_builds_the_split_asked_for(split, expected, tmp_path, picture):
    write_faces(tmp_path / "fer2013", picture)
    images = open_images(DataSet.of("fer2013", str(tmp_path / "{dataset}")), split, grey)
    assert numbers(images) == expected


def test_the_dummy_data_set_is_read_whatever_its_transform():
    (found,) = open_images(DataSet.of("dummy", "root"), "test", None).batches(8, 0)
    assert found.images.shape == (1, 3, 224, 224)


def test_placeholders_of_the_root_are_filled_in_as_clip_benchmark_does(tmp_path, write_shards, picture):
    write_shards(tmp_path / "vtab/x" / "train", [{"a.png": picture(5)}])
    write_shards(tmp_path / "vtab-x" / "train", [{"a.png": picture(6)}])
    assert numbers(open_images(DataSet.of("wds/vtab/x", f"{tmp_path}/{{dataset}}"), "train", grey)) == [5]
    assert numbers(open_images(DataSet.of("wds/vtab/x", f"{tmp_path}/{{dataset_cleaned}}"), "train", grey)) == [6]


@pytest.mark.parametrize("root", ["data{set}", "data{"])
def test_other_braces_in_the_root_are_refused(root):
    with pytest.raises(SettingError):
        open_images(DataSet.of("wds/x", root), "train", grey)


def test_the_fingerprint_changes_with_the_images(tmp_path, picture):
    write_faces(tmp_path, picture)
    before = open_images(DataSet.of("fer2013", str(tmp_path)), "train", grey).fingerprint
    assert open_images(DataSet.of("fer2013", str(tmp_path)), "train", grey).fingerprint == before
    (tmp_path / "train" / "happy" / "1.png").write_bytes(picture(11))
    assert open_images(DataSet.of("fer2013", str(tmp_path)), "train", grey).fingerprint != before


NOT_BUILT = [
    ("pets", "train", "Only `trainval` and `test` split available for pets"),
    ("imagenetv2", "train", "Only `test` split available"),
    ("tfds/mnist", "train", "tensorflow"),
]


@pytest.mark.parametrize(("dataset", "split", "reason"), NOT_BUILT)
def test_what_clip_benchmark_cannot_build_is_said_in_one_line(dataset, split, reason, tmp_path):
    with pytest.raises(DataError) as error:
        open_images(DataSet.of(dataset, str(tmp_path)), split, None)
    assert f"could not build the split {split!r} of {dataset!r}" in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


# ---- damage


class Damaged(Labelled):
    bad = (2,)  # not among the few that are looked at when the data set is opened

    def __init__(self, error):
        super().__init__(30)
        self.error = error

    def __getitem__(self, index):
        if index in self.bad:
            raise self.error
        return super().__getitem__(index)


def complaint(num_workers):
    """What opening or reading the images is refused with."""
    try:
        numbers(open_any(), num_workers=num_workers)
    except DataError as error:
        return str(error)
    return pytest.fail("the images were read")


UNREADABLE = [
    (OSError("broken file"), 0),
    (ValueError("broken file"), 0),
    (KeyError("broken file"), 0),
    (OSError("broken file"), 1),
]


@pytest.mark.parametrize(("error", "num_workers"), UNREADABLE, ids=str)
def test_an_unreadable_image_is_a_data_error_in_one_line(error, num_workers, built):
    built(Damaged(error))
    said = complaint(num_workers)
    assert said.startswith("cannot read the training images: ")
    assert "\n" not in said and said.endswith(", counted from 0)")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_this_package_keep_their_words(num_workers, built):
    built(Damaged(DataError("0.tar: b.png is not a readable image")))
    assert complaint(num_workers) == "0.tar: b.png is not a readable image"


def test_images_of_several_sizes_are_a_data_error():
    with pytest.raises(DataError, match="cannot read the training images: RuntimeError"):
        numbers(TrainingImages([torch.ones(1), torch.ones(2)], None, None))


class Handler(Dataset):
    """Images that say what Ctrl-C does where they are loaded."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.tensor([signal.getsignal(signal.SIGINT) is signal.SIG_IGN])


def test_loaders_leave_interruptions_to_the_main_process():
    """All processes of a terminal get Ctrl-C; each would print a traceback of its own."""
    assert numbers(TrainingImages(Handler(), None, None), num_workers=1) == [True, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
