"""Texts that explain to the reader how figures are computed; shown by ``--help`` and on pages. Imports nothing."""

from __future__ import annotations

__all__ = ["ATTRIBUTION", "GROUPS", "NO_GALLERY", "NO_WORDS", "PURITY", "TOP_IMAGES", "WORDS"]

#: Number of top-activating images of each latent.
TOP_IMAGES = 10
ATTRIBUTION = (
    "Logits are 100 x cosine, as in clip_benchmark. Contributions: steering moves the activation x by a w along the "
    "decoder direction w of each active latent (vs2, pass, vs2pp: a = alpha c; amp, rec: a = (gamma - 1) c), then by a "
    "rest. At each point of this path the change of a logit is exactly the sum of the latents' parts, but what "
    "follows (LayerNorm, projection, normalisation) is not linear, so the parts change along the path. Shown is their "
    "integral, a <w, gradient of the logit averaged over x + t sum(a w), t from 0 to 1> (integrated gradients): it "
    "sums to the change of the logit up to the remainder. It is not the change that leaving the latent out would make. "
    "With several sites, each is examined with those before it steered and those after it not: their changes add up."
)
WORDS = (
    "Nearest words: the largest cos(e(mu + t w) - e(mu), text - mean text). w is the latent's decoder direction, mu "
    "the mean activation of the training images, t the latent's mean activation where it is active (without a gallery: "
    "its activation in the image), e the rest of the tower (its embedding, not normalised). The mean text is "
    "that of the words offered: a word is only nearer than the other words offered, and one of them is always the "
    "nearest, so look at the cosine."
)
PURITY = (
    f"Top images: the {TOP_IMAGES} training images in which a latent's activation is largest. Purity: the share "
    "of them in their most frequent zero-shot class. Chance: the mean purity of as many images drawn at "
    "random with the gallery's own class frequencies, computed exactly; p is the probability that such a draw is at "
    "least as pure, without correction for the number of latents. No true label is read."
)
GROUPS = f"{PURITY} A latent may be in several groups."
NO_WORDS = "Nearest words are shown at the tower's end only: what comes after an earlier block depends on the image."
NO_GALLERY = "The checkpoint has no gallery, so no training images are shown."
