"""What tables hold, in words."""

import re
from pathlib import Path

from vs2_plugin.cli.main import main

FOLDER = Path(__file__).parents[2] / "benchmark_configs" / "paper"


def test_the_list_tells_cells_apart(capsys):
    assert main(["reproduce", str(FOLDER), "--list"]) == 0
    text = capsys.readouterr().out
    assert "of not run" not in text and "TPT / CIFAR-100: not run; published 64.09" in text
    for line in (
        "VS2 / CIFAR-100: accuracy of vs2:",
        "CLIP zero-shot, prompt ensemble / CIFAR-100: accuracy of ViT-B-32",
    ):
        assert f"  {line}" in text
    # Within a table, no two cells that are run read the same, but for their titles.
    for part in re.split(r"^(?=\w+: .*, \d+ cells$)", text, flags=re.MULTILINE)[1:]:
        said = [line.partition(": ")[2].partition("; published")[0] for line in part.splitlines()[1:]]
        said = [line for line in said if line != "not run"]
        assert len(set(said)) == len(said), part
