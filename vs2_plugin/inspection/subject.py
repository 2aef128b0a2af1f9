"""What ``vs2 inspect`` and ``vs2 latents`` share: their settings, the steered model with its words, the latents."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vs2_plugin.errors import DataError
from vs2_plugin.text import reason_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vs2_plugin.clip.sites import Site
    from vs2_plugin.gallery.gallery import Gallery
    from vs2_plugin.harness.model import SteeredCLIP
    from vs2_plugin.inspection.latents import LatentStatistics
    from vs2_plugin.sae.topk import TopKSAE

__all__ = [
    "NO_WORDS",
    "TOP_IMAGES",
    "WORDS",
    "Subject",
    "add_settings",
    "open_subject",
    "positive",
    "say",
    "scan_gallery",
    "words_of",
]

#: Top-activating images of each latent.
TOP_IMAGES = 10
#: How the nearest words are found, for the reader.
WORDS = (
    "Nearest words: the largest cos(e(mu + t w) - e(mu), text - mean text). w is the latent's decoder direction, mu "
    "the mean activation of the training images, t the latent's mean activation where it is active (without a gallery: "
    "its activation in the image), e the rest of the tower (its embedding, not normalised). The mean text is "
    "that of the words offered: a word can only be nearer than others that are offered, and one of them always is the "
    "nearest, so look at the cosine."
)
#: Why there may be none.
NO_WORDS = "Nearest words are shown at the tower's end only: what comes after an earlier block depends on the image."
_PROMPT = "a photo of a {c}"


def say(text: str) -> None:
    """Print, also where a class has a name that the terminal cannot write."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding))


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add the settings that both commands have, by clip_benchmark's names and with its defaults."""
    add = command.add_argument
    add("--model", required=True, metavar="MODEL", help="model string: method:backbone[@checkpoint][@key=value]...")
    add("--pretrained", default="laion400m_e32", help="open_clip's weights tag or file (default: %(default)s)")
    add("--dataset", required=True, help="the data set whose classes and checkpoint are meant; wds/NAME for shards")
    add("--dataset_root", default="root", help="its folder; {dataset} is filled in (default: %(default)s)")
    add("--classes", type=Path, metavar="FILE", help="class names, one per line, in place of the data set's")
    add("--concepts", type=Path, metavar="FILE", help="words to compare latents with, one per line (default: classes)")
    add("--model_cache_dir", help="where downloaded models are kept")
    add("--wds_cache_dir", help="where downloaded shards are kept")


@dataclass(frozen=True)
class Subject:
    """A steered model, bound to a data set, and the words to speak of it with."""

    model: SteeredCLIP
    transform: Any
    device: str
    classes: list[str]
    prompts: str
    """The prompts of the classes, in words."""
    class_texts: Tensor
    """``[classes, e]``: float32, unit norm."""
    words: list[str]
    word_texts: Tensor
    """``[words, e]``."""

    @property
    def title(self) -> list[tuple[str, str]]:
        """What is looked at: names and values."""
        spec, checkpoint = self.model.spec, self.model.checkpoint
        found = [("model", str(spec))]
        if checkpoint is not None:
            data = " ".join(checkpoint.data.datasets)
            found += [("weights", checkpoint.pretrained)] if checkpoint.pretrained else []
            found.append(("checkpoint", f"{checkpoint.name}, trained on {data}"))
        labels = self.model.vs2_facts()["vs2_labels"]
        found += [("labels used", "none" if labels == "none" else f"{labels} labels")]
        found.append(("classes", f"{len(self.classes)}, by {self.prompts}"))
        if self.words is not self.classes:
            found.append(("concepts", f"{len(self.words)}, by the prompt {_PROMPT!r}"))
        return found


