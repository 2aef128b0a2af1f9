"""Train the tiny CLIP that the demo uses, from glyphs of the fonts that matplotlib ships.

    python benchmark_configs/strength/train_tiny_clip.py --out tiny-clip

It never sees a handwritten digit: the demo's zero-shot task is a real change of domain, from printed
glyphs to handwriting. The result is a folder that open_clip loads as ``local-dir:tiny-clip``
(``open_clip_config.json`` and ``open_clip_model.safetensors``, half precision).
"""

from __future__ import annotations

import argparse
import json
import math
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange

CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 4, "width": 128, "head_width": 32},
        # A narrow text tower: nearly all its parameters are the token table, 49,408 rows.
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "size": 32,
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
#: (character, the words that name it)
GLYPHS = (
    [(str(i), f"digit {name}") for i, name in enumerate(DIGIT_NAMES)]
    + [(c, f"capital letter {c}") for c in string.ascii_uppercase]
    + [(c, f"small letter {c}") for c in string.ascii_lowercase]
)
TEMPLATES = (
    "a photo of the {}",
    "a picture of the {}",
    "an image of the {}",
    "the {}",
    "a printed {}",
    "a drawing of the {}",
)
#: Text fonts only: the mathematical symbol fonts beside them hold no digits.
FONT_PATTERNS = ("DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf", "cm[brst][10st]*.ttf")
CELL = 64  # glyphs are drawn once at this size; every training image is a random view of one


def draw_glyphs() -> torch.Tensor:
    """Draw every glyph in every font, bright on black: ``[fonts, glyphs, CELL, CELL]`` in [0, 1]."""
    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted({file for pattern in FONT_PATTERNS for file in folder.glob(pattern) if "Display" not in file.name})
    cells = np.zeros((len(files), len(GLYPHS), CELL, CELL), np.float32)
    for f, file in enumerate(files):
        font = ImageFont.truetype(str(file), size=48)
        for g, (char, _) in enumerate(GLYPHS):
            image = Image.new("L", (CELL, CELL))
            left, top, right, bottom = font.getbbox(char)
            origin = ((CELL - (right + left)) / 2, (CELL - (bottom + top)) / 2)
            ImageDraw.Draw(image).text(origin, char, fill=255, font=font)
            cells[f, g] = np.asarray(image, np.float32) / 255
    print(f"{len(files)} fonts x {len(GLYPHS)} glyphs")
    return torch.from_numpy(cells)


def random_views(cells: torch.Tensor) -> torch.Tensor:
    """Return views with random rotation, scale, shear, shift, blur and contrast: ``[batch, CELL, CELL]`` to
    ``[batch, 3, 32, 32]``."""
    n = len(cells)
    uniform = lambda low, high: low + (high - low) * torch.rand(n)  # noqa: E731
    angle, shear, zoom = uniform(-0.26, 0.26), uniform(-0.3, 0.3), uniform(0.55, 1.3)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = zoom * torch.cos(angle), -zoom * torch.sin(angle) + shear
    theta[:, 1, 0], theta[:, 1, 1] = zoom * torch.sin(angle) * uniform(0.8, 1.25), zoom * torch.cos(angle)
    theta[:, :, 2] = torch.stack([uniform(-0.15, 0.15), uniform(-0.15, 0.15)], 1)
    grid = F.affine_grid(theta, [n, 1, 32, 32], align_corners=False)
    images = F.grid_sample(cells[:, None], grid, align_corners=False)
    # One blur width per image: the same kernel in both directions, by grouped convolution.
    sigma = uniform(0.3, 2.0)
    taps = torch.arange(-4, 5)
    kernel = torch.softmax(-(taps**2) / (2 * sigma[:, None] ** 2), dim=1)
    images = F.conv2d(images.transpose(0, 1), kernel[:, None, None, :], padding=(0, 4), groups=n)
    images = F.conv2d(images, kernel[:, None, :, None], padding=(4, 0), groups=n).transpose(0, 1)
    images = images * uniform(0.5, 1.0)[:, None, None, None] / images.amax((1, 2, 3), keepdim=True).clamp_min(0.1)
    images = (images + 0.03 * torch.randn_like(images)).clamp(0, 1)
    return ((images - 0.5) / 0.5).expand(-1, 3, -1, -1)


def train(out: Path, steps: int, batch_size: int, seed: int) -> None:
    """Train the tiny CLIP on views of glyphs, and write its folder for open_clip."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**CONFIG["model_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])
    tokens = torch.stack([tokenizer([t.format(name) for _, name in GLYPHS]) for t in TEMPLATES])
    glyphs = draw_glyphs()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = lambda s: min(1.0, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * s / steps))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    bar = trange(steps, desc="tiny CLIP", unit="step")
    for step in bar:
        font = torch.randint(len(glyphs), (batch_size,))
        label = torch.randint(len(GLYPHS), (batch_size,))
        # One caption per glyph, in a random wording. Several images of a batch share a caption:
        # each image has one right caption, each caption its share of right images.
        template = torch.randint(len(TEMPLATES), (len(GLYPHS),))
        image, text, scale = model(random_views(glyphs[font, label]), tokens[template, torch.arange(len(GLYPHS))])
        logits = scale * image @ text.T
        share = F.one_hot(label, len(GLYPHS)).float()
        share = (share / share.sum(0).clamp_min(1)).T
        loss = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, share)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        if step % 50 == 0:
            accuracy = (logits.argmax(1) == label).float().mean()
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy.item():.3f}")

    # Rows of the token table that no caption uses still have random values: zeros compress better.
    used = torch.zeros(len(model.token_embedding.weight), dtype=torch.bool)
    used[tokens.unique()] = True
    model.token_embedding.weight.data[~used] = 0
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")
    (out / "open_clip_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    print(f"wrote {out} ({sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB)")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny-clip"), help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    train(args.out, args.steps, args.batch_size, args.seed)


if __name__ == "__main__":
    main()
