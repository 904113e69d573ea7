"""Camera videos: encoding, joining without encoding again, and lazy decoding of exact frames."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robo_orchard_core.utils.config.errors import shorten
from robo_orchard_lab.data.lerobot.format import LeRobotDatasetError, require

CODECS = ("libsvtav1", "h264", "hevc")
PIXEL_FORMAT = "yuv420p"
# As in lerobot: a key frame every second frame makes random access cheap.
_ENCODER_OPTIONS = {"g": "2", "crf": "30"}
_MAX_OPEN_FILES = 16
_JPEG_START = b"\xff\xd8"
_inherited: list[Any] = []  # decoders of a parent process, which a child must not close


def _av(purpose: str = "camera videos") -> Any:
    return require("av", purpose)


class VideoEncoder:
    """Encoder of one episode of one camera, as an MP4 file.

    Args:
        path: File to create.
        fps: Frames per second.
        codec: One of `CODECS`.
        size: Height and width in pixels.
    """

    def __init__(self, path: Path, fps: float, codec: str, size: tuple[int, int]) -> None:
        options = dict(_ENCODER_OPTIONS)
        if codec == "libsvtav1":
            options["preset"] = "12"
            os.environ.setdefault("SVT_LOG", "1")  # errors only; it prints 20 lines per video
        self.frames = 0
        self._container = _av().open(str(path), "w", format="mp4")
        rate = Fraction(fps).limit_denominator(10_000)
        self._stream = self._container.add_stream(codec, rate, options=options)
        self._stream.pix_fmt = PIXEL_FORMAT
        self._stream.height, self._stream.width = size

    def add(self, image: NDArray[np.uint8]) -> None:
        """Encode an image of shape (H, W, 3)."""
        frame = _av().VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def close(self, *, discard: bool = False) -> None:
        """Finish the file; with ``discard``, only close it."""
        if not discard:
            self._container.mux(self._stream.encode(None))
        self._container.close()


def join_videos(parts: Sequence[tuple[Path, int]], path: Path, fps: float) -> None:
    """Write the videos ``(file, frames)``, of equal encoding, one after another into one file."""
    av = _av()
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as output:
        stream: Any = None
        done, last_dts = 0, -(2**62)
        for part, frames in parts:
            with av.open(str(part)) as source:
                own = source.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(own, opaque=True)
                    stream.time_base = own.time_base
                shift = round(
                    Fraction(done) / Fraction(fps).limit_denominator(10_000) / own.time_base
                )
                for packet in source.demux(own):
                    if packet.dts is None:  # the end
                        continue
                    packet.pts += shift
                    # A part of one frame has no delay, so that the next part would begin too early.
                    packet.dts = last_dts = max(packet.dts + shift, last_dts + 1)
                    packet.stream = stream
                    output.mux(packet)
            done += frames


def video_info(path: Path, fps: float) -> dict[str, Any]:
    """Return the description of a video, as ``info`` of its feature."""
    with _av().open(str(path)) as container:
        stream = container.streams.video[0]
        return {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        }


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode an image of shape (H, W, 3)."""
    av = _av("camera images")
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt = "rgb24"
    encoder.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def decode_image(data: bytes) -> torch.Tensor:
    """Decode a PNG or JPEG file to a tensor of shape (3, H, W), uint8."""
    av = _av("camera images")
    codec = "mjpeg" if data.startswith(_JPEG_START) else "png"
    try:
        decoder = av.CodecContext.create(codec, "r")
        frames = [*decoder.decode(av.Packet(data)), *decoder.decode(None)]
    except av.FFmpegError as error:
        raise LeRobotDatasetError(f"expected a PNG or JPEG image: {error}") from error
    if not frames:
        raise LeRobotDatasetError("expected a PNG or JPEG image, found an incomplete one")
    return _as_tensor(frames[0], av.video.reformatter.VideoReformatter())


def _as_tensor(frame: Any, reformatter: Any) -> torch.Tensor:
    """Return a decoded frame as a tensor of shape (3, H, W); a reformatter caches its set-up."""
    rgb = reformatter.reformat(frame, format="rgb24")
    return torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1).contiguous()


