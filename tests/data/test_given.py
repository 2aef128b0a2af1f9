"""Images and activations that Python code has at hand, or a file."""

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import Dataset

from vs2_plugin.data.given import GivenActivations, GivenImages, read_activations
from vs2_plugin.data.images import image_digest
from vs2_plugin.errors import DataError


def transform(image):
    """A tower's preprocessing: 4 × 4 pixels, their grey from 0 to 1."""
    grey = torch.from_numpy(np.array(image.convert("RGB").resize((4, 4)))).float() / 255
    return grey.permute(2, 0, 1)


GREYS = (0, 51, 102, 255)
IMAGES = [Image.new("RGB", (8, 8), (grey,) * 3) for grey in GREYS]


class Own(Dataset):
    """A data set of a user's own, as torch has them."""

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, number):
        return IMAGES[number], number + 5


def greys(given, **options):
    """The grey of each image that is read."""
    batches = given.open(transform, **options).batches(3, 0)
    return [round(float(image.mean()) * 255) for batch in batches for image in batch.images]


@pytest.fixture
def ways(tmp_path):
    """The same images in all ways in which they may come."""
    for number, image in enumerate(IMAGES):
        image.save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    return {
        "images": IMAGES,
        "grey": [image.convert("L") for image in IMAGES],
        "files": files,
        "names": tuple(map(str, files)),
        "array": np.stack([np.array(image) for image in IMAGES]),
        "tensor": torch.stack([transform(image) for image in IMAGES]),
        "tensors": [transform(image).double() for image in IMAGES],
        "labeled": list(zip(IMAGES, range(4))),
        "dataset": Own(),
        "generator": (image for image in IMAGES),
        "map": map(np.array, IMAGES),
    }


KEPT = {"images", "grey", "files", "names", "array", "tensor", "tensors", "labeled"}


def test_images_may_come_in_many_ways(ways):
    for name, items in ways.items():
        given = GivenImages(items)
        assert (given.is_kept, given.is_once) == (name in KEPT, name in ("generator", "map")), name
        assert greys(given) == list(GREYS), name


def test_labels_come_beside_images():
    (batch,) = GivenImages(Own()).open(transform, labels=True).batches(9, 0)
    assert batch.labels.tolist() == [5, 6, 7, 8]
    assert batch.digests[0] == image_digest(transform(IMAGES[0]))
    with pytest.raises(DataError, match="labels are needed, but this data set gives None"):
        list(GivenImages(IMAGES).open(transform, labels=True).batches(9, 0))


def test_a_pil_image_is_read_as_its_file_is(tmp_path):
    grey = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "x.png")
    for image in (Image.open(tmp_path / "x.png"), Image.fromarray(grey.astype(np.int32))):
        assert greys(GivenImages([image])) == greys(GivenImages([tmp_path / "x.png"])) == [128]


def test_tensors_of_images_may_be_views_with_gradients(ways):
    images = ways["tensor"]
    items = [images[0].requires_grad_(), torch._neg_view(-images[1]), images[2].to(torch.float8_e4m3fn)]
    assert greys(GivenImages(items)) == pytest.approx(GREYS[:3], abs=6)
    flipped = images[1].numpy()[:, ::-1]
    assert greys(GivenImages([flipped, flipped.astype(">f4")])) == [51, 51]


@pytest.mark.parametrize("label", [float("nan"), 1.5, 1j])
def test_tensors_that_are_no_class_number_are_refused(label):
    items = [(IMAGES[0], 2), (IMAGES[1], torch.tensor(label))]
    with pytest.raises(DataError, match="labels are needed, but this data set gives tensor"):
        list(GivenImages(items).open(transform, labels=True).batches(9, 0))


def test_a_fingerprint_is_of_the_content(ways, tmp_path):
    def told(items):
        return json.dumps(GivenImages(items).open(transform).fingerprint)

    assert told(IMAGES) == told([image.copy() for image in IMAGES]) != told(IMAGES[::-1])
    assert told(ways["array"]) != told(ways["array"][:3])
    changed = [image.copy() for image in IMAGES]
    changed[2].putpixel((7, 7), (1, 2, 3))
    assert told(changed) != told(IMAGES)
    before = told(ways["files"])
    assert before == told(ways["files"])
    IMAGES[0].resize((99, 99)).save(ways["files"][3])
    assert told(ways["files"]) != before
    assert told(ways["dataset"]) == told(ways["generator"]) == "null"


def test_some_of_them_are_chosen_the_same_each_time():
    chosen = greys(GivenImages(IMAGES), max_images=2)
    assert len(chosen) == 2 and chosen == greys(GivenImages(IMAGES), max_images=2)
    assert greys(GivenImages(iter(IMAGES)), max_images=2) == [0, 51]
    assert GivenImages(IMAGES).open(transform, max_images=2).fingerprint != GivenImages(IMAGES).open(
        transform, max_images=3
    ).fingerprint


