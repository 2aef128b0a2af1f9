import numpy as np
import pytest
from PIL import Image

from vs2_plugin.data.pictures import as_rgb, open_picture
from vs2_plugin.errors import DataError


def test_of_a_moving_picture_the_first_frame_counts(tmp_path):
    frames = [Image.new("L", (4, 4), grey) for grey in (10, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "x.gif").getpixel((0, 0)) == (10, 10, 10)


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_of_grey_are_scaled(tmp_path, kind, suffix):
    if kind is np.int32 and suffix == "png":
        pytest.skip("no such file")
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=kind)).save(tmp_path / f"x.{suffix}")
    assert np.asarray(open_picture(tmp_path / f"x.{suffix}"))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_16_bits_of_an_image_in_memory_are_scaled(kind):
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=kind))
    assert np.asarray(as_rgb(image, "it"))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_32_bits_that_hold_8_are_as_they_are(tmp_path):
    Image.fromarray(np.array([[0, 128, 255]], dtype=np.int32)).save(tmp_path / "x.tif")
    assert np.asarray(open_picture(tmp_path / "x.tif"))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint16)).save(tmp_path / "x.png")  # all but black
    assert np.asarray(open_picture(tmp_path / "x.png")).max() == 0


def test_of_a_picture_that_is_too_large_the_reason_is_told(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(
        DataError, match=r"x.png' has more than 1,400 pixels, which PIL refuses as a possible attack; scale it"
    ):
        open_picture(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *given: bytearray(1 << 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(DataError, match="x.png' needs more memory than is available; scale it down"):
        open_picture(tmp_path / "x.png")


def test_numbers_of_which_nothing_says_what_is_white_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="x.tif' is not a readable image: it holds floating-point numbers"):
        open_picture(tmp_path / "x.tif")


@pytest.mark.parametrize("held", [b"", b"no picture", "cut"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, held):
    file = tmp_path / "x\ny.jpg"
    Image.new("RGB", (8, 8)).save(file)
    file.write_bytes(file.read_bytes()[:-40] if held == "cut" else held)
    with pytest.raises(DataError, match=r"x\\ny.jpg' is not a readable image .*: it is damaged or in another format"):
        open_picture(file)


def test_what_the_system_refuses_is_told_apart(tmp_path):
    with pytest.raises(DataError, match="there is no file '.*gone.jpg'") as error:
        open_picture(tmp_path / "gone.jpg")
    assert error.value.__cause__.errno is not None
    with pytest.raises(DataError, match="is not a readable image .*: Is a directory") as error:
        open_picture(tmp_path)
    assert error.value.__cause__.errno is not None
