"""caption-video: captions of a video file or a camera (original: videocaptioning.lua)."""

import argparse
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from captioner.cli.options import (
    Parser,
    Range,
    add_overwrite,
    add_precision,
    flag,
    gpu_number,
    images_at_once,
    run,
    seed_number,
    share,
)
from captioner.cli.search_options import add_search_options, search_keywords
from captioner.errors import InputError

if TYPE_CHECKING:  # torch is imported late, so that --help and argument errors are instant
    import numpy as np

    from captioner.inference.caption import Caption
    from captioner.runtime.signals import StopRequest
    from captioner.video.frames import Frame, VideoFile
    from captioner.video.subtitles import Subtitle

    CaptionPictures = Callable[[Sequence[np.ndarray]], Sequence[Caption]]

log = logging.getLogger(__name__)

seconds = Range(float, 0.1, 3600)


def build_parser() -> Parser:
    """The command's options."""
    p = Parser(prog="caption-video", description="Caption a video file or a camera, scene by scene.")
    p.add_argument("--model", nargs="+", default=[], help="checkpoints, averaged (default: the bundled one)")
    p.add_argument("--input", default="0", help="a video file, or the number of a camera")
    p.add_argument("--whole_frame", type=flag, default="0", help="the whole picture squashed; 0: its centre square")
    out = p.add_argument_group("results (captions with their times go to stdout)")
    out.add_argument("--output", default="", help="the video with captions on it: F.mp4, F.mov or F.mkv")
    out.add_argument("--srt", default="", help="subtitles: F.srt")
    out.add_argument("--vtt", default="", help="subtitles for the web: F.vtt")
    out.add_argument("--jsonl", default="", help="a JSON object per caption, with its times: F.jsonl")
    out.add_argument("--vis_dir", default="", help="folder for a page with one picture a scene (files only)")
    out.add_argument("--show", type=flag, default="0", help="a window; q or Escape closes it")
    add_overwrite(out)
    out.add_argument("--min_confidence", type=share, default=0.0, help="below this say nothing (0 to 1)")
    scenes = p.add_argument_group("scenes")
    scenes.add_argument("--detect_scenes", type=flag, default="1", help="0: caption a picture every so often instead")
    scenes.add_argument("--every", type=seconds, default=2.0, help="seconds from one captioned picture to the next")
    scenes.add_argument("--least", type=seconds, default=1.0, help="seconds of a scene, at least")
    add_search_options(p)
    machine = p.add_argument_group("machine")
    machine.add_argument("--batch_size", type=images_at_once, default=8, help="pictures of a file captioned at once")
    machine.add_argument("--seed", type=seed_number, default=123, help="random number seed, for sampling")
    machine.add_argument("--gpuid", type=gpu_number, default=0, help="GPU to use; -1 is the CPU")
    add_precision(machine)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    opt = build_parser().parse_args(argv)
    return run("caption-video", lambda: caption_video(opt))


def caption_video(opt: argparse.Namespace) -> int:
    """Caption what is asked for; 128 + the signal's number if a file was not read to its end because of one."""
    try:
        from captioner.video.frames import VideoFile, camera_frames
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "captioner":
            raise
        raise InputError(f"the package {error.name} is missing", remedy='pip install "captioner[video]"') from error
    from captioner.output.page import sole_writer
    from captioner.runtime.signals import StopRequest

    is_camera = opt.input.isascii() and opt.input.isdecimal()
    check_outputs(opt, is_camera)
    if is_camera:
        with StopRequest() as stop:
            caption_camera(opt, camera_frames(opt.input, opt.whole_frame), load(opt), stop)
        return 0
    video = VideoFile(opt.input, opt.whole_frame)
    caption = load(opt)
    with contextlib.ExitStack() as opened:
        if opt.vis_dir:
            opened.enter_context(sole_writer(opt.vis_dir))
        stop = opened.enter_context(StopRequest())
        caption_file(opt, video, caption, stop)
    return 128 + stop.signal if stop.signal else 0


def check_outputs(opt: argparse.Namespace, is_camera: bool) -> None:
    """Refuse what cannot be written before the work starts.

    Raises:
        InputError: a folder cannot be written or holds files of others, or a format is unknown.
    """
    from captioner.output.page import VisWriter
    from captioner.runtime.files import require_writable_folder
    from captioner.video.annotated import require_known_format

    if opt.vis_dir and is_camera:
        raise InputError("--vis_dir is for files", remedy="record the camera with --output, and caption that file")
    if opt.vis_dir:
        VisWriter(opt.vis_dir, opt.overwrite)
    if opt.output:
        require_known_format(Path(opt.output))
    for name in ("output", "srt", "vtt", "jsonl"):
        if getattr(opt, name):
            require_writable_folder(Path(getattr(opt, name)).parent, f"--{name}")


def load(opt: argparse.Namespace) -> "CaptionPictures":
    """The model: uint8 RGB pictures in, captions out."""
    from captioner.inference.model import load_model
    from captioner.runtime.device import choose_device
    from captioner.runtime.memory import keep_freed_memory

    keep_freed_memory()
    model = load_model(opt.model or None, choose_device(opt.gpuid), opt.precision)
    keywords = search_keywords(opt)
    model.search_options(**keywords)  # refuses contradictions now

    def caption(pictures: "Sequence[np.ndarray]") -> "Sequence[Caption]":
        return model.caption(
            list(pictures),
            min_confidence=opt.min_confidence,
            seed=opt.seed,
            batch_size=len(pictures),
            num_workers=0,
            **keywords,
        )

    return caption


