"""Images, videos, text, tables and hyperparameters in the run folder and in TensorBoard."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # TensorBoard has no types
    EventAccumulator,
)

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hooks import LogImagesConfig, MetricsLoggerConfig
from robo_orchard_lab.pipeline.media import Media, Report, Table, encode, read_index
from robo_orchard_lab.pipeline.pixels import MediaError, mp4, png, to_image
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.sinks import TrackerSink, TrackerSinkConfig
from robo_orchard_lab.testing import assert_weights_unchanged, run_hook
from tiny import equal, make_loader, make_trainer, weights

RED = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)  # one row: red, blue


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (np.zeros((5, 7), np.uint8), (5, 7, 1)),
        (np.zeros((5, 7, 3), np.uint8), (5, 7, 3)),
        (np.zeros((4, 5, 7), np.uint8), (5, 7, 4)),
        (torch.zeros(3, 5, 7), (5, 7, 3)),
        (torch.zeros(5, 7, 3), (5, 7, 3)),
        (torch.zeros(3, 5, 3), (5, 3, 3)),  # both orders fit
        (np.zeros((3, 5, 3), np.uint8), (3, 5, 3)),
        (torch.zeros(5, 7, dtype=torch.bool), (5, 7, 1)),
        (torch.zeros(1, 5, 7, dtype=torch.bfloat16, requires_grad=True), (5, 7, 1)),
        (torch.zeros(5, 3, 4, 6), (2 * 6 - 2, 3 * 8 - 2, 3)),  # a grid of two rows
        (Image.new("RGB", (7, 5)), (5, 7, 3)),
    ],
)
def test_images_of_each_layout_are_accepted(value: Any, shape: tuple[int, ...]) -> None:
    """Channels may be first or last, in tensors, arrays and PIL images; a batch is a grid."""
    assert to_image(value).shape == shape
    assert to_image(value).dtype == np.uint8


def test_values_are_scaled_and_copied() -> None:
    """Floats from 0 to 1 become 0 to 255, True becomes 255, and later changes have no effect."""
    image = torch.tensor([[0.0, 0.5], [1.0005, -0.0005]])
    assert to_image(image)[..., 0].tolist() == [[0, 128], [255, 0]]
    assert to_image(image > 0.4)[..., 0].tolist() == [[0, 255], [255, 0]]
    pixels = RED.copy()
    converted = to_image(pixels)
    pixels[:] = 7
    assert converted.tolist() == RED.tolist()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4), "expected an image of shape"),
        (torch.zeros(2, 3, 4, 5, 6), "expected an image of shape"),
        (torch.zeros(5, 6, 7), r"expected 1, 3 or 4 channels, first or last, found the shape"),
        (torch.zeros(3, 0, 4), "pixels, found the shape"),
        (torch.full((3, 4, 5), torch.nan), "found NaN or infinity"),
        (torch.full((3, 4, 5), torch.inf), "found NaN or infinity"),
        (torch.full((3, 4, 5), 255.0), "expected floats from 0 to 1, found 255 to 255"),
        (torch.full((3, 4, 5), -0.5), "undo the normalization"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), r"found int64; .* image.to\(torch.uint8\)"),
        ("cat.png", "expected uint8, bool, or floats from 0 to 1, found str"),
        (None, "expected uint8, bool, or floats from 0 to 1, found NoneType"),
        ([RED, RED[:, :1]], "expected images of one shape"),
    ],
)
def test_other_objects_are_refused(value: Any, message: str) -> None:
    """The error has the expectation, the finding and the remedy."""
    with pytest.raises(MediaError, match=message):
        to_image(value)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_decodes_to_the_pixels(channels: int) -> None:
    """Another decoder reads the same pixels; several frames are an animation."""
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 7, channels), np.uint8)
    image = Image.open(io.BytesIO(png(frames[:1])))
    assert np.asarray(image).reshape(5, 7, channels).tolist() == frames[0].tolist()
    video = Image.open(io.BytesIO(png(frames, fps=4)))
    assert video.n_frames == 3  # type: ignore[attr-defined]  # of an animated image
    for index in range(3):
        video.seek(index)
        shown = np.asarray(video.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
        if channels != 4:  # transparent pixels are blended
            assert shown.reshape(5, 7, channels).tolist() == frames[index].tolist()
    assert video.info["duration"] == 250


class Reporter(PipelineHooks):
    """Hook that reports one of each kind every two steps."""

    def __init__(self, with_tracker: bool = False) -> None:
        super().__init__()
        self.on_step.after(when="2 steps")(self.report)
        self.with_tracker, self.trackers = with_tracker, list[Any]()

    def report(self, args: PipelineHookArgs) -> None:
        report, step = args.report, args.global_step_id
        pixels = np.full((6, 8, 3), 40 * step, np.uint8)
        report.add_image("samples/train", pixels, caption=f"step {step}")
        report.add_video("rollout", np.stack([pixels, pixels + 1]), fps=5)
        report.add_text("notes", f"**step** {step}")
        report.add_table("confusion", [{"label": "a|b", "hits": torch.tensor(step)}])
        if self.with_tracker:
            self.trackers.append(report.tracker("tensorboard").tracker)


def train(folder: Path, hooks: Any = (), tensorboard: bool = True, **options: Any) -> Any:
    sinks: list[Any] = (
        [TrackerSinkConfig(trackers=["tensorboard"], folder=str(folder))] if tensorboard else []
    )
    trainer = make_trainer(
        [MetricsLoggerConfig(every="2 steps", sinks=sinks), *hooks],
        loader=make_loader(6),
        run_folder=folder,
        max_epoch=1,
        **options,
    )
    trainer()
    return trainer


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 1, 1), (3, 48, 65), (4, 17, 32)])
def test_frames_are_encoded_as_a_video_of_every_size(
    channels: int, height: int, width: int
) -> None:
    """An MP4 has all frames, at their rate and in their colors, with even sizes."""
    av = pytest.importorskip("av")
    shades = np.array([40, 120, 200], np.uint8).reshape(3, 1, 1, 1)
    frames = np.broadcast_to(shades, (3, height, width, channels))
    data = mp4(frames, fps=12.5)
    assert data is not None
    with av.open(io.BytesIO(data)) as video:
        [stream] = video.streams
        found = [frame.to_ndarray(format="rgb24") for frame in video.decode(stream)]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", Fraction(25, 2))
    assert np.stack(found).shape == (3, height + height % 2, width + width % 2, 3)
    for image, shade in zip(found, (40, 120, 200), strict=True):
        assert abs(int(image.mean()) - shade) < 5


def test_a_video_without_an_encoder_is_an_animated_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without PyAV, the frames are in an animated PNG; with it, in an MP4."""
    media = Media("video", "rollout", 3, np.zeros((4, 8, 8, 3), np.uint8), fps=5)
    if importlib.util.find_spec("av"):
        assert encode(media)[1][4:8] == b"ftyp"
    monkeypatch.setitem(sys.modules, "av", None)
    suffix, data = encode(media)
    shown = Image.open(io.BytesIO(data))
    assert (suffix, shown.n_frames) == ("png", 4)  # type: ignore[attr-defined]  # of an animated image


