"""What each figure is called, what it means and what is usual, in words for the reader. Imports nothing of the package.

What is said to be usual is from here where no source is named: SAEs at the defaults on the demo's digits (900 images,
128 dimensions) and on 4,000 embeddings of ImageNet photographs by OpenAI's ViT-B/32; see docs/saes.md.
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
    """What the figure beside it is of; empty where there is none."""
    form: str = "{:.1%}"
    """How it is written."""


#: Key of a figure -> what is said of it; in the order in which they are shown.
NOTES = {
    "explained_variance": Note(
        "Explained variance, in domain",
        "How much of the variation between held-out images of the training data the reconstruction keeps: 1 - FVU.",
        "60 to 90 %. Below that of principal components, the SAE knows too little: of too few images, or too short a "
        "training.",
        "principal components, as many as latents are active",
    ),
    "explained_variance_elsewhere": Note(
        "Explained variance, out of domain",
        "The same on images of another data set, around that set's own mean.",
        "Less than in domain; at 0 or below, the mean of that set would do as well, and steering there is blind.",
    ),
    "l0": Note(
        "Active latents per image (L0)",
        "How many latents are active in an image, in the mean.",
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
        "Share of the latents that are active in more than a tenth of the images: they say little about any one.",
        "Below 15 %. With few latents or a large k it is more: k/n is what the mean latent has.",
    ),
    "recovered": Note(
        "Zero-shot accuracy recovered",
        "Of the accuracy above that of one constant activation, what is left where the reconstruction takes the "
        "activation's place.",
        "85 % or more. Steering adds to the activation and does not replace it, so that it can do well with less.",
    ),
    "agreement": Note(
        "Zero-shot predictions kept",
        "Share of the images whose predicted class is the same where the reconstruction takes the activation's place; "
        "no label is read.",
        "80 to 93 % with ten classes, about half with 1,000.",
        "the mean activation in its place",
    ),
    "probe_1": Note(
        "Class told by one latent (AUC)",
        "How well the one latent that differs most between a class and the rest tells them apart on held-out images: "
        "area under the ROC curve, mean over classes; 0.5 by chance.",
        "0.7 to 0.95. Above that of single coordinates, latents are nearer to classes than the activation is.",
        "one coordinate of the activation",
        "{:.3f}",
    ),
    "probe_5": Note(
        "Class told by five latents (AUC)",
        "The same with five latents, weighted by least squares.",
        "0.9 to 0.99.",
        "five coordinates of the activation",
        "{:.3f}",
    ),
    "monosemanticity": Note(
        "Monosemanticity (MS)",
        "Mean cosine between images that activate the same latent, weighted by how strongly they do; mean over latents "
        "that two images or more activate (arXiv 2504.02821).",
        "0.4 to 0.8. It is the higher the fewer latents are active, and high where an SAE was hardly trained, too: it "
        "compares SAEs of one k that explain as much.",
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
        "Mean cosine of each latent's direction with the one that it is assigned to in the other SAE, so that the sum "
        "is the largest; latents that are not dead.",
        "0.3 to 0.7, by 0.05 to 0.2 above the random one: another seed finds other directions, and no dictionary is "
        "the only one.",
        "a random dictionary of the same mean and covariance",
        "{:.3f}",
    ),
    "stable": Note(
        "Latents found again",
        "Share of those cosines that are 0.7 or more.",
        "0 to 25 %, more with a small k; what a latent means is worth the more if another seed has it too.",
        "a random dictionary of the same mean and covariance",
    ),
    "collinearity": Note(
        "Collinearity of the decoder",
        "Largest cosine of a latent's direction with another one's, mean over latents.",
        "0.3 to 0.6. Near 1, latents double each other.",
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
        "0.8 to 2. SAEs of this package start at the mean, so that it does them no harm.",
        form="{:.2f}",
    ),
}
