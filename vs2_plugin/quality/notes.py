"""Title, meaning and usual values of each figure, in words for the reader. Imports nothing of the package.

Where no source is named, usual values were measured with SAEs at the defaults on the demo's digits (900 images, 128
dimensions) and on 4,000 embeddings of ImageNet photographs by OpenAI's ViT-B/32; see docs/saes.md.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NOTES", "Note"]


class Note(NamedTuple):
    """A figure in words."""

    title: str
    means: str
    usual: str
    beside: str = ""
    """Description of the figure that is shown for comparison; empty where there is none."""
    form: str = "{:.1%}"
    """Format of the value."""


#: Key of a figure -> its note, in the order in which figures are shown.
NOTES = {
    "explained_variance": Note(
        "Explained variance, in domain",
        "How much of the variation between held-out images of the training data the reconstruction keeps: 1 - FVU.",
        "60 to 90 %. Below that of principal components, the SAE has learned too little: from too few images, or in "
        "too short a training.",
        "as many principal components as active latents",
    ),
    "explained_variance_elsewhere": Note(
        "Explained variance, out of domain",
        "The same on images of another data set, around that set's own mean.",
        "Less than in domain; at 0 or below, the mean of that set would do as well, and steering there is blind.",
    ),
    "l0": Note(
        "Active latents per image (L0)",
        "How many latents are active in an image, on average.",
        "k, or a little less where fewer than k pre-activations are positive.",
        form="{:.1f}",
    ),
    "dead": Note(
        "Dead latents",
        "Share of the latents that no image activates: they are never used.",
        "None to 20 %, more with a small k or many latents; 14 to 35 % in the demo. More than half is too much.",
    ),
    "dense": Note(
        "Dense latents",
        "Share of the latents that are active in more than a tenth of the images: they say little about any single "
        "image.",
        "Below 15 %. With few latents or a large k it is more: k/n is the mean over latents.",
    ),
    "recovered": Note(
        "Zero-shot accuracy recovered",
        "The share of the accuracy above that of one constant activation that remains when the reconstruction replaces "
        "the activation.",
        "85 % or more. Steering adds to the activation and does not replace it, so it can work well with less.",
    ),
    "agreement": Note(
        "Zero-shot predictions kept",
        "Share of the images whose predicted class is the same when the reconstruction replaces the activation; "
        "no label is read.",
        "80 to 93 % with ten classes, about half with 1,000.",
        "the mean activation in its place",
    ),
    "probe_1": Note(
        "Class detected by one latent (AUC)",
        "How well the one latent that differs most between a class and the rest tells them apart on held-out images: "
        "area under the ROC curve, mean over classes; 0.5 by chance.",
        "0.7 to 0.95. Above that of single coordinates, latents match classes better than coordinates of the "
        "activation do.",
        "one coordinate of the activation",
        "{:.3f}",
    ),
    "probe_5": Note(
        "Class detected by five latents (AUC)",
        "The same with five latents, weighted by least squares.",
        "0.9 to 0.99.",
        "five coordinates of the activation",
        "{:.3f}",
    ),
    "monosemanticity": Note(
        "Monosemanticity (MS)",
        "Mean cosine between images that activate the same latent, weighted by how strongly they do; mean over latents "
        "that two images or more activate (arXiv 2504.02821).",
        "0.4 to 0.8. It is higher the fewer latents are active, and also high where an SAE was hardly trained: it "
        "compares SAEs of the same k that explain as much.",
        "shuffled images",
        "{:.3f}",
    ),
    "monosemantic": Note(
        "Latents above the shuffled ones",
        "Share of the latents whose MS is above that of 95 % of the latents with shuffled images.",
        "60 % or more; 5 % would be chance.",
        "by chance",
    ),
    "stability": Note(
        "Stability across seeds",
        "Mean cosine of each latent's direction with the one assigned to it in the other SAE, so that the sum "
        "is largest; dead latents are left out.",
        "0.3 to 0.7, which is 0.05 to 0.2 above the random one: another seed finds other directions, and no dictionary "
        "is the only one.",
        "a random dictionary of the same mean and covariance",
        "{:.3f}",
    ),
    "stable": Note(
        "Latents found again",
        "Share of those cosines that are 0.7 or more.",
        "0 to 25 %, more with a small k; the meaning of a latent counts for more if another seed finds it too.",
        "a random dictionary of the same mean and covariance",
    ),
    "collinearity": Note(
        "Collinearity of the decoder",
        "Largest cosine of a latent's direction with another one's, mean over latents.",
        "0.3 to 0.6. Near 1, latents duplicate each other.",
        form="{:.3f}",
    ),
    "doubled": Note(
        "Doubled latents",
        "Share of the latents with another one at a cosine above 0.9.",
        "Below 5 %.",
    ),
    "gamma": Note(
        "Offset of the activations (gamma)",
        "Norm of the mean activation over the root of the total variance: how far the cloud is from the origin, which "
        "kills latents at the start of a training that does not subtract the mean (arXiv 2605.31518).",
        "0.8 to 2. SAEs of this package start at the mean, so it does them no harm.",
        form="{:.2f}",
    ),
}