def open_subject(args: argparse.Namespace) -> Subject:
    """Load what the command line names.

    Raises:
        Vs2Error: what is wrong, and what mends it.
    """
    import torch

    from vs2_plugin.harness.loader import load
    from vs2_plugin.inspection.words import text_embeddings
    from vs2_plugin.steering.context import Task

    concepts = _read_words(args.concepts, "--concepts") if args.concepts else None
    classes, prompts = (_read_words(args.classes, "--classes"), [_PROMPT]) if args.classes else _of_data_set(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)  # random weights: as clip_benchmark has them
    model, transform, tokenizer = load(args.model, args.pretrained, args.model_cache_dir, device)
    model.bind(Task(args.dataset, args.dataset_root, "test", classes, prompts))
    class_texts = text_embeddings(model.model, tokenizer, classes, prompts)
    model.set_classifier(class_texts.T)
    word_texts = class_texts if concepts is None else text_embeddings(model.model, tokenizer, concepts, [_PROMPT])
    said = f"the prompt {prompts[0]!r}" if len(prompts) == 1 else f"{len(prompts)} prompts"
    said = "prompts of their own" if isinstance(prompts, dict) else said
    return Subject(model, transform, device, classes, said, class_texts, concepts or classes, word_texts)


def _read_words(path: Path, flag: str) -> list[str]:
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"cannot read {flag} {str(path)!r}: {error.strerror}; expected one word per line") from None
    except UnicodeDecodeError:
        raise DataError(f"{flag} {str(path)!r} is no text in UTF-8; expected one word per line") from None
    if len(set(words)) < 2:
        raise DataError(f"{flag} {str(path)!r} holds {len(set(words))} word(s); expected at least two, one per line")
    return words


def _of_data_set(args: argparse.Namespace) -> tuple[list[str], Any]:
    """Class names and prompts as clip_benchmark has them for the test split."""
    import inspect

    from clip_benchmark.datasets.builder import build_dataset

    name = args.dataset.removeprefix("wds/")
    build = inspect.unwrap(build_dataset)  # without the binding of steered models that the harness glue adds
    hint = "or name the classes with --classes FILE"
    try:
        root = args.dataset_root.format(dataset=name, dataset_cleaned=name.replace("/", "-"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an order of shards, which are not read here
            found = build(
                dataset_name=args.dataset, root=root, split="test", download=True, wds_cache_dir=args.wds_cache_dir
            )
    except (Exception, SystemExit) as error:  # a download, a missing file or package: anything
        raise DataError(
            f"clip_benchmark could not build {args.dataset!r} in {args.dataset_root!r}, which tells the class names "
            f"({reason_of(error)}); put the data there, {hint}"
        ) from error
    classes, prompts = getattr(found, "classes", None), getattr(found, "templates", None)
    if not classes or len(classes) < 2 or not prompts:
        raise DataError(f"{args.dataset} has no class names and prompts; expected a classification data set, {hint}")
    return list(classes), prompts


def scan_gallery(subject: Subject, gallery: Gallery, hookpoint: str, sae: TopKSAE, quiet: bool) -> LatentStatistics:
    """What the latents do on the gallery, at one site."""
    from tqdm import tqdm

    from vs2_plugin.gallery.gallery import CLIP
    from vs2_plugin.inspection.latents import scan

    with tqdm(total=len(gallery), desc="latents", unit="img", disable=quiet or None, leave=False) as bar:
        return scan(
            sae, gallery.activations[hookpoint], gallery.embeddings[CLIP], subject.class_texts.T, TOP_IMAGES, bar.update
        )


def words_of(
    subject: Subject, site: Site, sae: TopKSAE, mean: Tensor, latents: np.ndarray, amounts: np.ndarray, top: int
) -> list[list[tuple[str, float]]] | None:
    """The nearest words of some latents and their cosines; None at a site in the middle of the tower.

    ``amounts``: a usual activation of each; a latent without one has no words.
    """
    import torch

    from vs2_plugin.inspection.words import latent_embeddings, nearest

    model = subject.model.model
    if not subject.model.sites.at_end(site):
        return None
    scale = torch.as_tensor(amounts, dtype=torch.float32, device=mean.device)
    steps = scale[:, None] * sae.W_dec[torch.as_tensor(latents, device=mean.device)].detach()
    cosines, indices = nearest(latent_embeddings(model, site, mean, steps), subject.word_texts, top)
    return [
        [(subject.words[index], value) for value, index in zip(*row, strict=True)] if amount else []
        for amount, *row in zip(amounts, cosines.tolist(), indices.tolist(), strict=True)
    ]
