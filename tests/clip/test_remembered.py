"""What is known of a backbone without loading it, and when that is not relied on."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch

import vs2_plugin
from vs2_plugin.clip import remembered
from vs2_plugin.clip.backbone import load_backbone
from vs2_plugin.clip.remembered import Backbone
from vs2_plugin.clip.sites import Sites
from vs2_plugin.clip.tower import Tower
from vs2_plugin.errors import TowerError

TINY = Path(vs2_plugin.__file__).parent / "demo" / "tiny_clip"
SMALL = "ViT-S-32-alt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(TINY, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    wait()
    return tmp_path


def wait():
    """Until files are old enough for it to be sure that they were not changed while they were read."""
    time.sleep(0.05)


def tiny(folder, name="local-dir:tiny", pretrained="", **options):
    return Backbone(name, pretrained, folder=folder / "towers", **options)


def is_remembered(backbone):
    """Whether its tower is known without loading anything."""
    known = backbone._remembered is not None
    assert not known or "loaded" not in vars(backbone)
    return known


def test_the_second_time_nothing_is_loaded(folder):
    first = tiny(folder)
    assert not is_remembered(first)
    assert first.tower == Tower.of(first.loaded.model, first.loaded.transform)
    second = tiny(folder)
    assert (second.tower, second.sites) == (first.tower, Sites.of(first.loaded.model))
    assert "loaded" not in vars(second)
    assert is_remembered(second)
    assert Tower.of(second.loaded.model, second.loaded.transform) == second.tower  # it can be


def test_the_second_time_open_clip_is_not_imported(folder):
    tiny(folder).tower  # noqa: B018
    code = f"""
