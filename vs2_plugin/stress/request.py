"""The request of a stress test: its settings, declared. No heavy imports."""

from __future__ import annotations

from dataclasses import dataclass

from vs2_plugin.settings import setting
from vs2_plugin.sweep.request import PassRequest

__all__ = ["StressRequest"]


@dataclass(frozen=True, kw_only=True)
class StressRequest(PassRequest):
    """The settings of a stress test.

    Raises:
        SettingError: a value is outside its range.
    """

    present: tuple[float, ...] = setting(
        (0.5, 0.25, 0.1), minimum=0.001, maximum=1, help="shares of the classes that occur in the images"
    )
    tail: tuple[float, ...] = setting(
        (10.0, 100.0), minimum=1, maximum=10_000,
        help="long tails: how many times as many images the most frequent class has as the rarest",
    )  # fmt: skip
    images: tuple[int, ...] = setting((200, 50), minimum=2, help="numbers of images")
    batches: tuple[int, ...] = setting(
        (), minimum=1, help="numbers of classes in random batches of 64 images, such as 2 10; use more draws with these"
    )
    draws: int = setting(3, minimum=1, maximum=100, help="random draws of each, or orders of a stream")
    output: str = setting("stress", help="folder for the table and the figure")
