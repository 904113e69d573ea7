"""Pixels of images and videos: conversion from tensors, arrays and figures, PNG and MP4."""

from __future__ import annotations

import io
import math
import struct
import zlib
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Pixels: TypeAlias = npt.NDArray[np.uint8]

_MAX_PIXELS = 1 << 26
_TOLERANCE = 1e-3  # of values outside of [0, 1], such as after an interpolation


class MediaError(ValueError):
    """Object that can't be reported as the given kind of media."""


def to_image(value: Any) -> Pixels:
    """Return an image as uint8 of shape (H, W, C); a batch becomes a grid.

    >>> to_image(torch.ones(3, 4, 5)).shape
    (4, 5, 3)

    Raises:
        MediaError: the dtype, the shape or a value is wrong.
    """
    pixels = _to_array(value)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim not in (3, 4):
        raise MediaError(
            f"expected an image of shape (H, W), (C, H, W) or (H, W, C), or a batch of images, "
            f"found {tuple(np.shape(value))}"
        )
    pixels = _channels_last(pixels, is_tensor=isinstance(value, torch.Tensor))
    return _grid(pixels) if pixels.ndim == 4 else pixels


def to_frames(value: Any) -> Pixels:
    """Return a video as uint8 of shape (T, H, W, C)."""
    if isinstance(value, list | tuple):
        value = np.stack([to_image(frame) for frame in value])
    pixels = _to_array(value)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4:
        raise MediaError(
            f"expected frames of shape (T, C, H, W) or (T, H, W, C), found {tuple(np.shape(value))}"
        )
    return _channels_last(pixels, is_tensor=isinstance(value, torch.Tensor))


def _to_array(value: Any) -> Pixels:
    """Return pixels as uint8, checked; copies a device tensor to the host."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = (value.float() if value.is_floating_point() else value).cpu()  # a device sync
    try:
        pixels = np.asarray(value)
    except ValueError:
        raise MediaError(
            "expected images of one shape, found several in a list; add each under its own name"
        ) from None
    if pixels.size == 0 or pixels.size > _MAX_PIXELS * 4:
        raise MediaError(f"expected 1 to {_MAX_PIXELS} pixels, found the shape {pixels.shape}")
    if pixels.dtype == np.uint8:
        return pixels.copy()
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(pixels.dtype, np.floating):
        found = pixels.dtype if pixels.dtype.kind in "iuc" else type(value).__name__
        raise MediaError(
            f"expected uint8, bool, or floats from 0 to 1, found {found}; for values from 0 "
            "to 255, pass image.to(torch.uint8)"
        )
    low, high = float(pixels.min()), float(pixels.max())  # NaN if a value is NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise MediaError("expected finite values, found NaN or infinity in the image")
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise MediaError(
            f"expected floats from 0 to 1, found {low:.4g} to {high:.4g}; undo the normalization, "
            "such as by (image - image.min()) / (image.max() - image.min())"
        )
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _channels_last(pixels: Pixels, *, is_tensor: bool) -> Pixels:
    first, last = pixels.shape[-3] in (1, 3, 4), pixels.shape[-1] in (1, 3, 4)
    if not (first or last):
        raise MediaError(
            f"expected 1, 3 or 4 channels, first or last, found the shape {pixels.shape}"
        )
    if first and (is_tensor or not last):
        pixels = np.moveaxis(pixels, -3, -1)
    return np.ascontiguousarray(pixels)


def _grid(images: Pixels) -> Pixels:
    """Return a batch as one image, row by row, with a border of two pixels between images."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    grid = np.zeros((rows * (height + 2) - 2, columns * (width + 2) - 2, channels), np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + 2), number % columns * (width + 2)
        grid[top : top + height, left : left + width] = image
    return grid


def render(figure: Any) -> Pixels:
    """Return the pixels of a matplotlib figure."""
    canvas = getattr(figure, "canvas", None)
    if canvas is None or not hasattr(figure, "savefig"):
        raise MediaError(
            f"expected a matplotlib figure, found {type(figure).__name__}; pass plt.gcf()"
        )
    if not hasattr(canvas, "buffer_rgba"):  # of another backend; mypy may lack matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # type: ignore[import-not-found, unused-ignore]

        canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def png(frames: Pixels, fps: float = 10.0) -> bytes:
    """Encode frames of shape (T, H, W, C) as PNG, animated if there are several.

    Every browser shows an animated PNG; other programs show its first frame.
    """
    count, height, width, channels = frames.shape
    color = {1: 0, 3: 2, 4: 6}[channels]
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0))]
    if count > 1:
        chunks.append(_chunk(b"acTL", struct.pack(">II", count, 0)))
    number = 0  # of the animation's chunks
    for index, frame in enumerate(frames):
        rows = frame.reshape(height, width * channels)
        data = zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes(), 4)  # filter 0: none
        if count > 1:
            delay = round(1000 / fps)
            control = struct.pack(">IIIIIHHBB", number, width, height, 0, 0, delay, 1000, 0, 0)
            chunks.append(_chunk(b"fcTL", control))
            number += 1
        if index == 0:
            chunks.append(_chunk(b"IDAT", data))
        else:
            chunks.append(_chunk(b"fdAT", struct.pack(">I", number) + data))
            number += 1
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks, _chunk(b"IEND", b"")])


def mp4(frames: Pixels, fps: float) -> bytes | None:
    """Encode frames of shape (T, H, W, C) as H.264 in MP4, which every browser plays.

    None without PyAV, or with a PyAV that lacks the encoder. Transparency is dropped.
    """
    try:
        import av
    except ImportError:
        return None
    if "libx264" not in av.codecs_available:
        return None
    _, height, width, channels = frames.shape
    # Chroma has half the resolution: both sizes must be even.
    frames = np.pad(frames, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], "edge")
    frames = np.repeat(frames, 3, axis=-1) if channels == 1 else frames[..., :3]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        rate = max(Fraction(fps).limit_denominator(1000), Fraction(1, 1000))
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = (
            width + width % 2,
            height + height % 2,
            "yuv420p",
        )
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
