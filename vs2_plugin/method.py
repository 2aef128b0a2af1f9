"""The declaration of a steering method: its name, its options, and the function that builds it.

No heavy imports here: these declarations are read to parse a model string, long before torch is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vs2_plugin.documented import documented
from vs2_plugin.errors import PluginError
from vs2_plugin.names import SCHEMES
from vs2_plugin.settings import Scalar, Setting

__all__ = [
    "AUTO", "AUTOMATIC", "COMMON", "ENCODER_NAME", "LABELS", "LABELS_USED", "NEIGHBOURS", "PROTOCOLS", "STREAM",
    "TOLD_OF_ALL", "UNLABELED", "VIEWS", "Method", "Option", "Scalar", "widest",
]  # fmt: skip

#: In place of a number, which is then chosen from unlabeled training images.
AUTO = "auto"
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
#: Names that no method may have: prefixes of models that are not steered, and the harness's own model types.
RESERVED = {*(scheme.rstrip(":") for scheme in SCHEMES), "open_clip", "ja_clip"}


@documented
@dataclass(frozen=True)
class Option(Setting):
    """One ``@key=value`` option of a model string: a setting with a few more fields.

    >>> Option("gamma", float, 1.5, minimum=0).parse("2")
    2.0
    """

    excludes: tuple[str, ...] = ()
    """Keys of options that may not be given together with this one."""
    auto: tuple[float, ...] | None = None
    """For a number: the values from which ``auto`` chooses one, by unlabeled training images (see
    :mod:`vs2_plugin.strength`). With all automatic options at their first value, the method must leave activations
    unchanged. None: the option does not accept ``auto``."""
    auto_needs: tuple[str, str] | None = None
    """Key of an option that has to be given together with ``auto``, and the reason in words. With ``KEY=auto``, that
    option has to be ``auto`` too, or this one a number."""
    file: bool = False
    """Whether the value is the path of a file. Results then tell the file's digest, by which a changed file is noticed.
    """

    def __post_init__(self) -> None:
        if self.file and self.type is not str:
            raise PluginError(f"option {self.name!r}: file is for the path of a file; expected type str")
        if self.auto is not None:
            if self.type is not float or not isinstance(self.auto, (tuple, list)) or len(self.auto) < 2:
                raise PluginError(
                    f"option {self.name!r}: auto is {self.auto!r}; expected two values or more of a number"
                )
            object.__setattr__(self, "auto", tuple(self.auto))  # options are hashed
        super().__post_init__()
        for value in self.auto or ():
            if super().check(value) is not None:
                raise PluginError(f"option {self.name!r}: auto holds {value!r}, which is not {self.accepted()}")

    def parse(self, text: str) -> Scalar:
        """Return the value that ``text`` stands for. Raises ValueError with what was expected."""
        return AUTO if self.auto is not None and text == AUTO else super().parse(text)

    def check(self, value: Any) -> str | None:
        """Return what was expected, if ``value`` is not acceptable; else None."""
        return None if self.auto is not None and value == AUTO else super().check(value)

    def accepted(self) -> str:
        """Return the accepted values in words."""
        return super().accepted() if self.auto is None else f"{super().accepted()}, or {AUTO}"


#: For a method that reads labels of gallery images: which ones. The framework recognises an oracle by this option.
LABELS = Option(
    "labels", str, "pseudo", choices=("pseudo", "oracle"),
    help="labels of the neighbours: their zero-shot classes, or (oracle, an upper bound) the training labels",
)  # fmt: skip

#: Pattern of a retrieval encoder's name, and its description in words.
ENCODER_NAME = (r"[A-Za-z0-9][A-Za-z0-9_.-]*", "clip, or the name of a timm model")

#: Options of every method that looks up neighbours; its builder does not get them.
NEIGHBOURS = (
    Option("n", int, 50, minimum=1, maximum=100_000, help="N, the number of neighbours"),
    Option(
        "encoder", str, "clip", pattern=ENCODER_NAME,
        help="what images are compared by: the CLIP embedding, or a vs2-train-sae --retrieval_encoder",
    ),
    Option("search", str, "exact", choices=("exact", "faiss"), help="faiss: approximate, for millions of images"),
)  # fmt: skip

#: Options of every method with an option that accepts ``auto``; its builder does not get them.
AUTOMATIC = (
    Option(
        "prior", str, None, pattern=(r"[^@]+", "a JSON file"), file=True,
        help="for auto, where the classes are not equally frequent: {class: share}, or a list in the classes' order",
    ),
)  # fmt: skip

#: Options of every method that steers at a site of a checkpoint, plugins' included; builders do not get them.
COMMON = (
    Option(
        "blocks", str, None,
        pattern=(r"all|[0-9]{1,9}(\+[0-9]{1,9})*", "block numbers counted from 0 and joined by + (10+11), or all"),
        help="where to steer; by default the last site of the checkpoint",
    ),
    Option(
        "gate", float, None, minimum=0.01, maximum=0.995,
        help="steer only images whose FVU is within this quantile of the held-out training activations",
    ),
)  # fmt: skip

#: Options of a method on logits that learns from unlabeled images; its builder does not get them.
UNLABELED = (
    Option(
        "unlabeled", str, "train", choices=("train", "test"),
        help="the images it learns from: the checkpoint's gallery of training images, or all test images at once",
    ),
    Option(
        "use", str, "always", choices=("always", AUTO),
        help="auto: only where these images support it, by the rule for strengths; otherwise plain CLIP",
    ),
)  # fmt: skip

#: The option of a method that sees a stream of images; its builder does not get it.
STREAM = (Option("order", int, 0, minimum=0, maximum=2**31 - 1, help="seed of the order in which the images come"),)

#: Options of a method that sees several views of each image; its builder does not get them.
VIEWS = (
    Option("views", int, 64, minimum=2, maximum=1024, help="number of views: the image itself and random crops of it"),
    Option("crops", int, 0, minimum=0, maximum=2**31 - 1, help="seed of the crops"),
)  # fmt: skip

#: Names, after ``vs2_``, of the facts that results hold for every method; no option may have one of these names.
TOLD_OF_ALL = frozenset(
    {"method", "version", "site", "split", "protocol", "checkpoint", "checkpoint_digest", "transductive", "labels"}
    | {"neighbour_labels", "sae_warning", "coverage", "mean_fvu", "gate_threshold", "seconds", "peak_memory"}
    | {f"ece{before}{bins}" for before in ("", "_before") for bins in ("", "_bins")}
    | {"mended", "broken", "results_digest", "option_files"}
)

#: The data that a method sees beside the image at hand, from least to most: none; unlabeled images of the domain, such
#: as an SAE's training images; the images that came before; all test images.
PROTOCOLS = ("image", "unlabeled", "stream", "transductive")

#: Which labels a method may use, from none to those of the test images.
LABELS_USED = ("none", "train", "oracle")

#: Attribute of a method -> the values that it may have.
_CHOICES = {
    "sae": ("plain", "pass"),
    "labels": LABELS_USED,
    "gallery": ("none", "images", "neighbours"),
    "site": ("checkpoint", "output", "logits"),
    "protocol": ("", *PROTOCOLS),
}


@documented
@dataclass(frozen=True)
class Method:
    """A steering method, as a plugin offers it.

    ``build(context, **options)`` is called once per site, with every option of :attr:`options` (given or default),
    and returns the steering: a callable from activations ``[batch, d]`` (float32) to activations of the same shape.
    A steering with a parameter ``batch`` gets a :class:`vs2_plugin.Batch` too, and a steering may return a
    :class:`vs2_plugin.Move` along latents. It may be an ``nn.Module``, which then moves between devices with the model,
    and carry an attribute ``facts``, a mapping of flat scalars that is added to the results' metrics.

    A method that steers at a site of a checkpoint has the options of :data:`COMMON` too: the site and the gate are
    the same for all, and applied around what ``build`` returns. One that looks up neighbours has those of
    :data:`NEIGHBOURS`.

    A method on logits (``site="logits"``) does not steer: it reads image embeddings as classes. What it builds is
    called with embeddings ``[batch, embed_dim]`` of unit norm (``[batch, views, embed_dim]`` for :attr:`views`), and
    returns logits ``[batch, classes]``, whose softmax is its class probabilities. The context holds the ``classifier``,
    and the ``unlabeled`` embeddings if its :attr:`protocol` includes them, which also sets checkpoint and gallery.
    """

    name: str
    """The name that stands before the colon of a model string."""
    build: Callable[..., Any]
    """The builder; see above. Its first argument is a :class:`vs2_plugin.Context`."""
    options: tuple[Option, ...] | list[Option] = ()
    """The method's own ``@key=value`` options."""
    summary: str = ""
    """One line for ``vs2 methods``."""
    aliases: tuple[str, ...] = ()
    """Other spellings of the name (these may hold ``+`` and ``-`` too)."""
    needs_checkpoint: bool = True
    """Whether the method steers along an SAE checkpoint."""
    sae: str = "plain"
    """The SAE of the checkpoint that the method steers along: ``plain``, or ``pass`` for the one trained by PASS."""
    labels: str = "none"
    """Which labels the method itself uses: ``none``, ``train`` or ``oracle``. Recorded in every result."""
    gallery: str = "none"
    """The part of the checkpoint's gallery of training images that the method needs: ``none``, the ``images``, or the
    ``neighbours`` of each query among them. Unless ``none``, the context of a method that steers holds a retriever."""
    site: str = "checkpoint"
    """Where the method acts: at sites of the ``checkpoint``, at the tower's ``output`` embedding, or on ``logits``."""
    protocol: str = ""
    """The data seen beside the image at hand: none (``image``), ``unlabeled`` images of the domain, the ``stream`` of
    images before, or all test images (``transductive``). By default ``unlabeled`` for a steering with a checkpoint,
    else ``image``. Recorded in every result."""
    views: bool = False
    """Whether a method on logits sees several views of each image, random crops of it."""
    classes: bool = False
    """Whether the method needs the class embeddings, and so runs in zero-shot classification only."""
    unreported: tuple[str, ...] = ()
    """Metrics of clip_benchmark that mean nothing for this method, and are left out of its results."""
    _by_name: Mapping[str, Option] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _NAME.match(self.name) or self.name in RESERVED:
            reserved = ", ".join(sorted(RESERVED))
            raise PluginError(
                f"method name {self.name!r}: expected lower-case letters, digits and '_', and none of {reserved}"
            )
        if not isinstance(self.options, (tuple, list)) or not all(isinstance(own, Option) for own in self.options):
            shown = f"{self.options!r:.80}"
            raise PluginError(f"method {self.name!r}: options is {shown}; expected a list of vs2_plugin.Option")
        self._check_declarations()
        object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "_by_name", self._checked_options())

    def _check_declarations(self) -> None:
        if isinstance(self.aliases, str):
            raise PluginError(f"method {self.name!r}: aliases is {self.aliases!r}; expected a tuple of names")
        for alias in self.aliases:
            if not re.match(r"[a-z][a-z0-9_+-]*\Z", alias) or alias in RESERVED:
                raise PluginError(f"method {self.name!r}: alias {alias!r} is not a usable name")
        if not callable(self.build):
            raise PluginError(f"method {self.name!r}: build is {self.build!r}; expected a function")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                accepted = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise PluginError(f"method {self.name!r}: {name} is {getattr(self, name)!r}; expected {accepted}")
        self._check_site()
        if any(option.auto for option in self.options) and not self.needs_checkpoint:
            raise PluginError(
                f"method {self.name!r} has an automatic option, which is chosen with the gallery of a checkpoint; "
                "set needs_checkpoint"
            )
        if self.gallery != "none" and not self.needs_checkpoint:
            raise PluginError(f"method {self.name!r} needs a gallery, which is part of a checkpoint; set "
                              "needs_checkpoint")

    def _check_site(self) -> None:
        """Refuse declarations that do not fit the site, and fill in those that follow from the site and protocol."""
        if self.site == "logits":
            if self.gallery == "neighbours" or any(option.auto for option in self.options):
                raise PluginError(
                    f"method {self.name!r} acts on logits, but has a gallery of neighbours, or an option that can be "
                    "auto; expected neither"
                )
            protocol = self.protocol or "image"
            learns = protocol == "unlabeled"
            declared = {"protocol": protocol, "classes": True, "needs_checkpoint": learns}
            declared["gallery"] = "images" if learns else "none"
        else:
            protocol = self.protocol or ("unlabeled" if self.needs_checkpoint else "image")
            if self.views or protocol not in PROTOCOLS[:2]:
                raise PluginError(
                    f"method {self.name!r} steers image by image, but is declared with views, or as {protocol!r}; "
                    "expected site='logits' with these"
                )
            if self.needs_checkpoint and protocol == "image":
                raise PluginError(f"method {self.name!r} has a checkpoint, which is made from unlabeled images; "
                                  "expected another protocol")
            declared = {"protocol": protocol}
        for name, value in declared.items():
            object.__setattr__(self, name, value)

    def _checked_options(self) -> dict[str, Option]:
        by_name = {option.name: option for option in self.all_options}
        if len(by_name) != len(self.all_options):
            raise PluginError(
                f"method {self.name!r}: two options share a name, or take that of a common one "
                f"({', '.join(option.name for option in self.all_options[len(self.options) :])})"
            )
        for option in self.options:
            if option.name in TOLD_OF_ALL - {LABELS.name}:
                raise PluginError(
                    f"method {self.name!r}: an option named {option.name!r}, a name that results use for every method; "
                    "expected another name"
                )
            needed, _, value = (option.auto_needs or ("", ""))[0].partition("=")
            if needed and (needed not in by_name or (value and by_name[needed].auto is None)):
                which = f"{value} of {needed!r}, which does not accept it" if needed in by_name else (
                    f"{needed!r}, which is not an option"
                )
                raise PluginError(f"method {self.name!r}: auto of {option.name!r} needs {which}")
        return by_name

    @property
    def all_options(self) -> tuple[Option, ...]:
        """The method's own options, followed by the common ones that apply to it."""
        common = COMMON if self.needs_checkpoint and self.site == "checkpoint" else ()
        automatic = AUTOMATIC if any(option.auto for option in self.options) else ()
        neighbours = NEIGHBOURS if self.gallery == "neighbours" else ()
        learning = UNLABELED if self.site == "logits" and self.protocol == "unlabeled" else ()
        streaming, seeing = STREAM if self.protocol == "stream" else (), VIEWS if self.views else ()
        return (*self.options, *automatic, *neighbours, *learning, *streaming, *seeing, *common)

    def option(self, name: str) -> Option | None:
        """Return the option called ``name``, or None."""
        return self._by_name.get(name)

    def labels_used(self, options: Mapping[str, Scalar | None]) -> str:
        """Return the labels used with these options: :attr:`labels`, or ``oracle`` by the option :data:`LABELS`."""
        return "oracle" if options.get(LABELS.name) == "oracle" else self.labels

    def protocol_of(self, options: Mapping[str, Scalar | None]) -> str:
        """Return the protocol with these options: :attr:`protocol`, or ``transductive`` by one of :data:`UNLABELED`."""
        return "transductive" if self._learns_from_test(options) else self.protocol

    def asks_checkpoint(self, options: Mapping[str, Scalar | None]) -> bool:
        """Return whether the method needs a checkpoint with these options."""
        return self.needs_checkpoint and not self._learns_from_test(options)

    def _learns_from_test(self, options: Mapping[str, Scalar | None]) -> bool:
        return self.site == "logits" and options.get(UNLABELED[0].name) == "test"

    def needs_classes(self, options: Mapping[str, Scalar | None]) -> bool:
        """Return whether the method needs the class embeddings with these options."""
        return self.classes or options.get(LABELS.name) == "pseudo" or bool(self.automatic(options))

    def automatic(self, options: Mapping[str, Scalar | None]) -> tuple[Option, ...]:
        """Return the method's options that are set to ``auto``."""
        return tuple(option for option in self.options if option.auto and options.get(option.name) == AUTO)

    def fill(self, given: Mapping[str, Scalar]) -> dict[str, Scalar | None]:
        """Return the value of every option: given, or the default; a given option unsets those that it excludes."""
        unset = {name for key in given for name in self._by_name[key].excludes}
        return {o.name: given.get(o.name, None if o.name in unset else o.default) for o in self.all_options}


def widest(protocols: Iterable[str]) -> str:
    """Return the protocol that sees most data, of several.

    >>> widest(["unlabeled", "image"])
    'unlabeled'
    """
    return max(protocols, key=PROTOCOLS.index)
