"""``vs2 store``."""

import pytest

from vs2_plugin.checkpoint.store import Store
from vs2_plugin.cli.main import main

from .test_train_sae import folder, train  # noqa: F401

NAME = "local-dir-tiny-clip_wds-digits"


def test_store_list_and_remove(folder, capsys):  # noqa: F811
    assert main(["store", "list"]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    assert train() == 0
    assert main(["store", "list"]) == 0
    text = capsys.readouterr().out
    assert NAME in text and "900 images" in text and "1 set(s)" in text
    assert main(["store", "remove", "nope"]) == 2
    assert "no SAE checkpoint 'nope'" in capsys.readouterr().err
    assert main(["store", "remove"]) == 2
    assert main(["store", "remove", NAME, "--cache"]) == 0
    assert Store.default().names() == [] and list(Store.default().cached()) == []
    assert main(["store", "remove", "../store"]) == 2


@pytest.mark.parametrize("command", [["store", "list"], ["doctor"]])
def test_the_name_of_a_folder_cannot_tell_the_terminal_anything(command, capsys):
    path = Store.default().checkpoints / "a\x1b[2J\u202eb\n  ok  c"
    path.mkdir(parents=True)
    (path / "vs2.json").write_text("{}")
    main(command)
    [line, *_] = [line for line in capsys.readouterr().out.splitlines() if "x1b" in line]
    assert line.isprintable() and r"a\x1b[2J\u202eb\n  ok  c" in line