def test_media_are_in_tensorboard_and_in_the_run_folder(tmp_path: Path) -> None:
    """TensorBoard's reader finds images and text; the folder has files and an index."""
    train(tmp_path, [hook := Reporter(with_tracker=True)])
    events = read_events(tmp_path / "training")
    images = events.Images("samples/train")
    assert [image.step for image in images] == [2, 4, 6]
    shown = np.asarray(Image.open(io.BytesIO(images[1].encoded_image_string)))
    assert shown.shape == (6, 8, 3)
    assert (shown == 120).all()
    assert len(events.Images("rollout")) == 3
    texts = [t.tensor_proto.string_val[0].decode() for t in events.Tensors("notes/text_summary")]
    assert texts == ["**step** 1", "**step** 3", "**step** 5"]
    table = events.Tensors("confusion/text_summary")[0].tensor_proto.string_val[0].decode()
    assert table == "| label | hits |\n| --- | --- |\n| a\\|b | 1 |"
    assert len(hook.trackers) == 3
    assert all(hasattr(tracker, "add_histogram") for tracker in hook.trackers)

    index = read_index(tmp_path / "media/index.jsonl")
    assert [(e["kind"], e["step"]) for e in index] == [
        (kind, step) for step in (2, 4, 6) for kind in ("image", "video", "text", "table")
    ]
    first = index[0]
    assert first["caption"] == "step 1"
    assert first["file"] == "samples/train/00000002.png"
    decoded = np.asarray(Image.open(tmp_path / "media" / first["file"]))
    assert (decoded == 40).all()
    assert index[1]["fps"] == 5
    assert (tmp_path / "media/confusion/00000004.csv").read_text() == "label,hits\na|b,3\n"
    assert (tmp_path / "media/notes/00000006.md").read_text() == "**step** 5"


