"""caption-video: videos of photos with known cuts, damaged files, and cameras that misbehave."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video_maker import example, turn_clockwise, write_video

import captioner.cli.video
from captioner.errors import InputError
from captioner.inference.caption import Caption, Word
from captioner.video.frames import Frame, VideoFile
from captioner.video.live import live_captions
from captioner.video.scenes import SceneDetector
from captioner.video.subtitles import Subtitle, clock, joined, write_vtt

PHOTOS = ["cat", "rocket", "coffee", "flower", "astronaut"]
SECONDS_EACH = 2


def caption_by_looks(pictures: Sequence[np.ndarray]) -> list[Caption]:
    """A stand-in for the model: the name of the example that a centre square looks like."""
    captions = []
    for picture in pictures:
        looks = np.asarray(Image.fromarray(picture).resize((16, 16))).astype(float)
        squares = {name: example(name)[:, 40:280] for name in PHOTOS}
        thumbnails = {name: np.asarray(Image.fromarray(square).resize((16, 16))) for name, square in squares.items()}
        name = min(thumbnails, key=lambda name: np.abs(thumbnails[name] - looks).mean())
        confidence = 0.4 + 0.1 * PHOTOS.index(name)  # a picture of the next scene would win
        captions.append(Caption(f"a {name}", -1.0, confidence, (Word("a", -0.5), Word(name, -0.5))))
    return captions


@pytest.fixture
def stand_in(monkeypatch) -> None:
    monkeypatch.setattr(captioner.cli.video, "load", lambda opt: caption_by_looks)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Five photos, two seconds each, with sound."""
    pictures = [example(name) for name in PHOTOS for _ in range(25 * SECONDS_EACH)]
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", pictures, sound=True)


def seconds(text: str) -> float:
    hours, minutes, rest = text.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def read_srt(path: Path) -> list[tuple[float, float, str]]:
    blocks = path.read_text().strip().split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == [str(number) for number in range(1, len(blocks) + 1)]
    lines = [block.split("\n") for block in blocks]
    return [(*map(seconds, times.split(" --> ")), text) for _, times, text in lines]  # type: ignore[misc]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_subtitles_change_at_the_cuts(command, stand_in, clip, tmp_path, batch_size):
    files = {name: tmp_path / f"clip.{name}" for name in ("srt", "vtt", "jsonl")}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    page = tmp_path / "page"
    done = command("video", "--input", clip, *options, "--vis_dir", page, "--batch_size", batch_size)
    assert done.returncode == 0, done.stderr
    subtitles = read_srt(files["srt"])
    assert [text for _, _, text in subtitles] == [f"a {name}" for name in PHOTOS]
    for number, (begin, end, _) in enumerate(subtitles):
        assert begin == pytest.approx(SECONDS_EACH * number, abs=0.1)
        assert end == pytest.approx(SECONDS_EACH * (number + 1), abs=0.1)
    assert subtitles[-1][1] <= SECONDS_EACH * len(PHOTOS)
    assert files["vtt"].read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.000\na cat\n\n")
    rows = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    assert [(row["begin"], row["caption"]) for row in rows] == [(begin, text) for begin, _, text in subtitles]
    assert [word["word"] for word in rows[0]["words"]] == ["a", "cat"]
    assert done.stdout.splitlines()[1] == "00:00:02.000: a rocket"
    shown = json.loads((page / "vis.json").read_text())
    assert [row["caption"] for row in shown] == [f"a {name}" for name in PHOTOS]
    assert shown[1]["link"].endswith("clip.mp4#t=2.000") and (page / shown[1]["image"]).is_file()


