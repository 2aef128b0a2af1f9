"""The demo, as a command of its own."""

import pytest

from vs2_plugin.demo.run import SYSTEMS

from ..harness.conftest import demo  # noqa: F401
from .conftest import needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]


def test_the_demo_runs(demo):  # noqa: F811
    rows = [line for line in demo.output.splitlines() if line.startswith("| ")]
    assert len(rows) >= 1 + len(SYSTEMS) and (demo.folder / "report/index.html").is_file(), demo.output
