"""``vs2 sae`` on a GPU: its figures are those of the CPU."""

import gc
import json

import pytest
import torch

from vs2_plugin.cli import main

from .conftest import GPU, NAME

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("which", [[], ["--variant", "pass"], ["--block", "2"]], ids=" ".join)
def test_figures_are_those_of_the_cpu(here, capsys, without_gpu, which):
    words = ["sae", NAME, *which, "--elsewhere", NAME, "--dataset", "wds/few", "--dataset_root", "few", "--json"]
    gc.collect()  # else garbage of earlier tests might be freed below, and hide what is needed
    if GPU != "cpu":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert main.main(words) == 0
    [found] = json.loads(capsys.readouterr().out)["saes"]
    assert GPU == "cpu" or torch.cuda.max_memory_allocated() > before
    without_gpu()
    assert main.main(words) == 0
    [expected] = json.loads(capsys.readouterr().out)["saes"]
    figures, others = found.pop("figures"), expected.pop("figures")
    assert found == expected
    for key, other in others.items():
        for part, value in other.items():  # rounding may choose another latent, or another class, for an image or two
            close = value if isinstance(value, str | None) else pytest.approx(value, rel=0.01, abs=0.03)
            assert figures[key][part] == close, (key, part)