@pytest.mark.parametrize("items, problem", [
    ([], "there are no images; expected PIL images"),
    (np.zeros((0, 4, 4, 3), np.uint8), "there are no images"),
    ([IMAGES[0], 3], "image number 1 is of type int; expected PIL images, paths of image files, uint8 arrays"),
    ([{"image": IMAGES[0]}], "image number 0 is of type dict"),
    (["nowhere.png"], "there is no file 'nowhere.png'"),
    ([torch.zeros(3, 5, 4)], r"image number 0 is of shape \[3, 5, 4\] and type float32; .* makes them, \[3, 4"),
    ([torch.zeros(3, 4, 4).long()], "type int64"),
    ([np.zeros((4, 4, 3))], "type float64"),
    ([torch.zeros(2, 3, 4, 4)], "shape .2, 3, 4, 4."),
    ([IMAGES[0], Image.new("F", (8, 8))], "image number 1 is not a readable image: it holds floating-point numbers"),
    ([IMAGES[0], Image.new("RGB", (0, 0))], "image number 1 has no pixels"),
    (np.zeros((2, 0, 4, 3), np.uint8), "image number 0 has no pixels, as it is 4 x 0"),
    ([IMAGES[0], torch.zeros(3, 4, 4, device="meta")], "image number 1 cannot be read as an array; expected a dense"),
    ([torch.zeros(3, 4, 4).to_sparse()], "image number 0 cannot be read as an array"),
])  # fmt: skip
def test_what_is_no_image_is_told_with_its_number(items, problem):
    with pytest.raises(DataError, match=problem):
        greys(GivenImages(items))


# ---- activations


ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.mark.parametrize("values", [
    ROWS, torch.from_numpy(ROWS), torch.from_numpy(ROWS).bfloat16(), torch.from_numpy(ROWS).requires_grad_(),
    ROWS.astype(np.float64)[:, ::-1][:, ::-1], ROWS.astype(np.float16), torch._neg_view(torch.from_numpy(-ROWS)),
    torch.complex(torch.from_numpy(ROWS), torch.from_numpy(-ROWS)).conj().imag,
])  # fmt: skip
def test_activations_are_arrays_or_tensors(values):
    found = GivenActivations.of(values)
    assert np.array_equal(found.rows, ROWS) and len(found.digest) == 64


def test_the_digest_of_activations_is_of_their_content():
    other = ROWS.copy()
    other[3, 2] += 1
    digests = [GivenActivations.of(rows).digest for rows in (ROWS, ROWS.copy(), other, ROWS.reshape(3, 4))]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize("values, problem", [
    (ROWS[0], r"of shape \[3\] and type float32; expected floating-point numbers \[count, width\], one row per image"),
    (ROWS[None], r"of \[count, tokens, width\] the CLS token is x\[:, 0\]"),
    (ROWS.astype(int), "type int64"),
    (ROWS[:0], r"shape \[0, 3\], so there are none"),
    (np.where(ROWS == 7, np.nan, ROWS), "row 2 of the activations holds NaN or infinity"),
    (torch.tensor([[1.0], [float("inf")]]), "row 1 of"),
    (torch.eye(2).to_sparse(), "cannot be read as an array"),
    (ROWS.astype(np.float64) * 1e38, "row 1 of the activations holds NaN or infinity, as float32"),
    (torch.zeros(2, 2, device="meta"), "tensor of activations cannot be read as an array; expected a dense tensor"),
])  # fmt: skip
def test_activations_that_are_none_are_refused(values, problem):
    with pytest.raises(DataError, match=problem):
        GivenActivations.of(values)


def test_files_of_activations_are_mapped(tmp_path):
    np.save(tmp_path / "x.npy", ROWS)
    save_file({"x": torch.from_numpy(ROWS), "labels": torch.arange(4)}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.safetensors"):
        found = read_activations(tmp_path / name)
        assert isinstance(found.rows, np.memmap) and np.array_equal(found.rows, ROWS)
        assert found.digest == GivenActivations.of(ROWS).digest


def npy(rows):
    """The bytes of a .npy file."""
    file = BytesIO()
    np.save(file, rows)
    return file.getvalue()


def safetensors(header):
    """The bytes of a .safetensors file with that header, and the 48 bytes of ROWS."""
    return len(header).to_bytes(8, "little") + header + ROWS.tobytes()


def facts(shape, start=0):
    """A header in which the matrix x of float32 takes the bytes from ``start`` on."""
    return json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [start, 48]}}).encode()


@pytest.mark.parametrize("name, write, problem", [
    ("x.npy", None, "x.npy' cannot be read: No such file or directory"),
    ("x.csv", b"1,2", "expected a file NAME.npy or NAME.safetensors"),
    ("x.npy", b"\x93NUMPY\x01\x00v", "cannot be read: "),
    ("x.npy", b"", "cannot be read: "),
    ("x.npy", npy(ROWS)[:10] + b"{'descr': (" + npy(ROWS)[21:], "it is not a npy file, or damaged; expected floating-"),
    ("x.npy", b"PK\x03\x04", "it is not a npy file, or damaged"),
    ("x.safetensors", b"", "cannot be read: "),
    ("x.safetensors", safetensors(b"[" * 100_000), "it is not a safetensors file, or damaged"),
    ("x.safetensors", safetensors(b"[]"), "it is not a safetensors file, or damaged"),
    ("x.safetensors", safetensors(facts([10**30, 3])), "it is not a safetensors file, or damaged"),
    ("x.safetensors", safetensors(facts([2, 3])), "it is not a safetensors file, or damaged"),
    ("x.safetensors", safetensors(facts([3, 3], 12)), "it is not a safetensors file, or damaged"),
    ("x.safetensors", b"\xff" * 20, "it is not a safetensors file"),
    ("x.safetensors", b"\x02" + b"\0" * 7 + b"{}", r"it holds nothing; expected one matrix"),
    ("x.safetensors", {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, r"it holds a, b; expected one matrix \[count"),
    ("x.safetensors", {"a": torch.zeros(2, 2).bfloat16()}, "a holds BF16; expected F16, F32, F64"),
])  # fmt: skip
def test_files_that_hold_no_activations_are_refused(tmp_path, name, write, problem):
    if isinstance(write, bytes):
        (tmp_path / name).write_bytes(write)
    elif write is not None:
        save_file(write, tmp_path / name)
    with pytest.raises(DataError, match=f"--activations .*{problem}"):
        read_activations(tmp_path / name)
