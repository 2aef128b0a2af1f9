"""Words by text embedding."""

import torch
import torch.nn.functional as F

from vs2_plugin.clip.edits import editing
from vs2_plugin.clip.sites import Sites
from vs2_plugin.model.words import latent_embeddings, nearest


def test_a_direction_is_what_the_tower_makes_of_it(make_clip, batch):
    model = make_clip()
    site = Sites.of(model).default
    mean, steps = torch.randn(32), torch.randn(3, 32)

    def embedded(activation):
        with torch.no_grad(), editing(model, site, lambda x: activation[None]):
            return model.encode_image(batch[:1])[0]

    found = latent_embeddings(model, site, mean, steps)
    for row, step in zip(found, steps, strict=True):
        assert torch.allclose(row, embedded(mean + step) - embedded(mean), atol=1e-5)


def test_at_the_output_it_is_the_step_itself(make_clip):
    model = make_clip(pool_type="avg")
    site, steps = Sites.of(model).default, torch.randn(2, 24)
    assert site == Sites.of(model).output
    assert torch.allclose(latent_embeddings(model, site, torch.randn(24), steps), steps, atol=1e-5)


def test_nearest_takes_off_what_all_words_have_in_common():
    generator = torch.Generator().manual_seed(0)
    own, shared = torch.randn(6, 24, generator=generator), 5 * torch.randn(24, generator=generator)
    texts = F.normalize(own + shared, dim=-1)
    centred = texts - texts.mean(0)
    cosines, indices = nearest(2 * centred[[4, 1]], texts, 3)
    assert indices[:, 0].tolist() == [4, 1] and torch.allclose(cosines[:, 0], torch.ones(2), atol=1e-5)
    assert (cosines.diff(dim=1) <= 0).all() and cosines.shape == (2, 3)
    assert nearest(centred, texts, 100)[0].shape == (6, 6)