import sys
from pathlib import Path
from vs2_plugin.clip.remembered import Backbone
backbone = Backbone("local-dir:tiny", "", folder=Path({str(folder / "towers")!r}))
print(backbone.tower.parameters, len(backbone.sites.blocks), backbone.sites.output.width)
assert not {{"open_clip", "torchvision", "clip_benchmark", "timm"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    loaded = load_backbone("local-dir:tiny", "")
    assert done.stdout.split() == [Tower.of(loaded.model, loaded.transform).parameters, "4", "64"]


def edit_weights(folder):
    """Another number in them; the size of the file stays."""
    from safetensors.torch import load_file, save_file

    (file,) = (folder / "tiny").glob("*.safetensors")
    weights = load_file(file)
    weights["visual.proj"][0, 0] += 1
    save_file(weights, file)


def edit_configuration(folder):
    file = folder / "tiny" / "open_clip_config.json"
    file.write_text(file.read_text().replace('"bicubic"', '"bilinear"').replace('"mean"', '"mean" '))


def damage(folder):
    (file,) = (folder / "towers").iterdir()
    file.write_text(file.read_text()[:-40])


def take_something_else(folder):
    (file,) = (folder / "towers").iterdir()
    file.write_text("[]")


@pytest.mark.parametrize("change", [edit_weights, edit_configuration, damage, take_something_else])
def test_what_changed_is_loaded_again(change, folder):
    tiny(folder).tower  # noqa: B018
    assert is_remembered(tiny(folder))
    change(folder)
    wait()
    again = tiny(folder)
    assert not is_remembered(again)
    assert again.tower == Tower.of(again.loaded.model, again.loaded.transform)
    assert is_remembered(tiny(folder))


def test_edited_weights_give_another_tower(folder):
    before = tiny(folder).tower
    edit_weights(folder)
    assert "other parameters" in before.difference(tiny(folder).tower)


def test_other_code_of_open_clip_is_not_what_was_remembered(folder, monkeypatch):
    tiny(folder).tower  # noqa: B018
    (folder / "model.json").write_text("{}")
    files = [*remembered._package_files("open_clip"), folder / "model.json"]
    assert len(files) > 100 and {file.suffix for file in files} == {".py", ".json"}
    monkeypatch.setattr(remembered, "_package_files", lambda name: files)
    assert not is_remembered(tiny(folder))


def test_a_folder_of_the_same_name_elsewhere_is_another(folder, monkeypatch):
    tiny(folder).tower  # noqa: B018
    shutil.copytree(folder / "tiny", folder / "elsewhere" / "tiny")
    monkeypatch.chdir(folder / "elsewhere")
    assert not is_remembered(tiny(folder))


def test_it_can_be_told_to_forget(folder):
    tiny(folder).tower  # noqa: B018
    assert not is_remembered(tiny(folder, forget=True))


def test_weights_that_changed_while_they_were_read_are_not_remembered(folder, monkeypatch):
    def load(*args, **options):
        loaded = load_backbone(*args, **options)
        (file,) = (folder / "tiny").glob("*.safetensors")
        file.write_bytes(file.read_bytes())
        return loaded

    monkeypatch.setattr(remembered, "load_backbone", load)
    tiny(folder).tower  # noqa: B018
    assert not (folder / "towers").exists()


def test_other_weights_behind_the_same_file_are_found_out(folder):
    """That takes a clock set back; nothing is computed with the wrong ones."""
    tiny(folder).tower  # noqa: B018
    (file,) = (folder / "towers").iterdir()
    kept = json.loads(file.read_text())
    kept["tower"]["parameters"] = "0" * 64
    file.write_text(json.dumps(kept))
    with pytest.raises(TowerError, match="have changed since they were last read.*run the same command again"):
        tiny(folder).loaded  # noqa: B018
    assert tiny(folder).tower.parameters != "0" * 64


def test_where_nothing_can_be_written_nothing_is_lost(folder):
    (folder / "towers").write_text("a file")
    assert tiny(folder).tower == tiny(folder).tower


def test_random_weights_are_known_by_their_seed(folder):
    first = tiny(folder, SMALL, seed=1)
    torch.rand(3)  # they depend on nothing else
    assert first.tower.parameters
    again, other = tiny(folder, SMALL, seed=1), tiny(folder, SMALL, seed=2)
    assert is_remembered(again) and not is_remembered(other)
    assert Tower.of(again.loaded.model, again.loaded.transform) == first.tower != other.tower


@pytest.fixture
def weights(folder):
    torch.manual_seed(0)
    torch.save(open_clip.create_model(SMALL).state_dict(), folder / "weights.pt")
    wait()
    return folder / "weights.pt"


def test_a_file_of_weights_is_one_by_whatever_path(folder, weights):
    relative = tiny(folder, SMALL, "weights.pt")
    assert relative.tower == tiny(folder, SMALL, str(weights)).tower
    assert is_remembered(tiny(folder, SMALL, "./weights.pt"))
    assert is_remembered(tiny(folder, SMALL, "weights.pt", seed=7))  # which matters to random ones


@pytest.mark.parametrize(("facts", "expected"), [({}, True), ({"quick_gelu": True}, False)])
def test_weights_of_a_tag_are_known_by_the_file_they_were_fetched_to(facts, expected, folder, weights, monkeypatch):
    """Unless a warning goes with them, which every run has to give."""
    known = {**open_clip.pretrained._pcfg(), "file": str(weights), **facts}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, SMALL, {"mine": known})
    assert tiny(folder, SMALL, "mine").tower.parameters
    assert is_remembered(tiny(folder, SMALL, "mine")) == expected
    weights.write_bytes(weights.read_bytes())
    assert not is_remembered(tiny(folder, SMALL, "mine"))


@pytest.mark.parametrize(("name", "pretrained"), [("ViT-B-23", ""), ("ViT-B-32", "openia"), ("local-dir:none", "")])
def test_what_open_clip_does_not_know_is_refused_before_anything_is_loaded(name, pretrained, folder):
    with pytest.raises(TowerError):
        tiny(folder, name, pretrained)
