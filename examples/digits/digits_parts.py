"""Data of the digits example: images of handwritten digits."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

DIGITS, SIZE = 10, 32  # number of digits; height and width of an image in pixels


class Digits(Dataset[tuple[torch.Tensor, int]]):
    """Digit images as float tensors of shape (3, 32, 32) centred at 0, with their digits.

    Args:
        folder: Folder of the images; if missing, scikit-learn's 1797 digits are written there.
        train: True for training images, randomly rotated and shifted; False for validation
            images.
        random_images: Number of random images to return instead, for a test run.
    """

    def __init__(
        self,
        folder: str = "workspace/digits/images",
        train: bool = True,
        random_images: int | None = None,
    ) -> None:
        tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
        varied = [v2.RandomAffine(degrees=10, translate=(0.1, 0.1), scale=(0.9, 1.1))]
        transform = v2.Compose([*varied, *tensor] if train else tensor)
        if random_images is not None:
            offset = 0 if train else 1_000_000
            shape = (3, SIZE, SIZE)
            self._images = FakeData(random_images, shape, DIGITS, transform, random_offset=offset)
            return
        if not Path(folder).exists():
            write_digits(Path(folder))
        self._images = ImageFolder(str(Path(folder, "train" if train else "val")), transform)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, digit = self._images[index]
        return image, int(digit)


def write_digits(folder: Path) -> None:
    """Write scikit-learn's 1797 digits as ``train/<digit>/*.png`` and ``val/<digit>/*.png``."""
    digits = load_digits()  # 8x8 pixels of 0 to 16
    train_ids, val_ids = train_test_split(
        range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        for split, ids in (("train", train_ids), ("val", val_ids)):
            for index in ids:
                file = Path(draft, "images", split, str(digits.target[index]), f"{index:04}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = (digits.images[index] * (255 / 16)).round().astype("uint8")
                image = PILImage.fromarray(pixels).convert("RGB")
                image.resize((SIZE, SIZE), PILImage.Resampling.BILINEAR).save(file)
        Path(draft, "images").rename(folder)  # complete from here on
