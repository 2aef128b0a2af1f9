"""The built-in methods, registered through the same hook as anybody's. No heavy imports at the top."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vs2_plugin.hookspecs import hookimpl
from vs2_plugin.method import Method, Option

if TYPE_CHECKING:
    from vs2_plugin.steering.context import Context
    from vs2_plugin.steering.operators import SparseSteering

# Beyond this, steering is all there is left of the activation, and float32 starts to lose digits.
_LIMIT = 1000.0

#: gamma and lam are the best pair that the paper reports (CIFAR-100, ViT-B/32).
STRENGTH = (
    Option("gamma", float, 1.5, minimum=-_LIMIT, maximum=_LIMIT, help="amplification of the active latents"),
    Option("lam", float, 2.1, minimum=0, maximum=_LIMIT, help="weight of the steering vector"),
    Option(
        "alpha", float, None, minimum=-_LIMIT, maximum=_LIMIT, excludes=("gamma", "lam"),
        help="lam*(gamma-1), all that matters; instead of gamma and lam",
    ),
)  # fmt: skip


def strength(gamma: float | None, lam: float | None, alpha: float | None) -> float:
    """``α = λ (γ - 1)``, unless given."""
    return alpha if alpha is not None else lam * (gamma - 1)


def build_vs2(context: Context, gamma: float | None, lam: float | None, alpha: float | None) -> SparseSteering:
    """VS2 at one site."""
    from vs2_plugin.steering.operators import SparseSteering, vs2_steer

    alpha = strength(gamma, lam, alpha)
    return SparseSteering(vs2_steer, context.sae, alpha, {"alpha": alpha})


def build_amp(context: Context, gamma: float) -> SparseSteering:
    """The amplified reconstruction at one site."""
    from vs2_plugin.steering.operators import SparseSteering, amplified

    return SparseSteering(amplified, context.sae, gamma, {})


def build_rec(context: Context) -> SparseSteering:
    """The reconstruction at one site."""
    return build_amp(context, gamma=1.0)


@hookimpl
def vs2_methods() -> list[Method]:
    """The methods of this package."""
    gamma = Option(
        "gamma", float, 1.5, minimum=-_LIMIT, maximum=_LIMIT, help="amplification; 0 and -1 are the paper's controls"
    )
    return [
        Method(
            "vs2", build_vs2, STRENGTH, summary="Visual Sparse Steering: amplify the active SAE latents of each image"
        ),
        Method(
            "pass",
            build_vs2,
            STRENGTH,
            sae="pass",
            summary="VS2 with an SAE trained by PASS, which uses the training labels",
        ),
        Method(
            "rec", build_rec, summary="the SAE's reconstruction in place of the activation (REC_F; @blocks=all: REC_A)"
        ),
        Method("amp", build_amp, [gamma], summary="the reconstruction with its latents amplified (REC_F+gamma)"),
    ]
