"""Views: crops of the image, whatever its batch."""

import torch

from vs2_plugin.model.views import _crops, views_of


def images(count=4, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def test_views_depend_on_the_image_and_the_seed_alone():
    many = torch.stack(list(views_of(images(), 6, 0)), dim=1)
    alone = torch.cat([torch.stack(list(views_of(images()[row : row + 1], 6, 0)), dim=1) for row in range(4)])
    assert many.shape == (4, 5, 3, 32, 32)
    torch.testing.assert_close(many, alone)
    other = torch.stack(list(views_of(images(), 6, 1)), dim=1)
    assert (many - other).abs().amax(dim=(1, 2, 3, 4)).min() > 0.1


def test_a_crop_shows_a_part_of_the_image_scaled_to_the_whole():
    # A picture whose pixels tell where they are: red the column, green the row.
    place = torch.linspace(-1, 1, 65)[:-1] + 1 / 64
    picture = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64), torch.zeros(64, 64)])[None]
    mirrored = 0
    for view in views_of(picture, 60, 0):
        columns, rows = view[0, 0, 32], view[0, 1, :, 32]
        width, height = (columns[-1] - columns[0]) / 2, (rows[-1] - rows[0]) / 2
        mirrored += bool(width < 0)
        step = columns.diff()[8:-8]
        assert (step - step.mean()).abs().max() < 0.02  # straight, so a crop and no other distortion
        assert 0.06 < abs(width) * height < 1.02 and height > 0
    assert 15 < mirrored < 44


def test_crops_lie_within_the_image_and_cover_what_they_are_said_to():
    for size in ((32, 32), (24, 96)):
        theta = _crops(12345, 500, 0, size)
        wide, high = theta[:, 0, 0].abs(), theta[:, 1, 1]
        area, ratio = wide * high, wide * size[1] / (high * size[0])
        whole = (wide == 1) & (high == 1)  # where no try fitted
        assert (theta[:, 0, 2].abs() + wide <= 1 + 1e-6).all() and (theta[:, 1, 2].abs() + high <= 1 + 1e-6).all()
        assert area.min() >= 0.08 - 1e-6 and area.max() <= 1
        assert ((ratio > 0.75 - 1e-4) & (ratio < 4 / 3 + 1e-4) | whole).all()
        assert area.std() > 0.1


def test_autocast_changes_no_crop():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = list(views_of(images, 3, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, views_of(images, 3, 0), plain))
