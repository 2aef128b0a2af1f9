"""Views of an image: random crops, for methods that see each image several times."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vs2_plugin.data.images import image_digest

__all__ = ["views_of"]

#: Ranges of a crop's share of the area and of its ratio of width to height, as usual in training on random crops.
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
#: Crops drawn for each view, the first of which that fits into the image is taken.
_TRIES = 10


def views_of(images: Tensor, count: int, seed: int) -> Iterator[Tensor]:
    """Yield ``count - 1`` random crops of preprocessed images ``[batch, 3, height, width]``, each of the images' shape.

    Each crop covers 8 to 100 % of the area at a ratio of sides from 3/4 to 4/3, is scaled to the whole by bilinear
    interpolation, and half of the crops are mirrored. The crops of an image depend on the image and the seed alone, not
    on its batch. They are cut from the preprocessed image, and so no sharper than its resolution allows.

    Args:
        images: preprocessed images, on any device, in any floating dtype.
        count: number of views of each image, the image itself included.
        seed: seed of the crops.
    """
    drawn = torch.stack([_crops(image_digest(image), count - 1, seed, images.shape[-2:]) for image in images])
    for theta in drawn.unbind(1):
        with torch.autocast(images.device.type, enabled=False):
            grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
            crop = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        yield crop.to(images.dtype)


def _crops(digest: int, count: int, seed: int, size: tuple[int, ...]) -> Tensor:
    """Return affine maps ``[count, 2, 3]`` from the crop's coordinates to the image's, both from -1 to 1."""
    generator = torch.Generator().manual_seed((digest ^ seed * 0x9E3779B97F4A7C15) % 2**63)
    height, width = size
    chance = torch.rand(count, _TRIES, 2, generator=generator, dtype=torch.float64)
    places = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * chance[..., 0])
    ratio = (math.log(_RATIO[0]) + math.log(_RATIO[1] / _RATIO[0]) * chance[..., 1]).exp()
    wide, high = (area * ratio).sqrt() / width, (area / ratio).sqrt() / height
    fits = (wide <= 1) & (high <= 1)
    first = fits.int().argmax(1)  # the first try that fits into the image; the whole image where none does
    any_fits = fits.any(1)
    rows = torch.arange(count)
    wide = wide[rows, first].where(any_fits, wide.new_ones(()))
    high = high[rows, first].where(any_fits, high.new_ones(()))
    mirror = torch.where(places[:, 2] < 0.5, -1.0, 1.0).double()
    theta = torch.zeros(count, 2, 3, dtype=torch.float64)
    theta[:, 0, 0], theta[:, 1, 1] = wide * mirror, high
    theta[:, 0, 2], theta[:, 1, 2] = (1 - wide) * (2 * places[:, 0] - 1), (1 - high) * (2 * places[:, 1] - 1)
    return theta.float()
