"""The built-in methods on logits, registered by the same hook as plugins' methods. No heavy imports at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vs2_plugin.hookspecs import hookimpl
from vs2_plugin.method import Method, Option

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vs2_plugin.steering.batch import Batch
    from vs2_plugin.steering.context import Context


def build_dn(context: Context, weight: float) -> Callable[[Tensor], Tensor]:
    """Build the readout of distribution normalisation, from embeddings to logits."""
    from vs2_plugin.logits.dn import normalised

    return normalised(context.require_classifier(), context.require_unlabeled(), weight)


def build_inmap(context: Context, steps: int, rate: float, sure: float, sinkhorn: int) -> Callable[[Tensor], Tensor]:
    """Build the readout of InMaP, from embeddings to logits."""
    from vs2_plugin.logits.inmap import learned

    return learned(context.require_classifier(), context.require_unlabeled(), steps, rate, sure, sinkhorn)


def build_zlap(context: Context, edges: int, power: float, damping: float) -> Callable[[Tensor, Batch], Tensor]:
    """Build the readout of ZLaP, from embeddings to logits."""
    from vs2_plugin.logits.zlap import propagated

    return propagated(context.require_classifier(), context.require_unlabeled(), edges, power, damping)


def build_tda(context: Context, **weights: float) -> Callable[[Tensor], Tensor]:
    """Build the readout of TDA, from embeddings to logits."""
    from vs2_plugin.logits.tda import Stream

    return Stream(context.require_classifier(), **weights)


def build_zero(context: Context, keep: float) -> Callable[[Tensor], Tensor]:
    """Build the readout of ZERO, from embeddings to logits."""
    from vs2_plugin.logits.zero import voted

    return voted(context.require_classifier(), keep)


def build_stata(context: Context, anchor: float, density: float, rounds: int) -> Callable[[Tensor], Tensor]:
    """Build the readout of StatA, from embeddings to logits."""
    from vs2_plugin.logits.stata import mixture

    return lambda x: mixture(context.require_classifier(), x, anchor, density, rounds)


@hookimpl
def vs2_methods() -> list[Method]:
    """Return this package's methods on logits, with the options that their papers tune."""
    return [
        Method(
            "dn", build_dn,
            [Option("weight", float, 0.25, minimum=0, maximum=1, help="weight of the means that are subtracted")],
            site="logits", protocol="unlabeled",
            summary="distribution normalisation: a share of the mean embedding subtracted, of images and of classes",
        ),
        Method(
            "inmap", build_inmap,
            [
                Option("steps", int, 2000, minimum=0, maximum=1_000_000, help="steps of gradient descent"),
                Option("rate", float, 10.0, minimum=0, maximum=1000, help="learning rate of the first step"),
                Option("sure", float, 0.6, minimum=0, maximum=1, help="probability above which a class is certain"),
                Option(
                    "sinkhorn", int, 0, minimum=0, maximum=1000,
                    help="rounds that make classes equally frequent among the unlabeled images, 20 in the paper",
                ),
            ],
            site="logits", protocol="unlabeled",
            summary="InMaP: class embeddings learned among unlabeled images from their zero-shot classes",
        ),
        Method(
            "zlap", build_zlap,
            [
                Option("edges", int, 5, minimum=2, maximum=1000, help="edges from an image to images, and to classes"),
                Option("power", float, 5.0, minimum=0, maximum=100, help="power to which class cosines are raised"),
                Option("damping", float, 0.3, minimum=0, maximum=0.99, help="damping of what spreads over edges"),
            ],
            site="logits", protocol="unlabeled",
            summary="ZLaP: classes spread from texts over a graph of unlabeled images",
        ),
        Method(
            "tda", build_tda,
            [
                Option("positive", float, 2.0, minimum=0, maximum=1000, help="weight of confident images"),
                Option("sharpness", float, 5.0, minimum=0, maximum=1000, help="how similar to them an image must be"),
                Option("negative", float, 0.117, minimum=0, maximum=1000, help="weight of uncertain images"),
                Option("negative_sharpness", float, 1.0, minimum=0, maximum=1000, help="the same for uncertain images"),
            ],
            site="logits", protocol="stream",
            summary="TDA: two small caches, of the most confident earlier images and of uncertain ones",
        ),
        Method(
            "zero", build_zero,
            [Option("keep", float, 0.3, minimum=0, maximum=1, help="share of the views that vote, the most confident")],
            site="logits", views=True, summary="ZERO: a vote of the most confident views of an image",
        ),
        Method(
            "stata", build_stata,
            [
                Option("anchor", float, 1.0, minimum=0.001, maximum=1e6, help="weight of a class's text, in images"),
                Option("density", float, 10.0, minimum=0, maximum=1e6, help="weight of the Gaussians beside the texts"),
                Option("rounds", int, 10, minimum=1, maximum=1000, help="rounds of fitting the mixture"),
            ],
            site="logits", protocol="transductive",
            summary="StatA: a mixture of Gaussians among all test images, anchored at the texts",
        ),
    ]  # fmt: skip
