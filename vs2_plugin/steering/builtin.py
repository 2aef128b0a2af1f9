"""The built-in methods, registered through the same hook as those of other packages. No heavy imports at the top."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vs2_plugin.hookspecs import hookimpl
from vs2_plugin.method import AUTO, LABELS, Method, Option

if TYPE_CHECKING:
    from vs2_plugin.steering.amplify import Amplify
    from vs2_plugin.steering.by_hand import ByHand
    from vs2_plugin.steering.centre import Centring
    from vs2_plugin.steering.context import Context
    from vs2_plugin.steering.neighbours import (
        Activations,
        Codes,
        MixedSteering,
        NeighbourSteering,
        PrototypeSteering,
        VoteSteering,
    )
    from vs2_plugin.steering.selective import SelectiveSteering

# At larger strengths nothing of the activation is left beside the steering, and float32 starts to lose digits.
_LIMIT = 1000.0

#: gamma and lam are the best pair that the paper reports (CIFAR-100, ViT-B/32).
STRENGTH = (
    Option("gamma", float, 1.5, minimum=-_LIMIT, maximum=_LIMIT, help="amplification of the active latents"),
    Option("lam", float, 2.1, minimum=0, maximum=_LIMIT, help="weight of the steering vector"),
    Option(
        "alpha", float, None, minimum=-_LIMIT, maximum=_LIMIT, excludes=("gamma", "lam"),
        help="strength, lam*(gamma-1); instead of gamma and lam",
        auto=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0),
    ),
)  # fmt: skip
#: The strength options of an oracle: without auto, since unlabeled images say nothing of an oracle's strength.
FIXED = (*STRENGTH[:2], replace(STRENGTH[2], auto=None))
#: The strength option of a method that is automatic by default.
ALPHA = replace(STRENGTH[2], default=AUTO, excludes=(), help="strength; as lam*(gamma-1) in vs2, at equal mean length")
P = Option(
    "p", float, AUTO, minimum=0, maximum=8, auto=(0.0, 2.0),
    auto_needs=("alpha=auto", "auto chooses between steering and the model as it is"),
    help="how much more to amplify latents that differ between classes; 0: none, as vs2",
)  # fmt: skip
BRAKE = Option(
    "brake", float, None, minimum=0, maximum=1,
    help="steer only where at least this share of the neighbours has one label",
)  # fmt: skip

#: The strength options of methods that steer towards neighbours.
NEAR = (
    *STRENGTH[:2],
    replace(
        STRENGTH[2],
        auto_needs=("brake", "moving images towards their neighbours in itself raises what auto measures"),
        help=f"{STRENGTH[2].help}; auto with @brake only",
    ),
)
#: All declarations of a strength.
STRENGTHS = (STRENGTH, FIXED, NEAR)

MIX = Option("mix", float, 0.5, minimum=0, maximum=1, help="weight of the image's own embedding")
RULE = Option(
    "rule", str, "majority", choices=("majority", "query"),
    help="which neighbours to steer towards: those of their most frequent class, or of the image's own zero-shot class",
)  # fmt: skip

_LATENTS = (r"[0-9]{1,9}(\+[0-9]{1,9})*", "numbers of latents joined by + (12+99)")
#: The options that choose latents by hand, and their factors.
BY_HAND = (
    Option("suppress", str, None, pattern=_LATENTS, help="latents to leave out"),
    Option("boost", str, None, pattern=_LATENTS, help="latents to make stronger where they are active"),
    Option("factor", float, None, minimum=-_LIMIT, maximum=_LIMIT, help="what boost multiplies them by; 2 by default"),
    Option(
        "edits", str, None, pattern=(r"[^@]+", "a JSON file"), excludes=("suppress", "boost", "factor"), file=True,
        help='the factor of each latent instead: {"12": 0, "99": 2.5}',
    ),
)  # fmt: skip


def strength(gamma: float | None = None, lam: float | None = None, alpha: float | None = None) -> float:
    """Return α: as given, or else ``λ (γ - 1)``."""
    if alpha is not None:
        return alpha
    assert gamma is not None and lam is not None  # only a given alpha makes gamma and lam None
    return lam * (gamma - 1)


def build_vs2(context: Context, **given: float | None) -> Amplify:
    """Build VS2 at one site."""
    from vs2_plugin.steering.amplify import Amplify

    return Amplify(context.require_sae(), strength(**given))


def build_centre(context: Context, **given: float | None) -> Centring:
    """Build centring at one site."""
    from vs2_plugin.steering.centre import Centring

    return Centring(context.require_mean(), strength(**given))


def build_amp(context: Context, gamma: float) -> Amplify:
    """Build the amplified reconstruction at one site."""
    from vs2_plugin.steering.amplify import Amplify

    return Amplify(context.require_sae(), gamma, base="b_dec")


def build_rec(context: Context) -> Amplify:
    """Build the reconstruction at one site."""
    return build_amp(context, gamma=1.0)


def build_vs2s(context: Context, alpha: float, p: float) -> SelectiveSteering:
    """Build selective amplification at one site."""
    from vs2_plugin.steering.selective import SelectiveSteering, Selectivity

    sae = context.require_sae()
    if "selectivity" not in context.shared:
        context.shared["selectivity"] = Selectivity(sae, _activations(context), context.require_retriever())
    return SelectiveSteering(sae, context.shared["selectivity"], alpha, p)


def build_vs2pp(
    context: Context, rule: str, labels: str, brake: float | None, **given: float | None
) -> NeighbourSteering:
    """Build VS2++ at one site."""
    return _neighbour_steering(context, _codes(context), strength(**given), rule, labels, brake)


def build_clipsteer(
    context: Context, rule: str, labels: str, brake: float | None, **given: float | None
) -> NeighbourSteering:
    """Build CLIP steering at one site."""
    return _neighbour_steering(context, _activations(context), strength(**given), rule, labels, brake)


def build_latents(
    context: Context, suppress: str | None, boost: str | None, factor: float | None, edits: str | None
) -> ByHand:
    """Build the steering by hand-chosen latents at one site."""
    from vs2_plugin.steering.by_hand import ByHand, factors_of

    return ByHand(context.require_sae(), factors_of(suppress, boost, factor, edits))


def build_proto(context: Context, **given: float | None) -> PrototypeSteering:
    """Build oracle prototypes at one site."""
    from vs2_plugin.steering.neighbours import PrototypeSteering

    return PrototypeSteering(context.require_retriever(), _codes(context), strength(**given))


def build_rag(context: Context, mix: float, labels: str) -> MixedSteering:
    """Build weighted RAG."""
    from vs2_plugin.steering.neighbours import MixedSteering

    return MixedSteering(context.require_retriever(), mix, labels)


def build_knn(context: Context) -> VoteSteering:
    """Build the vote of the neighbours."""
    from vs2_plugin.steering.neighbours import VoteSteering

    return VoteSteering(context.require_retriever())


def _neighbour_steering(
    context: Context, directions: Codes | Activations, alpha: float, rule: str, labels: str, brake: float | None
) -> NeighbourSteering:
    from vs2_plugin.steering.neighbours import NeighbourSteering

    dataset = None if context.task is None else context.task.dataset
    return NeighbourSteering(context.require_retriever(), directions, alpha, rule, labels, dataset, brake)


def _activations(context: Context) -> Activations:
    """Return the gallery's activations at this site, as one object that all builders share."""
    from vs2_plugin.steering.neighbours import Activations

    retriever = context.require_retriever()
    if "activations" not in context.shared:
        stored = retriever.gallery.activations[context.site]
        context.shared["activations"] = Activations(stored, retriever.device)
    shared: Activations = context.shared["activations"]
    return shared


