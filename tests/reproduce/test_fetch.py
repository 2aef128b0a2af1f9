"""What cannot be fetched is told in a line."""

import pytest

from vs2_plugin.clip import backbone
from vs2_plugin.errors import TowerError
from vs2_plugin.reproduce.fetch import missing_data, missing_weights


def test_what_cannot_be_fetched_is_told_in_a_line(tmp_path, monkeypatch):
    from clip_benchmark.datasets import builder

    def build_dataset(*args, **kwargs):
        print("GDown is needed")
        raise SystemExit(1)

    monkeypatch.setattr(builder, "build_dataset", build_dataset)
    line = str(missing_data("caltech101", str(tmp_path), "test"))
    assert "could not fetch caltech101 into " in line and "GDown is needed" in line and "\n" not in line
    assert missing_data("wds/x", "https://example.org/{dataset}", "test") is None


def test_a_data_set_that_does_not_exist_is_no_matter_of_the_network():
    line = str(missing_data("cifar1000", "root", "test"))
    assert "knows no data set 'cifar1000'; did you mean 'cifar10" in line and "where there is a network" not in line


@pytest.mark.parametrize("known", [True, False])
def test_reasons_are_cut_between_words(monkeypatch, known):
    words = " ".join(["connection"] * 100)

    def load_backbone(*given):
        raise TowerError(words[:305]) from (OSError(words) if known else None)

    monkeypatch.setattr(backbone, "load_backbone", load_backbone)
    missing = missing_weights("B", "w")
    if known:
        assert set(missing.why.partition("OSError: ")[2].split()) == {"connection", "...)"}
        assert "'MODEL,PATH' for the backbone" in missing.remedy
        assert missing.what == "the weights of B,w cannot be obtained"
    else:  # open_clip does not know the name: it was not tried
        assert missing.what == missing.why == words[:305] and missing.remedy == ""


def test_the_papers_shards_are_made_by_a_command(tmp_path):
    root = str(tmp_path / "{dataset}")
    found = missing_data("wds/cub200", root, "test")
    assert found.remedy.endswith(f": vs2 data cub CUB_200_2011.tgz {tmp_path}/cub200") and "https://" in found.remedy
    found = missing_data("wds/tiny_imagenet", root, "test")
    assert found.remedy.endswith(f": vs2 data tiny-imagenet tiny-imagenet-200.zip {tmp_path}/tiny_imagenet")
    assert "make webdataset shards in" in missing_data("wds/mine", root, "test").remedy
