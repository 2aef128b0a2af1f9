"""``vs2 data``."""

import pytest

from vs2_plugin.cli.main import main

from ..data.test_archives import cub, packed, tiny


def test_archives_become_what_the_tables_look_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    packed(cub(), tmp_path / "CUB_200_2011.tgz")
    assert main(["data", "cub", "CUB_200_2011.tgz", "root/cub200"]) == 0
    assert capsys.readouterr().out == (
        "wrote root/cub200: 6 images to train on and 3 to evaluate, of 3 classes\n"
        "use it with --dataset wds/cub200 --dataset_root root/cub200\n"
        "the paper's tables: vs2 reproduce paper --dataset_root 'root/{dataset}'\n"
    )
    assert main(["data", "tiny-imagenet", str(packed(tiny(), tmp_path / "t.zip")), "mine"]) == 0
    output = capsys.readouterr().out
    assert "use it with --dataset wds/tiny_imagenet --dataset_root mine\n" in output and "tables" not in output
    assert main(["data", "tiny-imagenet", "CUB_200_2011.tgz", "root/tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vs2: error: CUB_200_2011.tgz holds no Tiny-ImageNet") and error.count("\n") == 1


def test_a_data_set_has_to_be_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data"])
    assert stop.value.code == 2 and "DATASET" in capsys.readouterr().err