def caption_file(opt: argparse.Namespace, video: "VideoFile", caption: "CaptionPictures", stop: "StopRequest") -> None:
    """Find the scenes and caption them; then, if asked for, go through the file once more to write them on it."""
    from captioner.video.page import ScenePage
    from captioner.video.scenes import scenes_of
    from captioner.video.subtitles import Subtitle, joined

    def frames() -> "Iterator[Frame]":
        for frame in video.frames():
            if stop.signal:
                return
            yield frame

    page = ScenePage(opt.vis_dir, video.path, opt.overwrite) if opt.vis_dir else None
    found: list[Subtitle] = []
    scenes = scenes_of(
        frames(),
        caption,
        every_seconds=opt.every,
        least_seconds=opt.least,
        detect=opt.detect_scenes,
        batch_size=opt.batch_size,
    )
    for scene in scenes:
        found.append(Subtitle(scene.begin, scene.end, scene.caption))
        say(found[-1])
        if page:
            page.add(scene)
    subtitles = joined(found)
    write_subtitles(opt, subtitles)
    if page:
        log.info("page: %s", page.finish())
    log.info("%d scenes, %.1f s", len(found), found[-1].end if found else 0.0)
    if (opt.output or opt.show) and stop.signal:
        log.warning("no annotated video: the file was not read to its end")
    elif opt.output or opt.show:
        annotate(opt, video, subtitles, stop)


def annotate(opt: argparse.Namespace, video: "VideoFile", subtitles: "Sequence[Subtitle]", stop: "StopRequest") -> None:
    """Write the captions on the pictures of a file: into another file, and into a window at the video's own pace."""
    from captioner.runtime.files import atomic_write
    from captioner.video.annotated import AnnotatedVideo, Painter
    from captioner.video.subtitles import Texts
    from captioner.video.window import window

    texts, painter = Texts(subtitles), Painter()
    with contextlib.ExitStack() as opened:
        shown = opened.enter_context(window(f"caption-video: {video.path.name}", opt.show))
        output = None
        if opt.output:
            stream = opened.enter_context(atomic_write(opt.output))
            output = opened.enter_context(AnnotatedVideo(stream, Path(opt.output).suffix, video.rate, video))
        began = time.monotonic()
        for frame in video.frames(output.add_sound if output else None):
            if stop.signal or (shown and shown.closed and not output):
                break
            pixels = painter.paint(frame.pixels(), texts.at(frame.time))
            if output:
                output.add(frame, pixels)
            if shown and not shown.closed:
                time.sleep(max(0.0, began + frame.time - time.monotonic()))
                shown.show(pixels)
    if output:
        log.info("video: %s (%d frames)", opt.output, output.num_frames)


def caption_camera(
    opt: argparse.Namespace, frames: "Iterator[Frame]", caption: "CaptionPictures", stop: "StopRequest"
) -> None:
    """Caption the newest picture of a camera again and again, until the user or the camera ends it."""
    from fractions import Fraction

    from captioner.runtime.files import atomic_write
    from captioner.video.annotated import AnnotatedVideo, Painter
    from captioner.video.live import live_captions
    from captioner.video.subtitles import Subtitle, joined
    from captioner.video.window import window

    painter = Painter()
    found: list[Subtitle] = []
    with contextlib.ExitStack() as opened:
        shown = opened.enter_context(window("caption-video", opt.show))
        output = None
        if opt.output:
            stream = opened.enter_context(atomic_write(opt.output))
            output = opened.enter_context(AnnotatedVideo(stream, Path(opt.output).suffix, Fraction(25)))
        pictures = live_captions(
            frames,
            caption,
            every_seconds=opt.every,
            least_seconds=opt.least,
            detect=opt.detect_scenes,
            stopped=lambda: bool(stop.signal or (shown and shown.closed)),
        )
        try:
            for picture in pictures:
                if stop.signal or (shown and shown.closed):
                    break
                if found:
                    found[-1].end = picture.frame.time + picture.frame.duration
                if picture.changed and picture.caption:
                    begin = max(picture.since, found[-1].begin) if found else picture.since
                    if found:
                        found[-1].end = begin
                    found.append(Subtitle(begin, picture.frame.time, picture.caption))
                    say(found[-1])
                if shown or output:
                    text = picture.caption.text if picture.caption else ""
                    pixels = painter.paint(picture.frame.pixels(), text)
                    if output:
                        output.add(picture.frame, pixels)
                    if shown:
                        shown.show(pixels)
        except InputError as error:
            if not found:
                raise  # nothing has come of it
            log.warning("%s", error)  # what there is, is kept
    write_subtitles(opt, joined(found))


def say(subtitle: "Subtitle") -> None:
    """A caption on stdout, with when it begins."""
    from captioner.video.subtitles import clock

    print(f"{clock(subtitle.begin)}: {subtitle.caption.text}", flush=True)


def write_subtitles(opt: argparse.Namespace, subtitles: "Sequence[Subtitle]") -> None:
    """All forms that were asked for."""
    from captioner.video.subtitles import write_jsonl, write_srt, write_vtt

    for name, write in (("srt", write_srt), ("vtt", write_vtt), ("jsonl", write_jsonl)):
        if getattr(opt, name):
            write(Path(getattr(opt, name)), subtitles)
            log.info("subtitles: %s", getattr(opt, name))


if __name__ == "__main__":
    raise SystemExit(main())
