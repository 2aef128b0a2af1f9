"""The methods on logits, registered through the same hook as anybody's. No heavy imports at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vs2_plugin.hookspecs import hookimpl
from vs2_plugin.method import Method, Option

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vs2_plugin.steering.context import Context


def build_dn(context: Context, weight: float) -> Callable[[Tensor], Tensor]:
    """Distribution normalisation."""
    from vs2_plugin.logits.dn import normalised

    return normalised(context.require_classifier(), context.require_unlabeled(), weight)


@hookimpl
def vs2_methods() -> list[Method]:
    """The methods on logits of this package."""
    weight = Option("weight", float, 0.25, minimum=0, maximum=1, help="of the means that are taken off")
    return [
        Method(
            "dn", build_dn, [weight], site="logits", protocol="unlabeled",
            summary="distribution normalisation: embeddings less a share of their mean, of images and of classes",
        ),
    ]  # fmt: skip
