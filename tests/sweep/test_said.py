"""What vs2 sweep says when it is interrupted, and of what it leaves out."""

import warnings

import pytest
import torch

from vs2_plugin.sweep import evaluate

from ..harness.conftest import few_digits, rewrite
from .conftest import DATA, TINY, interrupt_write, sweep


@pytest.mark.parametrize(
    ("before", "words", "said"),
    [
        ((), (), "interrupted; nothing was written: all points are evaluated together"),
        ((f"vs2:{TINY}@lam=1",), ("--skip_existing",), "interrupted; nothing was added to 2 results in"),
    ],
)
def test_an_interruption_of_the_first_pass_does_not_speak_of_results(
    here, monkeypatch, capsys, tmp_path, before, words, said
):
    output = f"{tmp_path}/{{model}}.json"
    assert not before or sweep(*before, output=output) == 0

    def interrupted(*args):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(evaluate._Showing, "__iter__", interrupted)
    assert sweep(f"vs2:{TINY}@lam=1:4:1", output=output, words=words) == 130
    error = capsys.readouterr().err
    assert said in error and "run the same command again" in error
    assert len(list(tmp_path.glob("*.json"))) == 2 * len(before)


def test_older_results_that_skipping_would_keep_are_named(here, monkeypatch, capsys):
    assert sweep(f"vs2:{TINY}@lam=1:3:1", output="older/{model}.json") == 0
    interrupt_write(monkeypatch, 4)
    assert sweep(f"vs2:{TINY}@lam=1:3:1", output="older/{model}.json") == 130
    assert "3 of 4 results are in older" in (error := capsys.readouterr().err)
    assert "it keeps 1 older result there, too" in error


def test_a_folder_that_has_nothing_to_do_with_a_sweep_is_in_no_ones_way(here, monkeypatch, tmp_path):
    for name in ("few", "store", "tiny-clip"):
        (tmp_path / name).symlink_to(here / name)
    (tmp_path / "unused").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sweep(f"vs2:{TINY}@alpha=0,1", output="out/{model}.json") == 0


@pytest.mark.parametrize(("value", "words", "told"), [("1", (), 1), ("1", ("--quiet",), 0), ("0", (), 0)])
def test_that_no_per_image_results_are_kept_is_said(here, monkeypatch, capsys, tmp_path, value, words, told):
    monkeypatch.setenv("VS2_PER_IMAGE", value)
    assert sweep(f"vs2:{TINY}", output=f"{tmp_path}/{{model}}.json", words=words) == 0
    assert capsys.readouterr().err.count("VS2_PER_IMAGE=1 clip_benchmark eval does") == told


def _complain(self):
    warnings.warn("This DataLoader will create too many worker processes in total", stacklevel=1)


def test_quiet_hides_what_torch_thinks_of_the_workers(here, monkeypatch, tmp_path, recwarn):
    monkeypatch.setattr(torch.utils.data.DataLoader, "check_worker_number_rationality", _complain)
    words = ("--quiet",)
    assert sweep(f"vs2:{TINY}", output=f"{tmp_path}/{{model}}.json", words=words) == 0
    assert not [one for one in recwarn if "This DataLoader will create" in str(one.message)]


# ---- the data under evaluation


def test_shards_that_serve_fewer_workers_are_read_by_fewer(here, capsys, tmp_path):
    words = ("--num_workers", "4")
    assert sweep(f"vs2:{TINY}@lam=1", output=f"{tmp_path}/{{model}}.json", words=words) == 0
    assert capsys.readouterr().err.count("vs2: wds/few is read by 1 loader worker, and not 4") == 1


def no_prompts(folder):
    (folder / "zeroshot_classification_templates.txt").unlink()


def wrong_label(folder):
    rewrite(folder / "test/0.tar", lambda name, data: b"10" if name.endswith("cls") else data)


def cut_image(folder):
    rewrite(folder / "test/0.tar", lambda name, data: data[:60] if name.endswith("png") else data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_prompts, "no readable file bad/zeroshot_classification_templates.txt"),
        (wrong_label, ".cls: the label is 10; expected a class number from 0 to 9"),
        (cut_image, ".png is not a readable image"),
    ],
)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_data_end_a_sweep_in_one_sentence(damage, said, workers, here, capsys, tmp_path):
    few_digits(here, "bad", 0, count=5)
    damage(here / "bad")
    data = (*DATA[:-2], "bad", "--no_amp", "--num_workers", workers)
    assert sweep(f"vs2:{TINY}@lam=1", output=f"{tmp_path}/{{model}}.json", data=data, words=("--quiet",)) == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1] and "Traceback" not in error
    assert error.splitlines()[-1].startswith("vs2: error: ") and not list(tmp_path.glob("*.json"))