def test_the_annotated_video_has_all_frames_their_times_the_text_and_the_sound(command, stand_in, clip, tmp_path):
    out = tmp_path / "annotated.mp4"
    assert command("video", "--input", clip, "--output", out).returncode == 0
    before, after = list(VideoFile(clip).frames()), list(VideoFile(out).frames())
    assert [frame.time for frame in after] == pytest.approx([frame.time for frame in before], abs=1e-3)
    with av.open(str(out)) as container:
        assert container.duration / 1e6 == pytest.approx(SECONDS_EACH * len(PHOTOS), abs=0.1)
        assert (container.streams.video[0].width, container.streams.video[0].height) == (240, 240)
        assert len(container.streams.audio) == 1
        assert sum(packet.size > 0 for packet in container.demux(container.streams.audio[0])) > 400
    old, new = (frames[60].pixels().astype(int) for frames in (before, after))
    assert np.abs(old[:150] - new[:150]).mean() < 8  # encoded once more
    assert np.abs(old[-20:] - new[-20:]).mean() > 20  # the band
    assert new[-20:].max() > 200  # the letters
    assert [path.name for path in tmp_path.iterdir()] == ["annotated.mp4"]


def test_the_whole_frame_and_sides_of_odd_length(command, stand_in, tmp_path):
    picture = example("cat", (322, 241))[:, :321]
    with av.open(str(tmp_path / "odd.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 321, 241, "bgr0"
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for whole, size in ((1, (320, 240)), (0, (240, 240))):
        out = tmp_path / f"out{whole}.mp4"
        assert (
            command("video", "--input", tmp_path / "odd.mkv", "--whole_frame", whole, "--output", out).returncode == 0
        )
        with av.open(str(out)) as container:
            assert (container.streams.video[0].width, container.streams.video[0].height) == size


def test_flashes_and_slow_movement_are_no_scenes():
    detector, rng = SceneDetector(1.0), np.random.default_rng(0)
    wide = np.kron(rng.integers(0, 255, (32, 8, 3)), np.ones((1, 16, 1))).astype(np.int16)

    def look(number: int) -> np.ndarray:
        if number in (40, 41):
            return np.full((32, 32, 3), 255, np.int16)  # a flash of two frames
        shift = number // 25  # a slow pan
        return np.clip(wide[:, shift : shift + 32] + rng.integers(-9, 9, (32, 32, 3)), 0, 255)

    assert [number for number in range(100) if detector.look(number / 25, look(number))] == [0]


def test_rapid_cuts_are_held_for_the_least_duration():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (40, 32, 32, 3)).astype(np.int16)  # another one every fifth of a second
    detector = SceneDetector(1.0)
    begins = [detector.begin for n in range(200) if detector.look(n / 25, pictures[n // 5])]
    assert len(begins) >= 6 and min(np.diff(begins)) >= 1.0 - 1e-9


def test_a_turned_video_is_captioned_upright(tmp_path):
    picture = np.zeros((240, 320, 3), np.uint8)
    picture[:120] = (255, 0, 0)
    path = write_video(tmp_path / "turned.mp4", [picture] * 5)
    turn_clockwise(path)
    pixels = next(VideoFile(path, whole=True).frames()).pixels()
    assert pixels.shape == (320, 240, 3)
    assert pixels[:, :110, 0].max() < 20 and pixels[:, 130:, 0].min() > 230  # what was at the top is at the right


def test_times_of_a_variable_frame_rate_are_kept(command, stand_in, tmp_path):
    times = [0.0, 0.04, 0.3, 0.35, 1.2, 2.0, 2.04, 2.5, 3.1, 3.9]
    clip = write_video(tmp_path / "vfr.mp4", [example("cat")] * 5 + [example("rocket")] * 5, times)
    assert [frame.time for frame in VideoFile(clip).frames()] == pytest.approx(times, abs=1e-3)
    assert (
        command("video", "--input", clip, "--output", tmp_path / "a.mp4", "--srt", tmp_path / "a.srt").returncode == 0
    )
    assert [frame.time for frame in VideoFile(tmp_path / "a.mp4").frames()] == pytest.approx(times, abs=1e-3)
    assert [begin for begin, _, _ in read_srt(tmp_path / "a.srt")] == pytest.approx([0.0, 2.0], abs=1e-3)


def test_names_with_colons_are_files_and_never_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4", [example("cat")] * 3).rename("12:30.mp4")
    assert len(list(VideoFile("12:30.mp4").frames())) == 3
    for name in ("concat:12:30.mp4|12:30.mp4", "data:video/mp4;base64,AAAA", "http://127.0.0.1:1/clip.mp4"):
        with pytest.raises(InputError, match="no such file"):
            VideoFile(name)


def _no_video(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path, clip: None, "no such file"),
        (lambda path, clip: path.write_bytes(b""), "cannot be read as a video"),
        (lambda path, clip: path.write_bytes(b"no video at all\n" * 100), "cannot be read as a video"),
        (lambda path, clip: path.write_bytes(clip.read_bytes()[:5000]), "cannot be read as a video"),
        (lambda path, clip: path.mkdir(), "cannot be read as a video"),
        (lambda path, clip: _no_video(path), "has no video stream"),
    ],
)
def test_what_is_no_video_gives_one_line_and_no_file(command, stand_in, clip, tmp_path, make, reason):
    make(tmp_path / "broken.mp4", clip)
    (tmp_path / "out").mkdir()
    options = [part for kind in ("srt", "vtt", "jsonl") for part in (f"--{kind}", tmp_path / "out" / f"a.{kind}")]
    done = command("video", "--input", tmp_path / "broken.mp4", "--output", tmp_path / "out" / "a.mp4", *options)
    assert done.returncode == 1
    assert done.stderr.startswith(f"caption-video: error: {tmp_path / 'broken.mp4'}: {reason}")
    assert done.stderr.count("\n") == 1 and not list((tmp_path / "out").iterdir())


def test_broken_frames_are_left_out(command, stand_in, clip, tmp_path):
    data = bytearray(clip.read_bytes())
    start, size = data.index(b"mdat"), len(data)
    for at in range(start + (size - start) // 3, start + (size - start) // 2, 7):
        data[at] ^= 0x5A
    (tmp_path / "damaged.mp4").write_bytes(data)
    done = command("video", "--input", tmp_path / "damaged.mp4", "--srt", tmp_path / "a.srt")
    assert done.returncode == 0, done.stderr
    subtitles = read_srt(tmp_path / "a.srt")
    assert subtitles[0][2] == "a cat" and subtitles[-1][2] == "a astronaut"
    assert all(begin < end for begin, end, _ in subtitles)


@pytest.mark.parametrize("name", ["clip.avi", "clip.gif", "clip"])
def test_formats_that_cannot_be_written(command, stand_in, clip, tmp_path, name):
    done = command("video", "--input", clip, "--output", tmp_path / name)
    assert done.returncode == 1 and "expected .mp4, .mov, .mkv" in done.stderr


def test_the_input_is_never_overwritten(command, stand_in, clip):
    before = clip.read_bytes()
    for option in ("--output", "--srt", "--vtt", "--jsonl"):
        done = command("video", "--input", clip, option, clip.parent / "." / clip.name)
        assert done.returncode == 1 and "is an input of this command" in done.stderr, option
        assert clip.read_bytes() == before


def test_a_signal_leaves_whole_files(clip, tmp_path):
    """The model of this process takes its time; the signal comes after the first scene."""
    program = f"""
import time, captioner.cli.video, test_video
def slow(pictures):
    time.sleep(0.5)
    return test_video.caption_by_looks(pictures)
captioner.cli.video.load = lambda opt: slow
raise SystemExit(captioner.cli.video.main(["--input", {str(clip)!r}, "--srt", {str(tmp_path / "a.srt")!r},
    "--output", {str(tmp_path / "a.mp4")!r}, "--batch_size", "1"]))
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    assert process.stdout and process.stdout.readline() == "00:00:00.000: a cat\n"
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in log
    subtitles = read_srt(tmp_path / "a.srt")
    assert 1 <= len(subtitles) < len(PHOTOS) and subtitles[0][2] == "a cat"
    assert [path.name for path in tmp_path.iterdir()] == ["a.srt"]


class Camera:
    """A camera of 25 frames a second, each grey as its number; it delivers late, skips, stalls and ends as told."""

    def __init__(self, num_frames: int, faults: dict[int, float] | None = None, end: Exception | None = None) -> None:
        self.num_frames, self.faults, self.end = num_frames, faults or {}, end

    def __iter__(self) -> Iterator[Frame]:
        began = time.monotonic()
        for number in range(self.num_frames):
            time.sleep(max(0.0, began + number / 25 - time.monotonic()) + self.faults.get(number, 0.0))
            pixels = np.full((48, 64, 3), number, np.uint8)
            yield Frame(number / 25, 0.04, av.VideoFrame.from_ndarray(pixels, format="rgb24"), True)
        if self.end:
            raise self.end


def _live(camera: Camera, seconds_per_caption: float, **options: object) -> list:
    def caption(pictures: Sequence[np.ndarray]) -> list[Caption]:
        time.sleep(seconds_per_caption)
        return [Caption(str(int(pictures[0][0, 0, 0])), -1.0, 0.5, ())]

    settings = {"every_seconds": 0.01, "least_seconds": 0.1, "detect": False, "stopped": lambda: False, **options}
    return list(live_captions(camera, caption, **settings))  # type: ignore[arg-type]


def test_a_camera_s_caption_is_of_one_of_its_newest_pictures():
    """The caption shown is at most two computing times old: one to compute it, one until the next is ready."""
    shown = _live(Camera(50), 0.2)
    ages = [one.frame.time - int(one.caption.text) / 25 for one in shown if one.caption]
    assert len(ages) > 30 and max(ages) < 2 * 0.2 + 0.3
    assert len({one.caption.text for one in shown if one.caption}) >= 4


def test_a_slow_reader_sees_the_newest_frame_and_drops_the_stale_ones():
    seen = []
    for one in live_captions(
        Camera(50), lambda pictures: [Caption("x", -1.0, 0.5, ())], every_seconds=1, least_seconds=1, detect=False,
        stopped=lambda: False,
    ):  # fmt: skip
        seen.append(one.frame.time)
        time.sleep(0.2)
    assert len(seen) <= 13 and seen == sorted(seen) and seen[-1] == pytest.approx(49 / 25)


def test_a_camera_that_stalls_ends_with_a_line():
    with pytest.raises(InputError, match="delivered no picture for"):
        _live(Camera(20, {10: 2.0}), 0.01, stall_seconds=0.3)


def test_a_camera_that_is_unplugged_ends_what_is_shown(caplog):
    shown = _live(Camera(5, end=OSError("no such device")), 0.01)
    assert shown and "the camera has ended: no such device" in caplog.text


def test_the_camera_command_keeps_what_it_has(command, monkeypatch, tmp_path):
    """A caption takes 0.4 s, 20 pictures of this camera; it is of the scene all the same, from its cut on."""

    def slowly(pictures: Sequence[np.ndarray]) -> list[Caption]:
        time.sleep(0.4)
        return caption_by_looks(pictures)

    monkeypatch.setattr(captioner.cli.video, "load", lambda opt: slowly)

    def frames(name: str, whole: bool) -> Iterator[Frame]:
        for number, photo in enumerate(["cat"] * 30 + ["rocket"] * 80):
            time.sleep(0.02)
            yield Frame(number / 25, 0.04, av.VideoFrame.from_ndarray(example(photo), format="rgb24"), whole)
        raise OSError("unplugged")

    monkeypatch.setattr("captioner.video.frames.camera_frames", frames)
    out, srt = tmp_path / "a.mp4", tmp_path / "a.srt"
    done = command("video", "--input", "0", "--output", out, "--srt", srt)
    assert done.returncode == 0 and "unplugged" in done.stderr
    assert [text for _, _, text in read_srt(srt)] == ["a cat", "a rocket"]
    (first, cut, _), (begin, _, _) = read_srt(srt)
    assert first == 0 and cut == begin == pytest.approx(30 / 25, abs=0.5)
    assert len(list(VideoFile(out).frames())) > 20


def test_a_camera_that_is_not_there(command, stand_in):
    done = command("video", "--input", "99")
    assert done.returncode == 1 and done.stderr.startswith("caption-video: error: camera 99 cannot be opened")


def test_the_window_shows_the_video_with_its_caption(clip, tmp_path):
    """Under a virtual screen; what it shows is read back from the screen's own memory."""
    pytest.importorskip("tkinter", reason="this Python came without tkinter")
    xvfb = shutil.which("Xvfb")
    assert xvfb, "install Debian's xvfb (scripts/test does)"
    server = subprocess.Popen(
        [xvfb, "-displayfd", "1", "-screen", "0", "400x300x24", "-fbdir", str(tmp_path)], stdout=subprocess.PIPE
    )
    assert server.stdout
    display = f":{int(server.stdout.readline())}"
    program = f"""
import captioner.cli.video, test_video
captioner.cli.video.load = lambda opt: test_video.caption_by_looks
raise SystemExit(captioner.cli.video.main(["--input", {str(clip)!r}, "--show", "1"]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], env={"DISPLAY": display}, cwd=Path(__file__).parent)
    try:
        cat, deadline, looks = example("cat")[:150, 40:280].astype(int), time.monotonic() + 60, []
        while not looks and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
            screen = _screen(tmp_path / "Xvfb_screen0")
            for top, left in np.ndindex(screen.shape[0] - 240, screen.shape[1] - 240):
                if np.abs(screen[top : top + 150 : 30, left : left + 240 : 30] - cat[::30, ::30]).mean() < 10:
                    looks.append(screen[top : top + 240, left : left + 240])
                    break
        assert looks
        assert looks[0][-25:].max() > 200 and np.median(looks[0][-20:]) < 90  # letters on the dark band
    finally:
        process.kill()
        process.wait()
        server.kill()
        server.wait()


def _screen(path: Path) -> np.ndarray:
    """int (height, width, 3) of an X window dump (XWDFile.h): its header's sizes, the colours, the pixels."""
    data = path.read_bytes()
    header = np.frombuffer(data[:100], ">u4")
    header_size, width, height, line, colours = (int(header[i]) for i in (0, 4, 5, 12, 19))
    pixels = np.frombuffer(data, np.uint8, line * height, header_size + 12 * colours).reshape(height, line)
    return pixels[:, : 4 * width].reshape(height, width, 4)[:, :, 2::-1].astype(int)


def test_subtitles_join_and_escape(tmp_path):
    one, other = Caption("a", -1.0, 0.5, ()), Caption("b < c & d", -1.0, 0.5, ())
    kept = joined([Subtitle(0, 1, one), Subtitle(1, 2, one), Subtitle(2, 2, other), Subtitle(2, 3, other)])
    assert [(s.begin, s.end, s.caption.text) for s in kept] == [(0, 2, "a"), (2, 3, "b < c & d")]
    write_vtt(tmp_path / "a.vtt", kept)
    assert "b &lt; c &amp; d" in (tmp_path / "a.vtt").read_text()
    assert clock(3723.4567) == "01:02:03.457" and clock(59.9999) == "00:01:00.000"


def test_the_bundled_model_captions_scenes_as_it_captions_their_squares(command, clip):
    import captioner

    done = command("video", "--input", clip, "--gpuid", "-1", "--every", "10", "--precision", "fp32")
    assert done.returncode == 0
    frames = [frame.pixels() for number, frame in enumerate(VideoFile(clip).frames()) if number % 50 == 25]
    expected = captioner.load_model(device="cpu", precision="fp32").caption(frames)
    said = [re.sub(r"^[\d:.]+: ", "", line) for line in done.stdout.splitlines()]
    # Neighbouring frames differ by what the video's encoder did to them; that tips some captions over.
    assert sum(a == b.text for a, b in zip(said, expected, strict=True)) >= 2
    assert threading.active_count() < 20
