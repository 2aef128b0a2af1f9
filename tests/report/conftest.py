"""The result files of tests/results."""

from ..results.conftest import *  # noqa: F403
