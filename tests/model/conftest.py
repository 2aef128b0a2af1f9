"""The demo and the stock command, as the tests of the harness have them."""

from ..harness.conftest import DIGITS, TINY, captions, clip_benchmark, demo, few_digits, in_demo, metrics  # noqa: F401
