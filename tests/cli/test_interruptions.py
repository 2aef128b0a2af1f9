"""Ctrl-C: one line that says how to go on."""

import os
import signal
import subprocess
import sys

import pytest

from vs2_plugin import cli
from vs2_plugin.cli.common import end_well
from vs2_plugin.cli.main import main


def test_an_interruption_while_torch_is_loaded_ends_well(tmp_path):
    """In a process of its own, where a module in torch's place stands for the interrupted import."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('imported')\n")
    code = "import sys; from vs2_plugin.cli.train_sae import main; sys.exit(main(['--model', 'B', '--dataset', 'd']))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 130 and done.stdout == "imported\n"
    assert done.stderr.strip().startswith("vs2-train-sae: interrupted; ") and "Traceback" not in done.stderr


def test_an_interruption_before_the_command_is_there_ends_well(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert (cli.vs2(), cli.vs2_train_sae()) == (130, 130)
    assert capsys.readouterr().err == "\nvs2: interrupted\n\nvs2-train-sae: interrupted\n"


def test_what_a_loader_says_of_its_interrupted_workers_is_an_interruption(capsys):
    def interrupted():
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")

    def failed():
        raise RuntimeError("DataLoader worker (pid(s) 1) exited unexpectedly")

    assert end_well("vs2", interrupted, lambda: "; go on") == 130
    assert capsys.readouterr().err == "\nvs2: interrupted; go on\n"
    with pytest.raises(RuntimeError):
        end_well("vs2", failed)


def test_an_interrupted_demo_says_how_to_go_on_and_its_command_does_not(tmp_path, monkeypatch, capsys):
    """Typed by hand, the command would say that it goes on."""
    from vs2_plugin.training import run

    monkeypatch.setattr(run, "train", lambda *given: os.kill(os.getpid(), signal.SIGINT))
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 130
    [line] = capsys.readouterr().err.split("\n")[1:-1]
    assert line == "vs2: interrupted; nothing was kept: run the same command again"


def test_a_sweep_of_an_interrupted_demo_does_not_speak_either(tmp_path, monkeypatch, capsys):
    from vs2_plugin.demo import run as demo
    from vs2_plugin.sweep import run

    monkeypatch.setattr(demo, "_steps", lambda seeds: [["vs2", "sweep", "--model", "vs2:B", "--dataset", "cifar10"]])
    monkeypatch.setattr(run, "plan", lambda request: run.Plan(request, [], ["B"], {"B": tmp_path / "B.json"}, ["B"]))
    monkeypatch.setattr(run, "_finish", lambda planned: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(run, "_evaluate", lambda *given: None)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 130
    _, said = capsys.readouterr().err.split("\nvs2: interrupted")
    assert said == "; nothing was kept: run the same command again\n"


def test_interrupted_commands_say_how_to_go_on(monkeypatch, capsys):
    from vs2_plugin.inspection import pictures, survey
    from vs2_plugin.results import runs as results

    def interrupted(*args):
        raise KeyboardInterrupt

    for where, name in ((results, "read"), (pictures, "read_image"), (survey, "require_sae")):
        monkeypatch.setattr(where, name, interrupted)
    model = ["--model", "vs2:ViT-B-32", "--dataset", "cifar100"]
    for words in (["report", "results"], ["inspect", *model, "a.png"], ["latents", *model]):
        assert main(words) == 130
        assert "interrupted; nothing was kept: run the same command again" in capsys.readouterr().err