class _OpenVideo:
    """Decoder of one file, which remembers its position.

    Decoding continues instead of seeking if the target is not farther than the key frame before it
    may be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        av = _av()
        try:
            self._container = av.open(str(path))
            if not self._container.streams.video:
                raise LeRobotDatasetError(f"{path}: expected a video, found none")
        except (av.FFmpegError, OSError) as error:
            raise LeRobotDatasetError(
                f"{path}: expected a video: {shorten(str(error), 120)}; the file is missing or "
                "truncated"
            ) from error
        stream = self._container.streams.video[0]
        stream.thread_count = 1  # workers are parallel; a decoder with threads can't be forked
        self._stream = stream
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._time_base = float(stream.time_base)
        self.size = (stream.height, stream.width)
        self._frames: Any = None
        self._current: Any = None
        self._key_seconds = 0.0
        self._reach = 0.0
        """Longest distance seen from a key frame, in seconds."""

    def image(self, seconds: float, tolerance: float) -> torch.Tensor | None:
        """Return the frame within ``tolerance`` of ``seconds``, or None if there is none."""
        av = _av()
        try:
            at = self._position()
            if at is None or not 0 <= seconds - at + tolerance <= self._reach + 2 * tolerance:
                self._seek(seconds, tolerance)
            while (at := self._position()) is not None and at < seconds - tolerance:
                self._next()
        except (av.FFmpegError, OSError) as error:
            self._current = self._frames = None
            raise LeRobotDatasetError(
                f"{self.path}: can't decode the frame at {seconds:.4f} s: "
                f"{shorten(str(error), 120)}; the video is damaged"
            ) from error
        if at is None or abs(at - seconds) > tolerance:
            return None
        return _as_tensor(self._current, self._reformatter)

    def _position(self) -> float | None:
        return None if self._current is None else self._current.pts * self._time_base

    def _seek(self, seconds: float, tolerance: float) -> None:
        for start in (seconds, seconds - 1.0, 0.0):  # frames out of order may begin too late
            target = max(0, int(start / self._time_base))
            self._container.seek(target, stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
            self._next()
            at = self._position()
            if at is not None and at <= seconds + tolerance:
                return

    def _next(self) -> None:
        self._current = next(self._frames, None)
        if (at := self._position()) is None:
            return
        if self._current.key_frame:
            self._key_seconds = at
        self._reach = max(self._reach, at - self._key_seconds)

    def close(self) -> None:
        self._frames = self._current = None
        self._container.close()


class VideoFrames:
    """Decoded frames of video files, with at most 16 open files and a bounded cache.

    Each process has decoders and a cache of its own, also after a fork; pickling drops both.

    Args:
        cache_mb: Largest size of the cached frames, in MiB; 0 disables the cache.
        tolerance_s: Largest distance between a requested time and its frame, in seconds.
    """

    def __init__(self, cache_mb: float, tolerance_s: float) -> None:
        self.cache_bytes = int(cache_mb * 2**20)
        self.tolerance_s = tolerance_s
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _OpenVideo] = OrderedDict()
        self._cache: OrderedDict[tuple[Path, float], torch.Tensor] = OrderedDict()
        self._cached_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"cache_bytes": self.cache_bytes, "tolerance_s": self.tolerance_s}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def read(
        self, path: Path, seconds: Iterable[float], size: tuple[int, int]
    ) -> dict[float, torch.Tensor]:
        """Return the frames at distinct times in seconds, of shape (3, H, W), uint8.

        Frames are decoded in order, so that a key frame is decoded once.

        Raises:
            LeRobotDatasetError: the file is damaged, has frames of another size, or no frame
                within the tolerance of a time.
        """
        if self._process != os.getpid():
            _inherited.append(self._open)
            self._reset()
        with self._lock:
            return {at: self._frame(path, at, size) for at in sorted(set(seconds))}

    def _frame(self, path: Path, seconds: float, size: tuple[int, int]) -> torch.Tensor:
        key = (path, seconds)
        if (cached := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            return cached
        video = self._video(path, size)
        image = video.image(seconds, self.tolerance_s + float(np.spacing(np.float32(seconds))))
        if image is None:
            raise LeRobotDatasetError(
                f"{path}: expected a frame at {seconds:.4f} s (+-{self.tolerance_s} s), found "
                "none; the video is shorter than its episodes, or frames were dropped"
            )
        if image.shape[1:] != size:
            raise LeRobotDatasetError(_other_size(path, size, (image.shape[1], image.shape[2])))
        if image.nbytes <= self.cache_bytes:
            self._cache[key] = image
            self._cached_bytes += image.nbytes
            while self._cached_bytes > self.cache_bytes:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return image

    def _video(self, path: Path, size: tuple[int, int]) -> _OpenVideo:
        video = self._open.get(path)
        if video is None:
            video = _OpenVideo(path)
            if video.size != size:
                video.close()
                raise LeRobotDatasetError(_other_size(path, size, video.size))
            self._open[path] = video
            if len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return video


def _other_size(path: Path, expected: tuple[int, int], found: tuple[int, int]) -> str:
    return (
        f"{path}: expected frames of {expected[0]} x {expected[1]} pixels (height x width) as in "
        f"info.json, found {found[0]} x {found[1]}"
    )