def _codes(context: Context) -> Codes:
    """Return the codes of the gallery's activations at this site, as one object that all builders share."""
    from vs2_plugin.steering.neighbours import Codes

    if "codes" not in context.shared:
        count = len(context.require_retriever().gallery)
        context.shared["codes"] = Codes(context.require_sae(), _activations(context), count)
    shared: Codes = context.shared["codes"]
    return shared


@hookimpl
def vs2_methods() -> list[Method]:
    """Return the methods of this package."""
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
            "vs2s", build_vs2s, [P, ALPHA], gallery="images", classes=True,
            summary="selective amplification: VS2, most along latents that differ between classes; automatic strength",
        ),
        Method(
            "rec", build_rec, summary="the SAE's reconstruction in place of the activation (REC_F; @blocks=all: REC_A)"
        ),
        Method("amp", build_amp, [gamma], summary="the reconstruction with its latents amplified (REC_F+gamma)"),
        Method(
            "centre", build_centre, STRENGTH,
            summary="centring: away from the mean activation, like VS2 without its SAE",
        ),
        Method(
            "vs2pp", build_vs2pp, [*NEAR, RULE, LABELS, BRAKE], aliases=("vs2++",),
            gallery="neighbours", classes=True,
            summary="VS2++: steer towards the latents of neighbours of one class, away from those of the others",
        ),
        Method(
            "clipsteer", build_clipsteer, [*NEAR, RULE, LABELS, BRAKE], gallery="neighbours", classes=True,
            summary="like VS2++, along the neighbours' activations instead of their latents (CLIP steering)",
        ),
        Method(
            "rag", build_rag, [MIX, replace(LABELS, default="none", choices=("none", "pseudo", "oracle"))],
            gallery="neighbours", site="output", summary="the embedding mixed with its neighbours' (weighted RAG)",
        ),
        Method(
            "knn", build_knn, gallery="neighbours", site="output", classes=True, unreported=("acc5",),
            summary="vote of the neighbours' zero-shot classes",
        ),
        Method(
            "latents", build_latents, BY_HAND, summary="chosen latents left out or boosted by hand, and nothing else",
        ),
        Method(
            "proto", build_proto, FIXED, gallery="images", classes=True, labels="oracle",
            summary="oracle: steer towards the latents of the image's true class (its prototype)",
        ),
    ]  # fmt: skip
