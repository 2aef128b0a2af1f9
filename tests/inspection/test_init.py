"""The example of the package's docstring runs."""

import inspect

from vs2_plugin import inspection


def test_the_example_runs(folder, digit, tmp_path, capsys):
    code = inspect.getdoc(inspection).partition("::\n")[2].partition("\nFrom below")[0]
    for theirs, ours in (
        ('"vs2:ViT-B-32-quickgelu", "openai", "cifar100"', '"vs2:local-dir:tiny-clip", "", "wds/digits"'),
        ('"root"', '"digits"'),
        ("photo.jpg", digit(904)),
        ('Path("latents")', f"Path({str(tmp_path / 'latents')!r})"),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    exec(inspect.cleandoc(code), {})
    assert "latent " in capsys.readouterr().out and (tmp_path / "latents" / "index.html").is_file()
