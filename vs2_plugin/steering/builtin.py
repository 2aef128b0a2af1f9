"""The built-in methods, registered through the same hook as anybody's. No heavy imports at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vs2_plugin.hookspecs import hookimpl
from vs2_plugin.method import Method, Option

if TYPE_CHECKING:
    from vs2_plugin.steering.context import Context
    from vs2_plugin.steering.operators import VisualSparseSteering

# Beyond this, steering is all there is left of the activation, and float32 starts to lose digits.
_LIMIT = 1000.0

#: gamma and lam are the best pair that the paper reports (CIFAR-100, ViT-B/32).
STRENGTH = (
    Option("gamma", float, 1.5, minimum=-_LIMIT, maximum=_LIMIT, help="amplification of the active latents"),
    Option("lam", float, 2.1, minimum=0, maximum=_LIMIT, help="weight of the steering vector"),
    Option(
        "alpha", float, None, minimum=-_LIMIT, maximum=_LIMIT, excludes=("gamma", "lam"),
        help="lam·(gamma-1), all that matters; instead of gamma and lam",
    ),
)  # fmt: skip


def strength(gamma: float | None, lam: float | None, alpha: float | None) -> float:
    """``α = λ (γ - 1)``, unless given."""
    return alpha if alpha is not None else lam * (gamma - 1)


def build_vs2(context: Context, gamma: float | None, lam: float | None, alpha: float | None) -> VisualSparseSteering:
    """VS2 at one site."""
    from vs2_plugin.steering.operators import VisualSparseSteering

    return VisualSparseSteering(context.sae, strength(gamma, lam, alpha))


@hookimpl
def vs2_methods() -> list[Method]:
    """The methods of this package."""
    return [
        Method("vs2", build_vs2, STRENGTH, summary="Visual Sparse Steering: amplify the active SAE latents of each image"),
    ]
