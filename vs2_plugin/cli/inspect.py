"""``vs2 inspect``: what steering did to images, latent by latent."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vs2_plugin.cli.common import AGAIN, load_torch
from vs2_plugin.errors import HarnessError, SettingError
from vs2_plugin.inspection.findings import Finding, Inspector
from vs2_plugin.inspection.pictures import read_image
from vs2_plugin.inspection.subject import TOP_IMAGES, WORDS, add_settings, open_subject, positive, say

__all__ = ["add_inspect"]

MARK = "vs2 inspect"

_DESCRIPTION = """\
Show what steering did to images: the classes before and after, the FVU and the gate's decision, and what each active
latent contributed, with the training images that activate it most and the words it is nearest to. For methods
that look up neighbours: the neighbours, too. All in float32; clip_benchmark's default is autocast, so that its numbers
may differ in the last digits."""

_EXAMPLES = """\
examples:
  vs2 inspect --model vs2:ViT-B-32-quickgelu --pretrained openai --dataset cifar100 --dataset_root root photo.jpg
  vs2 inspect --model vs2:ViT-B-32-quickgelu@gate=0.99 --pretrained openai --dataset cifar100 --dataset_root root \\
      photo.jpg other.png --concepts words.txt --out inspect
"""

_ATTRIBUTION = (
    "Logits are 100 x cosine, as in clip_benchmark. Contributions: steering moves the activation x by a w along the "
    "decoder direction w of each active latent (vs2, pass, vs2pp: a = alpha c; amp, rec: a = (gamma - 1) c), then by a "
    "rest. At each point of that way the change of a logit is exactly the sum of the latents' parts, but what comes "
    "after it (LayerNorm, projection, normalisation) is not linear, so that the parts change along the way. Given is "
    "their integral, a <w, gradient of the logit averaged over x + t sum(a w), t from 0 to 1> (integrated gradients): "
    "it sums to the change of the logit up to the remainder. It is not what leaving the latent out would change. Of "
    "several sites, each is looked at with those before it steered and those after it not: their changes add up."
)


def add_inspect(commands: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "inspect",
        help="what steering did to images, latent by latent",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLES}\n{_ATTRIBUTION}\n\n{WORDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    add_settings(command)
    add("--top", type=positive, default=5, help="classes shown, before and after (default: %(default)s)")
    add("--latents", type=positive, default=8, help="latents shown for each image and site (default: %(default)s)")
    add("--out", type=Path, help="folder for a page with pictures (index.html); by default there is none")
    add("--quiet", action="store_true", help="print nothing but errors; needs --out")
    command.set_defaults(run=_inspect, interrupted=AGAIN)


def _inspect(args: argparse.Namespace) -> None:
    if args.quiet and args.out is None:
        raise SettingError("--quiet prints nothing, and without --out nothing is written: give --out FOLDER, or leave "
                           "--quiet away")  # fmt: skip
    load_torch()
    from vs2_plugin.modelstring import parse

    method = parse(args.model).method
    if method.gallery == "images" and method.labels == "oracle":
        raise HarnessError(
            f"{args.model}: this oracle needs the true class of the image, which a file does not tell; expected "
            "another method, for example vs2"
        )
    pictures = [read_image(path) for path in args.images]  # before anything is loaded
    subject = open_subject(args)
    inspector = Inspector(subject, args)
    findings = [
        inspector.look(str(path), picture) for path, picture in zip(args.images, pictures, strict=True)
    ]  # fmt: skip
    if not args.quiet:
        for name, value in subject.title:
            say(f"{name}: {value}")
        for finding in findings:
            say("\n" + "\n".join(_text(finding)))
        for problem in inspector.problems:
            print(f"vs2: {problem}", file=sys.stderr)
    if args.out is not None:
        from vs2_plugin.report.rendering import render, save

        context = {
            "title": subject.title,
            "findings": findings,
            "problems": list(inspector.problems),
            "notes": [_ATTRIBUTION, WORDS],
        }
        for path in save(args.out, {"index.html": render("inspect.html", MARK, context)}, MARK):
            if not args.quiet:
                print(f"wrote {path}")


def _text(finding: Finding) -> list[str]:
    """What is printed of one image."""
    width = max(len(change.name) for change in finding.classes)
    width = min(max(width, 5), 32)
    lines = [finding.path, f"  {'class':<{width}}   before    after  change of the logit"]
    for change in finding.classes:
        name = change.name if len(change.name) <= width else change.name[: width - 3] + "..."
        lines.append(
            f"  {name:<{width}}  {100 * change.before:5.1f} %  {100 * change.after:5.1f} %  {change.change:+19.2f}"
        )
    for at in finding.places:
        lines.append(f"  {at.site}: {at.decision}")
        if at.note:
            lines.append(f"    {at.note}")
            continue
        words = {card.latent: card.words for card in at.cards}
        column = max((len(line.name) for line in at.lines), default=0)
        lines += [
            f"    contributions to the lead of {finding.lead}",
            f"    ({at.shown})",
            f"    {'':<{column}}  activation  contribution  {'nearest words' if any(words.values()) else ''}".rstrip(),
        ]
        for line in at.lines:
            activation = "" if line.activation is None else f"{line.activation:.2f}"
            near = ", ".join(f"{word} {cosine:.2f}" for word, cosine in words.get(line.latent) or [])
            lines.append(f"    {line.name:<{column}}  {activation:>10}  {line.values[0]:>+12.3f}  {near}".rstrip())
    if finding.about_neighbours:
        lines.append(f"  {finding.about_neighbours}")
        shown = finding.neighbours[:TOP_IMAGES]
        lines.append("    " + ", ".join(f"{one.side} {one.label} {one.similarity:.2f}".strip() for one in shown))
    return lines
