"""The demo's folder, where it is the current one."""

from ..harness.conftest import DIGITS, TINY, demo, in_demo  # noqa: F401