def test_a_resumed_run_has_no_media_twice(tmp_path: Path) -> None:
    """Records after the resumed step leave the index; the end equals an uninterrupted run."""
    whole, stopped, saved = tmp_path / "whole", tmp_path / "stopped", tmp_path / "at 3"
    train(whole, [Reporter()], tensorboard=False)

    def run(
        max_step: int, resume_from: Path | None = None, *, reports: bool = True
    ) -> HookBasedTrainer:
        loader, hooks = make_loader(6), [Reporter()] if reports else []
        options: dict[str, Any] = {"max_step": max_step, "resume_from": resume_from}
        trainer = make_trainer(hooks, loader=loader, run_folder=stopped, **options)
        trainer()
        return trainer

    run(3).save_checkpoint(saved)
    run(5, saved)  # steps 4 and 5, which the next resume discards
    with (stopped / "media/index.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "kind": "im')  # torn
    run(4, saved, reports=False)
    assert [entry["step"] for entry in read_index(stopped / "media/index.jsonl")] == [2] * 4
    run(6, saved)
    lines = (stopped / "media/index.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2] * 4 + [4] * 4 + [6] * 4
    assert read_index(stopped / "media/index.jsonl") == read_index(whole / "media/index.jsonl")


def test_a_new_run_moves_earlier_media_aside(tmp_path: Path) -> None:
    """A new run in the folder of another one keeps the other one's media under another name."""
    for _ in range(3):
        train(tmp_path, [Reporter()])
    assert len(read_index(tmp_path / "media/index.jsonl")) == 12
    for number in (1, 2):
        assert len(read_index(tmp_path / f"media.aside-{number}/index.jsonl")) == 12


def test_bad_media_are_reported_once_and_training_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong image, name, table or text is one line in the log; the run and others continue."""
    hooks = PipelineHooks("bad")

    @hooks.on_step.after
    def report(args: PipelineHookArgs) -> None:
        args.report.add_image("nan", torch.full((3, 4, 4), torch.nan))
        args.report.add_image("../up", RED)
        args.report.add_table("table", [[1, 2]], columns=["one"])
        args.report.add_text("text", 5)  # type: ignore[arg-type]  # on purpose
        args.report.add_figure("figure", RED)
        args.report.add_video("video", torch.zeros(2, 4, 4, 3), fps=0)
        args.report.add_text("half a pair", "\ud800")
        args.report.add_image("good", RED)

    with caplog.at_level(logging.ERROR):
        trainer = train(tmp_path, [hooks], tensorboard=False)
    assert trainer.progress.global_step_id == 6
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 7
    assert "UnicodeEncodeError" in messages[6]
    assert "'nan' at step 1 is dropped, and the training continues" in messages[0]
    assert "expected 1 values in each row, found 2" in messages[2]
    assert [entry["name"] for entry in read_index(tmp_path / "media/index.jsonl")] == ["good"] * 6


def test_arguments_of_another_type_are_dropped_with_the_expected_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty name writes nothing outside of the folder; swapped arguments show their type."""
    hooks = PipelineHooks("bad")

    @hooks.on_step.after(when="first")
    def report(args: PipelineHookArgs) -> None:
        args.report.add_image("", RED)
        args.report.add_image(torch.zeros(3, 4, 4), "name")  # type: ignore[arg-type]  # on purpose
        args.report.add_video("video", torch.zeros(2, 4, 4, 3), fps="a")  # type: ignore[arg-type]  # on purpose
        args.report.add_hyperparameters("lr=1")  # type: ignore[arg-type]  # on purpose

    with caplog.at_level(logging.ERROR):
        train(tmp_path, [hooks], tensorboard=False)
    empty, swapped, fps, values = [record.getMessage() for record in caplog.records]
    assert "found '', which is empty; further" in empty
    assert "report of 'Tensor' at step 1" in swapped
    assert "found a value of Tensor; further" in swapped
    assert "expected 0 < fps < 1000, found 'a'" in fps
    assert "expected a mapping by name, found str" in values
    assert read_index(tmp_path / "media/index.jsonl") == []


def test_files_that_cannot_be_written_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a place for files, trackers still get the media, and the run continues."""
    (tmp_path / "media").write_text("not a folder")
    with caplog.at_level(logging.ERROR):
        train(tmp_path, [Reporter()])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "the run continues: NotADirectoryError" in message
    assert len(read_events(tmp_path / "training").Images("samples/train")) == 3


class TextTracker(GeneralTracker):  # type: ignore[misc]  # accelerate ships no type information
    """Tracker without a method for images."""

    name = "text"
    requires_logging_directory = False
    tracker = None

    def start(self) -> None: ...
    def store_init_configuration(self, values: Any) -> None: ...
    def log(self, values: Any, step: int | None = None, **kwargs: Any) -> None: ...
    def finish(self) -> None: ...


def test_trackers_without_images_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log states which tracker can't show images, and where they are."""
    hooks = PipelineHooks("images")
    hooks.on_step.after(lambda args: args.report.add_image("a", RED))
    with caplog.at_level(logging.ERROR):
        make_trainer(
            [MetricsLoggerConfig()(sinks={"mine": TrackerSink([TextTracker()])}), hooks],
            run_folder=tmp_path,
            max_epoch=1,
        )()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "continues: Accelerate's tracker text has no method for images" in messages[0]
    assert len(read_index(tmp_path / "media/index.jsonl")) == 7


class ImageTracker(TextTracker):
    """Tracker with Accelerate's methods for images and tables."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, int | None]] = []

    def log(self, values: Any, step: int | None = None, **kwargs: Any) -> None:
        self.steps.append(("log", step))

    def log_images(self, values: Any, step: int | None = None) -> None:
        ((name, images),) = values.items()
        if name == "broken":
            raise RuntimeError("no room")
        self.steps.append((f"{name} {images[0].shape}", step))

    def log_table(self, name: str, columns: Any, data: Any, step: int | None = None) -> None:
        self.steps.append((f"{name} {columns} {data}", step))


def test_other_trackers_get_media_in_the_order_of_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Media wait for the metrics of earlier steps; a failing image keeps the metrics."""
    hooks = PipelineHooks("images")

    @hooks.on_step.after(when="at steps 2, 5")
    def report(args: PipelineHookArgs) -> None:
        args.metrics.publish("value", args.global_step_id)
        args.report.add_image("gray", np.zeros((2, 3), np.uint8))
        args.report.add_image("broken", RED)
        args.report.add_table("t", [[1]], columns=["a"])

    tracker = ImageTracker()
    with caplog.at_level(logging.ERROR):
        make_trainer(
            [MetricsLoggerConfig(every="3 steps")(sinks={"mine": TrackerSink([tracker])}), hooks],
            run_folder=tmp_path,
            max_step=6,
        )()
    media = [
        ("gray (2, 3, 3)", 2),
        ("t ['a'] [[1]]", 2),
        ("gray (2, 3, 3)", 5),
        ("t ['a'] [[1]]", 5),
    ]
    assert [step for step in tracker.steps if step[0] != "log"] == media
    steps = [step or 0 for _, step in tracker.steps]
    assert steps == sorted(steps)
    assert ("log", 2) in tracker.steps
    assert len(caplog.records) == 1
    assert "continues: RuntimeError: no room" in caplog.text


def test_unknown_tracker_is_an_error_with_the_known_ones(tmp_path: Path) -> None:
    """``tracker(name)`` of a name without a live tracker lists the live ones."""
    hooks = PipelineHooks("asks")
    hooks.on_step.after(lambda args: args.report.tracker("tensorbord"))
    with pytest.raises(PipelineConfigError, match="did you mean 'tensorboard'"):
        train(tmp_path, [hooks])
    assert Report(TrainerProgress(), None, rank=1).tracker("any") is None


def test_media_of_the_loops_begin_reach_later_sinks(tmp_path: Path) -> None:
    """A hook before the MetricsLogger may report in its ``before`` of ``on_loop``."""
    hooks = PipelineHooks("early")
    hooks.on_loop.before(lambda args: args.report.add_text("start", "hello"))
    hooks.on_loop.before(lambda args: args.report.add_hyperparameters({"lr": 0.1, "m": {"n": 3}}))
    make_trainer(
        [
            hooks,
            MetricsLoggerConfig(
                sinks=[TrackerSinkConfig(trackers=["tensorboard"], folder=str(tmp_path))]
            ),
        ],
        run_folder=tmp_path,
        max_epoch=1,
    )()
    assert len(read_events(tmp_path / "training").Tensors("start/text_summary")) == 1
    (found,) = tmp_path.glob("training/*/hparams.yml")
    assert found.read_text() == "lr: 0.1\nm.n: 3\n"
    file = tmp_path / "media/hyperparameters/00000000.json"
    assert json.loads(file.read_text()) == {"lr": 0.1, "m.n": 3}


def test_other_ranks_write_only_on_request(tmp_path: Path) -> None:
    """A rank other than the first writes files of its own with ``all_ranks=True`` alone."""
    report = Report(TrainerProgress(), tmp_path, rank=1)
    report.begin()
    report.add_image("a", RED)
    assert not (tmp_path / "media").exists()
    report.add_image("a", RED, all_ranks=True)
    report.add_image("a", RED, all_ranks=True)
    files = [entry["file"] for entry in read_index(tmp_path / "media/rank1/index.jsonl")]
    assert files == ["a/00000000.png", "a/00000000-2.png"]


def test_without_a_destination_nothing_is_converted() -> None:
    """Without a run folder and sinks, a call doesn't even look at its object."""

    touched: list[str] = []

    class Observed:
        def __getattribute__(self, name: str) -> Any:
            touched.append(name)  # an error would be dropped
            return super().__getattribute__(name)

    report = PipelineHookArgs().report
    assert not report.is_wanted
    report.add_image("a", Observed())
    assert touched == []
    seen: list[Media] = []
    handle = report.attach("test", seen.append)
    report.add_table("t", [(1, None)], columns=["a", "b"])
    handle.remove()
    report.add_text("b", "text")
    assert [media.content for media in seen] == [Table(("a", "b"), ((1, None),))]


class Figure:
    """Figure with the interface of matplotlib's, which is not a requirement."""

    def savefig(self, file: Any) -> None: ...

    @property
    def canvas(self) -> Any:
        return self

    def draw(self) -> None: ...

    def buffer_rgba(self) -> Any:
        return memoryview(b"\x09" * 80).cast("B", (4, 5, 4))


def test_figures_are_rendered() -> None:
    """A figure is an image of its canvas."""
    report, seen = PipelineHookArgs().report, list[Media]()
    report.attach("test", seen.append)
    report.add_figure("plot", Figure())
    assert seen[0].kind == "image"
    assert seen[0].content.shape == (4, 5, 3)


# --- LogImages -----------------------------------------------------------------------------------


def images_of(folder: Path, name: str = "batch/images") -> list[tuple[int, tuple[int, ...]]]:
    return [
        (entry["step"], np.asarray(Image.open(folder / "media" / entry["file"])).shape)
        for entry in read_index(folder / "media/index.jsonl")
        if entry["name"] == name
    ]


class Pictures(torch.utils.data.Dataset[Any]):
    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return {"obs": {"image": torch.rand(3, 8, 8) - self.shift}, "label": index}


def train_pictures(folder: Path, config: LogImagesConfig, shift: float = 0.0) -> Any:
    def loss(model: torch.nn.Module, batch: Any) -> Any:
        outputs = model(batch["obs"]["image"].mean((2, 3)))
        return {"seen": batch["obs"]["image"]}, outputs.square().mean()

    model = torch.nn.Linear(3, 2)
    trainer = HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        torch.utils.data.DataLoader(Pictures(shift), batch_size=4),
        SimpleBatchProcessor.from_callable(loss),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[config],
        run_folder=folder,
        max_epoch=1,
    )
    trainer()
    return trainer


def test_log_images_reports_the_batch(tmp_path: Path) -> None:
    """The images at a key are one grid, at the trigger's steps, of at most ``max_images``."""
    train_pictures(tmp_path / "a", LogImagesConfig(every="2 steps from 0", key="obs.image"))
    assert images_of(tmp_path / "a") == [(1, (18, 18, 3)), (3, (18, 18, 3))]
    config = LogImagesConfig(
        every="last", source="outputs", key="seen", name="out", max_images=1, mean=[0.5], std=[1.0]
    )
    train_pictures(tmp_path / "b", config, shift=0.5)
    assert images_of(tmp_path / "b", "out") == [(3, (8, 8, 3))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"expected a tensor or array of images in args.batch, found a dict with obs, label"),
        ({"key": "obs.rgb"}, "no args.batch.obs.rgb; expected one of image"),
        ({"key": "label"}, "expected uint8, bool, or floats from 0 to 1, found int64"),
        ({"key": "obs.image", "source": "outputs"}, "no args.outputs.obs; expected one of seen"),
        ({"key": "obs.image"}, "undo the normalization"),
    ],
)
def test_log_images_reports_its_problem_once(
    options: dict[str, Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong key or normalized images are one line in the log, and the training continues."""
    with caplog.at_level(logging.ERROR):
        trainer = train_pictures(tmp_path, LogImagesConfig(every="1 step", **options), shift=0.5)
    assert trainer.progress.global_step_id == 3
    (record,) = caplog.records
    assert re.search(message, record.getMessage())


def test_log_images_changes_no_weights(tmp_path: Path) -> None:
    """The hook keeps the trajectory, also where it reports, and needs both mean and std."""
    ends = []
    for name, every in (("a", "1 step"), ("b", "at steps 99")):
        torch.manual_seed(0)
        trainer = train_pictures(tmp_path / name, LogImagesConfig(every=every, key="obs.image"))
        ends.append(weights(trainer.model))
    assert [len(images_of(tmp_path / name)) for name in ("a", "b")] == [3, 0]
    assert equal(*ends)
    assert_weights_unchanged(LogImagesConfig(every="1 step"))
    run_hook(LogImagesConfig(every="1 step"), steps=2)
    with pytest.raises(ValueError, match="expected mean and std together"):
        LogImagesConfig(mean=[0.5])
