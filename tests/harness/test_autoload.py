"""Installing, uninstalling and extending, with pip in temporary environments. Needs no network."""

import importlib
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from .conftest import DIGITS, TINY, metrics

REPOSITORY = Path(__file__).parents[2]
PLUGIN = {
    "pyproject.toml": """
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"
        [project]
        name = "vs2-away"
        version = "0.3"
        [project.entry-points.vs2_plugin]
        away = "vs2_away"
        [tool.hatch.build.targets.wheel]
        include = ["vs2_away.py"]
    """,
    "vs2_away.py": None,  # the example in the plugins' chapter, as it stands there
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment that sees torch and the rest of this one's packages, but not this one's vs2-plugin."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    # A plain path line: packages are found, but no .pth of theirs (our own hook) is run from there. Without
    # transformers, which open_clip imports where it is there, each process starts in two thirds of the time.
    others = folder / "others"
    others.mkdir()
    for name in ("purelib", "platlib"):
        for path in Path(sysconfig.get_path(name)).iterdir():
            strange = "vs2_plugin" in path.name or path.name == "transformers"
            if not strange and not (others / path.name).exists():
                (others / path.name).symlink_to(path)
    (site / "zz_others.pth").write_text(f"{others}\n")
    return python, site


def pip(python: Path, *words: str) -> None:
    done = subprocess.run([python, "-m", "pip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def install(python: Path, *what: str) -> None:
    pip(python, "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", *what)


def ask(python: Path, code: str, **env: str) -> str:
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, env={**here, **env}, cwd=python.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


#: What is in place once clip_benchmark is asked for. Loading all of it takes ten seconds.
HOOKS = """
import clip_benchmark, sys
print([name for name in (type(finder).__module__ for finder in sys.meta_path) if name.startswith("vs2_plugin")])
"""


@pytest.mark.parametrize("how", ["plain", "editable"])
def test_install_and_uninstall(environment, how):
    python, site = environment
    before = {path.name for path in site.iterdir()}
    install(python, *(["--editable"] if how == "editable" else []), str(REPOSITORY))
    try:
        assert {"vs2_plugin_hook.pth", "vs2_plugin_hook.start"} <= {path.name for path in site.iterdir()}
        weights = "import vs2_plugin.demo.digits as d; print((d.TINY_CLIP / 'open_clip_model.safetensors').is_file())"
        hooks, found = ask(python, f"{HOOKS}{weights}").splitlines()
        assert hooks == "['vs2_plugin.harness.autoload']" and found == "True"
        assert ask(python, HOOKS, VS2_PLUGIN_DISABLE="1") == "[]"
        assert (python.parent / "vs2").exists() and (python.parent / "vs2-train-sae").exists()
    finally:
        pip(python, "uninstall", "--quiet", "--yes", "vs2-plugin")
    assert {path.name for path in site.iterdir()} == before  # a hook that stays is harmless, too, as the next test says


def test_a_leftover_or_broken_hook_harms_nobody(environment):
    """The .pth without its package, and a package that cannot be loaded: Python and the harness go on."""
    python, site = environment
    hook = site / "vs2_plugin_hook.pth"
    hook.write_text((REPOSITORY / "vs2_plugin/harness/vs2_plugin_hook.pth").read_text())
    try:
        assert ask(python, "print(1)") == "1"
        assert ask(python, HOOKS) == "[]"
        broken = site / "vs2_plugin"
        (broken / "harness").mkdir(parents=True)
        (broken / "__init__.py").write_text("")
        (broken / "harness" / "__init__.py").write_text("raise RuntimeError('broken')")
        assert ask(python, HOOKS) == "[]"
    finally:
        hook.unlink()
        import shutil

        shutil.rmtree(site / "vs2_plugin", ignore_errors=True)


def test_a_failing_patch_is_said_once_and_stock_models_work(monkeypatch, capsys):
    import clip_benchmark.datasets.builder
    import clip_benchmark.models

    from vs2_plugin.harness import autoload, patches

    def fail(module):
        raise ValueError("no")

    monkeypatch.setattr(patches, "patch", fail)
    monkeypatch.setattr(autoload, "_warned", set())
    assert "vs2" in clip_benchmark.models.MODEL_TYPES
    for name in ("models", "datasets.builder"):
        package, _, own = f"clip_benchmark.{name}".rpartition(".")
        monkeypatch.delitem(sys.modules, f"{package}.{own}")
        monkeypatch.setattr(sys.modules[package], own, None)
        anew = importlib.import_module(f"{package}.{own}")
        assert name != "models" or anew.MODEL_TYPES == ["open_clip", "ja_clip"]
    assert capsys.readouterr().err == "vs2_plugin: steered models are not available: ValueError: no\n"


def test_the_plugin_of_the_docs_works_as_a_package(environment, tmp_path, in_demo):
    """A third party's package, built and installed by pip, offers a method that the harness and the command know.
    ``python -m clip_benchmark.cli`` is the same program as the script."""
    python, _ = environment
    chapter = (REPOSITORY / "vs2_plugin/docs/plugins.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(# vs2_away\.py\n.*?)```", chapter, re.S).group(1)
    assert len(source.splitlines()) <= 30
    from textwrap import dedent

    for name, text in PLUGIN.items():
        (tmp_path / name).write_text(dedent(text) if text else source)
    install(python, str(REPOSITORY), str(tmp_path))
    try:
        listing = subprocess.run([python.parent / "vs2", "methods"], capture_output=True, text=True)
        assert listing.returncode == 0 and "vs2-away 0.3 (entry point 'away')" in listing.stdout
        model = ["--model", f"away:{TINY}@strength=0.5", "--pretrained", ""]
        script = [python, "-m", "clip_benchmark.cli", "eval", *model, *DIGITS, "--output", "away.json"]
        done = subprocess.run(script, capture_output=True, text=True)  # in the demo's folder, with its store
        assert done.returncode == 0, done.stderr
        found = metrics(in_demo / "away.json")
        assert found["vs2_method"] == "away" and found["vs2_strength"] == 0.5
        assert 0.1 < found["acc1"] <= 1
    finally:
        pip(python, "uninstall", "--quiet", "--yes", "vs2-plugin", "vs2-away")


def test_the_start_file_names_the_hook():
    """Python 3.15 and newer resolves each line of it (PEP 829) as this does."""
    import pkgutil

    from vs2_plugin.harness import autoload

    (line,) = (REPOSITORY / "vs2_plugin/harness/vs2_plugin_hook.start").read_text().splitlines()
    assert pkgutil.resolve_name(line) is autoload.install
