"""SAEs of a checkpoint, written for other libraries and read by them."""

import pytest
import torch

from vs2_plugin.checkpoint.exporting import FORMATS, export
from vs2_plugin.errors import CheckpointError, DataError
from vs2_plugin.sae.files import save_sae
from vs2_plugin.sae.foreign import WRITERS, find_foreign, read_foreign

from .test_checkpoint import save  # noqa: F401


@pytest.fixture
def checkpoint(save):  # noqa: F811
    return save()


def x_of(width):
    return torch.randn(30, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_reads_as_it_was(checkpoint, tmp_path, format):
    folders = export(checkpoint, tmp_path / "a/out", format)
    assert [folder.name for folder in folders] == [site.folder for site in checkpoint.sites]
    assert sorted(find_foreign(tmp_path / "a/out")) == sorted(folders)
    for folder, site in zip(folders, checkpoint.sites):
        found, (sae, _) = read_foreign(folder), checkpoint.sae(site)
        assert found.block == site.block and found.sae.config == sae.config
        assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in found.sae.state_dict().items())
    assert set(WRITERS) == set(FORMATS)


def test_sparsify_itself_loads_all_of_them(sparsify, checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out", "sparsify")
    loaded = sparsify.SparseCoder.load_many(str(tmp_path / "out"), local=True)
    assert list(loaded) == [site.folder for site in checkpoint.sites]
    for site, theirs in zip(checkpoint.sites, loaded.values()):
        sae, _ = checkpoint.sae(site)
        x = x_of(sae.config.d_in)
        torch.testing.assert_close(theirs(x).sae_out, sae(x))
        theirs.save_to_disk(tmp_path / "again" / site.folder)  # and back
        assert torch.equal(read_foreign(tmp_path / "again" / site.folder).sae(x), sae(x))


def test_saelens_itself_loads_each_of_them(checkpoint, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
    for folder, site in zip(export(checkpoint, tmp_path / "out", "saelens"), checkpoint.sites):
        theirs, (sae, _) = sae_lens.SAE.load_from_disk(folder), checkpoint.sae(site)
        x = x_of(sae.config.d_in)
        torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-5)
        assert theirs.cfg.metadata.hook_name == f"blocks.{site.block}.hook_resid_post"
        theirs.save_model(tmp_path / "again" / site.folder)  # and back
        back = read_foreign(tmp_path / "again" / site.folder)
        assert back.block == site.block and torch.equal(back.sae(x), sae(x))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"normalize_activations": "layer_norm"}, r"it normalises activations \(layer_norm\)"),
        ({"normalize_activations": "constant_norm_rescale"}, "it normalises activations"),
        ({"activation": "abs"}, "keeps latents of largest magnitude with their signs"),
    ],
)
def test_what_sparsify_cannot_hold_is_refused_whole(checkpoint, tmp_path, make_sae, monkeypatch, config, reason):
    sae, last = make_sae(8, 16, 3, **config), checkpoint.sites[-1]
    plain = type(checkpoint).sae
    monkeypatch.setattr(
        type(checkpoint), "sae", lambda self, site: (sae, torch.zeros(8)) if site is last else plain(self, site)
    )
    with pytest.raises(CheckpointError, match=f"{last.folder}: .*{reason}.*; expected --format saelens"):
        export(checkpoint, tmp_path / "out", "sparsify")
    assert not (tmp_path / "out").exists()
    folder = export(checkpoint, tmp_path / "out", "saelens")[-1]
    assert read_foreign(folder).sae.config == sae.config


def test_what_is_there_stays(checkpoint, tmp_path):
    for folder in (tmp_path, checkpoint.folder):
        with pytest.raises(DataError, match="already exists; remove it, or name another folder"):
            export(checkpoint, folder, "sparsify")


def test_a_folder_that_cannot_be_made_is_told(checkpoint, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match="cannot write into .*file/out: File exists; name another folder"):
        export(checkpoint, tmp_path / "file/out", "saelens")


def test_an_sae_by_pass_tells_its_block(tmp_path, make_sae):
    save_sae(make_sae(8, 16, 3), tmp_path / "visual.transformer.resblocks.1.pass")
    assert read_foreign(tmp_path / "visual.transformer.resblocks.1.pass").block == 1
