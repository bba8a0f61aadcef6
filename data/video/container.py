"""What lies in a video file, and its frames exactly as FFmpeg gives them: by PyAV (FFmpeg's
libraries). The only module of this project that imports av.

A frame is known by the packet that it comes from: packets are numbered as the file has them, and
the decoder hands the number on to the frame. So frames are found again after a seek wherever time
stamps are missing (AVI), repeated or wrong. :func:`look` finds out how a file is read, which costs
decoding it once unless decord reads it exactly; :func:`read` then decodes from the last key frame
that is a real one, or from the start.
"""

import bisect
import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from ..common.samples import UnreadableFile

DECODERS = ("auto", "decord", "pyav")
# How a file is read.
DECORD = "decord"  # decord gives the right frames: PyAV need not, and could by either order below
BY_TIME = "time"  # by PyAV: packets have time stamps in the order of the frames
BY_TYPE = "type"  # by PyAV: the types of MPEG-4's pictures tell the order
FROM_START = "start"  # by PyAV, from the first packet to the last frame that is wanted
ROUTES = (DECORD, BY_TIME, BY_TYPE, FROM_START)

# Containers that tell where a packet lies exactly enough to seek to it.
MOV, MATROSKA, AVI = "mov", "matroska", "avi"
# Codecs whose key frames need nothing of what is before them.
KEYED = ("mpeg4", "h264", "hevc", "mpeg1video", "mpeg2video", "vp8", "vp9", "av1", "mjpeg")
# Codecs whose decoder knows the frames that no other one refers to, and can leave them out.
SKIPPING = ("mpeg4", "h264")
# decord turns each frame that it decodes into RGB, which costs most where decoding costs little:
# PyAV takes half its processor time.
QUICKER_BY_PYAV = ("mpeg4", "mjpeg")
# decord resizes a narrower video wrongly or not at all.
LEAST_WIDTH_OF_DECORD = 32
DEFAULT, ATTACHED_PICTURE = 0x1, 0x400  # AV_DISPOSITION_*
# MPEG-4: where a picture begins, and how long one is that only repeats another.
VOP, LARGEST_EMPTY_VOP = b"\0\0\1\xb6", 19
# H.264 and HEVC: types of NAL units.
H264_SLICES, H264_IDR, H264_SEI, RECOVERY_POINT = (1, 2, 3, 4, 5), 5, 6, 6
HEVC_SLICES, HEVC_IRAP, HEVC_IDR = range(32), range(16, 24), (19, 20)


class VideoError(UnreadableFile):
    """A video that cannot be read."""

    kind = "video"


class Turn(NamedTuple):
    """What a display matrix asks for: quarter turns counter-clockwise, then left to right."""

    quarters: int = 0
    mirrored: bool = False

    def apply(self, frames: np.ndarray, done: int = 0) -> np.ndarray:
        """Return (n, height, width, 3) frames turned, of which ``done`` quarters have been."""
        if self.quarters != done:
            frames = np.rot90(frames, self.quarters - done, axes=(1, 2))
        return frames[:, :, ::-1] if self.mirrored else frames

    def __str__(self) -> str:
        # Degrees clockwise, as players and FFprobe say it.
        return f"{-90 * self.quarters % 360}{' mirrored' if self.mirrored else ''}"


class VideoFacts(NamedTuple):
    """What is known of a video file; belongs to a file of ``size`` bytes.

    Attributes
    ----------
    frames
        That can be decoded.
    size
    route
        One of :data:`ROUTES`.
    turn
    codec, container
        FFmpeg's names.
    rate
        Frames per second, on average; 0 if unknown.
    announced
        Frames by the packets.
    problem
        What FFmpeg complained of while it decoded the file, or an empty string.
    """

    frames: int
    size: int
    route: str
    turn: Turn = Turn()
    codec: str = ""
    container: str = ""
    rate: float = 0.0
    announced: int = 0
    problem: str = ""


@functools.cache
def _av() -> Any:
    """Import av, and keep FFmpeg quiet."""
    import av
    import av.logging
    import av.video.reformatter

    av.logging.set_level(None)
    return av


def _turn(frame: Any) -> Turn:
    """Return what FFmpeg does with a frame's display matrix.

    See ffmpeg_filter.c, configure_input_video_filter: other angles than quarter turns, which no
    camera writes, are left alone here.
    """
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return Turn()
    matrix = np.frombuffer(bytes(side), np.int32, 9)
    scale = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not all(scale):
        return Turn()
    angle = round(math.degrees(math.atan2(matrix[1] / scale[1], matrix[0] / scale[0]))) % 360
    if abs(angle - 90) < 1:
        return Turn(3, True) if matrix[3] > 0 else Turn(3)
    if abs(angle - 180) < 1:
        flips = bool(matrix[0] < 0), bool(matrix[4] < 0)
        # Upside down is half a turn and mirrored.
        return {(True, True): Turn(2), (True, False): Turn(0, True), (False, True): Turn(2, True)}[
            flips
        ]
    if abs(angle - 270) < 1:
        return Turn(1, True) if matrix[3] < 0 else Turn(1)
    return Turn(2, True) if angle < 1 and matrix[4] < 0 else Turn()


def _places(data: bytes, what: bytes) -> Iterator[int]:
    """Yield the positions of ``what``."""
    at = data.find(what)
    while at >= 0:
        yield at
        at = data.find(what, at + len(what))


def _units(data: bytes, codec: str, extradata: bytes) -> Iterator[bytes]:
    """Yield the NAL units of a packet of H.264 or HEVC."""
    if extradata[:1] != b"\1":
        yield from re.split(b"\0\0\1", data)[1:]
        return
    # Lengths instead of start codes; avcC and hvcC say of how many bytes.
    width = 1 + (extradata[4 if codec == "h264" else 21] & 3)
    at = 0
    while at + width < len(data):
        size = int.from_bytes(data[at : at + width], "big")
        yield data[at + width : at + width + size]
        at += width + size


def _is_real_key(data: bytes, codec: str, extradata: bytes, closed: bool) -> bool:
    """Return whether a packet that is marked as key frame can be decoded from.

    ``closed``: and what follows in the file does not refer to anything before it. FFmpeg also marks
    the first of several frames that together refresh the picture.
    """
    if codec not in ("h264", "hevc"):
        return codec in KEYED
    for unit in _units(data, codec, extradata):
        if not unit:
            continue
        if codec == "hevc":
            kind = unit[0] >> 1 & 63
            if kind in HEVC_SLICES:
                return kind in (HEVC_IDR if closed else HEVC_IRAP)
            continue
        kind = unit[0] & 31
        if kind == H264_SEI and not closed and len(unit) > 3 and unit[1] == RECOVERY_POINT:
            # recovery_frame_cnt 0 is the single bit 1.
            return unit[3] >= 0x80
        if kind in H264_SLICES:
            return kind == H264_IDR
    return False


class _Packets:
    """What demuxing a file tells of its packets, which are numbered from 0.

    With ``route``, only what that needs is looked at.
    """

    def __init__(self, container: Any, stream: Any, route: Optional[str] = None) -> None:
        self.codec = stream.codec_context.codec.canonical_name
        self.delayed = bool(stream.codec_context.has_b_frames)
        self.container = container.format.name.split(",")[0]
        self.width = stream.codec_context.width
        self.times: list[Optional[int]] = []
        self.decoding_times: list[Optional[int]] = []
        self.places: dict[int, int] = {}  # position in the file -> number
        self.types: list[int] = []  # of MPEG-4's pictures: I 0, P 1, B 2, S 3
        self.keys: list[int] = []
        self.closed = True
        self.discarded: set[int] = set()
        self.whole = True
        self.packed = False
        extradata = bytes(stream.codec_context.extradata or b"")
        typed = self.codec == "mpeg4" and route in (None, BY_TYPE)
        held: Optional[int] = None
        with _complaints() as complaints:
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                number = len(self.times)
                self.times.append(packet.pts)
                self.decoding_times.append(packet.dts)
                self.places[packet.pos] = number
                if packet.is_discard:
                    self.discarded.add(number)
                self.whole &= not packet.is_corrupt
                if typed:
                    data = bytes(packet)
                    kinds = [data[at + 4] >> 6 for at in _places(data, VOP) if at + 4 < len(data)]
                    # A second picture in a packet comes out in place of the next packet's, which
                    # is an empty one or is held back in turn (mpeg4_unpack_bframes_bsf.c).
                    if len(kinds) > 1:
                        self.packed = True
                        self.types.append(kinds[0])
                        held = kinds[1]
                    elif held is not None and kinds:
                        self.types.append(held)
                        held = None if packet.size <= LARGEST_EMPTY_VOP else kinds[0]
                    else:
                        self.types.append(kinds[0] if kinds else 1)
                if packet.is_keyframe:
                    data = bytes(packet)
                    own = not typed or self.types[-1] == 0
                    if own and _is_real_key(data, self.codec, extradata, closed=False):
                        self.keys.append(number)
                    if route is None and not _is_real_key(data, self.codec, extradata, closed=True):
                        self.closed = False
        self.whole &= not complaints

    def order(self, route: str) -> list[int]:
        """Return the packets' numbers in the order in which their frames are shown."""
        if route == BY_TYPE:
            order, held = [], None
            for number in range(len(self.times)):
                if self.types and self.types[number] == 2:
                    order.append(number)
                else:
                    if held is not None:
                        order.append(held)
                    held = number
            return order if held is None else [*order, held]
        numbers = [n for n in range(len(self.times)) if n not in self.discarded]
        return sorted(numbers, key=self.times.__getitem__)  # type: ignore[arg-type]

    def seek_time(self, number: int) -> int:
        """Return the time stamp with which a container finds a packet, or one before it."""
        decoding_time = self.decoding_times[number]
        time = self.times[number] if self.container == MATROSKA else decoding_time
        return int(time or 0)

    def rate(self, stream: Any) -> float:
        """Return the frames per second: what time stamps say rather than what the header says."""
        times = [time for n, time in enumerate(self.times) if n not in self.discarded]
        known = [time for time in times if time is not None]
        if len(known) == len(times) > 1 and max(known) > min(known):
            return float((len(known) - 1) / ((max(known) - min(known)) * stream.time_base))
        return float(stream.average_rate or stream.guessed_rate or 0)

    @property
    def placed(self) -> bool:
        """Whether every packet has a place of its own in the file."""
        return len(self.places) == len(self.times)

    @property
    def timed(self) -> bool:
        """Whether every packet has a time of its own."""
        return None not in self.times and len(set(self.times)) == len(self.times)

    def possible_route(self) -> str:
        """Return how the frames' order may be known without decoding."""
        if not self.placed:
            return FROM_START
        if self.codec in KEYED and self.container in (MOV, MATROSKA) and self.timed:
            return BY_TIME
        if self.codec in ("mpeg4", "mjpeg") and self.container == AVI:
            return BY_TYPE
        return FROM_START

    def exact_by_decord(self) -> bool:
        """Return whether decord 0.6.0 gives the right frames (see docs/videos.md)."""
        first_is_key = self.keys[:1] == [0]
        if self.discarded or not self.whole or not first_is_key:
            return False
        if self.width < LEAST_WIDTH_OF_DECORD or self.container not in (MOV, MATROSKA, AVI):
            return False
        if self.codec == "mpeg4":
            b_frames = self.delayed or self.packed or 2 in self.types
            return not b_frames and (self.container == AVI or self.timed)
        if self.codec == "mjpeg":
            return self.container == AVI or self.timed
        if self.container == AVI or not self.timed:
            return False
        return self.codec in ("h264", "hevc", "vp8", "vp9") and self._keys_part()

    def _keys_part(self) -> bool:
        """Return whether no frame is shown on the other side of a key frame than it is stored."""
        if not self.closed:
            return False
        times = np.asarray(self.times)
        before = np.maximum.accumulate(times)
        after = np.minimum.accumulate(times[::-1])[::-1]
        return all(
            (key == 0 or before[key - 1] < times[key]) and after[key] == times[key]
            for key in self.keys
        )


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collect, in the list that is given, an error that ends the block."""
    found: list[str] = []
    try:
        yield found
    except _av().error.FFmpegError as error:
        found.append(_reason(error))


def _reason(error: Exception) -> str:
    """Return the telling part of an FFmpeg error."""
    return str(getattr(error, "strerror", None) or error)


@functools.cache
def _tolerant() -> dict[str, str]:
    """Return how to open files whose metadata are no UTF-8; PyAV 19 takes them as they are."""
    try:
        with contextlib.suppress(OSError):
            _av().open("/nonexistent/file", metadata_errors="replace")
    except TypeError:
        return {}
    return {"metadata_errors": "replace"}


@contextlib.contextmanager
def _opened(path: str, strict: bool = False) -> Iterator[tuple[Any, Any]]:
    """Open a file; yield (container, its video stream).

    With ``strict`` the decoder reports damage that it would otherwise cover up.

    Raises
    ------
    VideoError
        It is no video, or has none, or none that can be decoded.
    """
    av = _av()
    try:
        container = av.open(f"file:{path}", **_tolerant())
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError(path, f"FFmpeg cannot open it: {_reason(error)}") from None
    with container:
        stream = _best_stream(path, container)
        # More would give the same frames, and work against the loader's other processes.
        stream.codec_context.thread_count = 1
        if strict:
            stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def _best_stream(path: str, container: Any) -> Any:
    """Return the video stream that FFmpeg would choose; never a cover picture."""
    best, best_score, covers, undecodable = None, -1, 0, ""
    for stream in container.streams.video:
        context = stream.codec_context
        disposition = int(getattr(stream.disposition, "value", stream.disposition))
        if disposition & ATTACHED_PICTURE:
            covers += 1
        elif context is None:
            undecodable = str(getattr(stream, "name", "") or "unknown")
        else:
            # ffmpeg_mux_init.c, map_auto_video
            score = context.width * context.height + (disposition & DEFAULT) * 100_000_000
            if score > best_score:
                best, best_score = stream, score
    if best is not None:
        return best
    if undecodable or any(stream.codec_context is None for stream in container.streams):
        raise VideoError(path, "there is no decoder for its video here")
    if covers:
        raise VideoError(path, "it has no video, only a cover picture")
    kinds = sorted({stream.type for stream in container.streams})
    raise VideoError(path, f"it has no video, only {', '.join(kinds)}" if kinds else "it is empty")


class _Decoder:
    """Gives frames with the numbers of the packets that they come from.

    Parameters
    ----------
    container, stream
    numbers
        Of packets by their places, after a seek; otherwise they are counted.
    wanted
        Numbers of the packets whose frames are wanted: others may be left out.
    """

    def __init__(
        self,
        container: Any,
        stream: Any,
        numbers: Optional[dict] = None,
        wanted: Optional[set[int]] = None,
    ) -> None:
        self._container = container
        self._stream = stream
        self._numbers = numbers
        self._wanted = wanted if stream.codec_context.codec.canonical_name in SKIPPING else None
        self.fed: Optional[int] = None  # number of the last packet
        self.problems: list[str] = []

    def frames(self) -> Iterator[tuple[Optional[int], Any]]:
        """Yield (number of the packet, frame) in the order of display."""
        packets = self._container.demux(self._stream)
        count = 0
        while True:
            with _complaints() as complaints:
                packet = next(packets, None)
            if complaints:
                self.problems += complaints
                packet = None
            if packet is None:
                break
            # An empty packet would end the decoder: PyAV has one at the end of a file, and AVI
            # where a frame was dropped.
            if packet.size:
                self.fed = count if self._numbers is None else self._numbers.get(packet.pos)
                packet.pts = self.fed
                count += 1
                if self._wanted is not None:
                    skip = "DEFAULT" if self.fed in self._wanted else "NONREF"
                    self._stream.codec_context.skip_frame = skip
                yield from self._decoded(packet)
        yield from self._decoded(None)

    def _decoded(self, packet: Any) -> Iterator[tuple[Optional[int], Any]]:
        frames: list = []
        with _complaints() as complaints:
            frames = self._stream.codec_context.decode(packet)
        # As FFmpeg does: complain and go on.
        self.problems += complaints
        for frame in frames:
            yield frame.pts, frame


def look(path: str, size: int, by_decord: bool = True) -> VideoFacts:
    """Find out how a file is read, and how many frames it has.

    Demuxes the file, and decodes one frame where decord is exact, else all of them.

    Parameters
    ----------
    path
        Absolute.
    size
        Of the file in bytes.
    by_decord
        Whether decord may read it.

    Raises
    ------
    VideoError
        It cannot be opened, has no video, or no frame of it can be decoded.
    """
    with _opened(path) as (container, stream):
        packets = _Packets(container, stream)
        announced = len(packets.times) - len(packets.discarded)
        facts = VideoFacts(
            announced,
            size,
            DECORD,
            codec=packets.codec,
            container=packets.container,
            rate=packets.rate(stream),
            announced=announced,
        )
        single = len(container.streams.video) == 1
        if by_decord and single and packets.exact_by_decord():
            container.seek(packets.seek_time(0), stream=stream)
            _, frame = next(_Decoder(container, stream).frames(), (None, None))
            turn = Turn() if frame is None else _turn(frame)
            # decord turns by quarters, in MP4 and MOV.
            turned = not turn.mirrored and (not turn.quarters or packets.container == MOV)
            if frame is not None and turned:
                return facts._replace(turn=turn)
    return _look_closely(path, packets, facts)


def _look_closely(path: str, packets: _Packets, facts: VideoFacts) -> VideoFacts:
    """Return the facts of a file that decord does not read exactly: decode all of it."""
    numbers: list[Optional[int]] = []
    turn, before = Turn(), 0
    with _opened(path) as (container, stream):
        decoder = _Decoder(container, stream)
        for number, frame in decoder.frames():
            if not numbers:
                turn = _turn(frame)
                # A recording may begin with what belongs to a key frame that it does not have.
                before = len(decoder.problems)
            numbers.append(number)
    if not numbers:
        reason = (decoder.problems or ["it has no frames"])[0]
        raise VideoError(path, f"no frame can be decoded: {reason}")
    problems = decoder.problems[before:]
    route = packets.possible_route()
    # What is not right in every frame is not relied on.
    if decoder.problems or route == FROM_START or packets.order(route) != numbers:
        route = FROM_START
    problem = f"FFmpeg complained {len(problems)} times: {problems[0]}" if problems else ""
    return facts._replace(frames=len(numbers), route=route, turn=turn, problem=problem)


def frame_rates(path: str) -> tuple[float, float]:
    """Return the frames per second that a file announces, and those by its time stamps.

    Raises
    ------
    VideoError
        It cannot be opened, or has no video.
    """
    with _opened(os.path.abspath(path)) as (container, stream):
        announced = float(stream.guessed_rate or stream.average_rate or 0)
        return announced, _Packets(container, stream, BY_TIME).rate(stream)


class Announced(NamedTuple):
    """What a file says of itself: frames per second and seconds (0: nothing), and frames' size."""

    rate: float
    seconds: float
    width: int
    height: int


def announced(path: str) -> Announced:
    """Return what a file says of itself; nothing of it is decoded.

    Raises
    ------
    VideoError
        It cannot be opened, or has no video.
    """
    with _opened(os.path.abspath(path)) as (container, stream):
        rate = float(stream.average_rate or 0)
        seconds = container.duration / _av().time_base if container.duration else 0.0
        size = stream.codec_context.width, stream.codec_context.height
        return Announced(rate if rate <= 1000 else 0.0, seconds, *size)


def count_undamaged(path: str) -> tuple[int, str]:
    """Decode a whole video; return how many frames come before damage, and what that is.

    What is before the first frame is no damage: a recording may begin anywhere.
    """
    frames = 0
    with _opened(path, strict=True) as (container, stream):
        decoder = _Decoder(container, stream)
        before = 0
        for _ in decoder.frames():
            if not frames:
                before = len(decoder.problems)
            if len(decoder.problems) > before:
                break
            frames += 1
    return frames, "".join(decoder.problems[before : before + 1])


def read(path: str, facts: VideoFacts, wanted: Sequence[int]) -> np.ndarray:
    """Decode chosen frames.

    Parameters
    ----------
    path
        Absolute.
    facts
        Of the file as it is.
    wanted
        Numbers of frames, below ``facts.frames``, rising.

    Returns
    -------
    (len(wanted), height, width, 3) uint8, RGB, turned as the display matrix says.

    Raises
    ------
    VideoError
        The frames are not there.
    """
    found = None
    route = facts.route
    if route == DECORD:
        route = BY_TYPE if facts.container == AVI else BY_TIME
    if route != FROM_START:
        found = _read_from_key(path, facts, route, wanted)
    if found is None:
        if facts.route == DECORD:
            raise VideoError(path, "some of its frames are damaged")
        found = _read_from_start(path, facts, wanted)
    return facts.turn.apply(found)


@functools.cache
def _one_thread() -> dict[str, int]:
    """Return how PyAV is told not to start threads, which take longer than the work itself.

    Before version 17 it had none, and no such option.
    """
    frame = _av().VideoFrame(16, 16, "yuv420p")
    try:
        _av().video.reformatter.VideoReformatter().reformat(frame, format="rgb24", threads=1)
    except TypeError:
        return {}
    return {"threads": 1}


class _Pictures:
    """Makes arrays of frames, by one converter: a new one takes longer to make than to use."""

    def __init__(self) -> None:
        self._converter = _av().video.reformatter.VideoReformatter()

    def __call__(self, frame: Any, size: tuple[int, int]) -> np.ndarray:
        """Return (height, width, 3); scaled where the video changes its size midway."""
        found = self._converter.reformat(frame, *size, format="rgb24", **_one_thread())
        return found.to_ndarray()


def _read_from_start(path: str, facts: VideoFacts, wanted: Sequence[int]) -> np.ndarray:
    """Return the frames ``wanted`` (rising), counted as they come out of the decoder."""
    result: Optional[np.ndarray] = None
    size, place, picture = (0, 0), 0, _Pictures()
    with _opened(path) as (container, stream):
        for count, (_, frame) in enumerate(_Decoder(container, stream).frames()):
            if result is None:
                size = frame.width, frame.height
                result = np.empty((len(wanted), frame.height, frame.width, 3), np.uint8)
            if count == wanted[place]:
                result[place] = picture(frame, size)
                place += 1
                if place == len(wanted):
                    return result
    have = f"{facts.frames} were counted, {wanted[place]} or fewer can be decoded now"
    raise VideoError(path, f"its frames have changed: {have}")


def _read_from_key(
    path: str, facts: VideoFacts, route: str, wanted: Sequence[int]
) -> Optional[np.ndarray]:
    """Return the frames ``wanted`` (rising), decoded from the key frames before them.

    None if the file is not as expected, so that it has to be read from the start.
    """
    with _opened(path) as (container, stream):
        packets = _Packets(container, stream, route)
        known = packets.placed and (route == BY_TYPE or packets.timed)
        order = packets.order(route) if known else []
        if wanted[-1] >= len(order):
            return None
        shown = {number: place for place, number in enumerate(order)}
        # (place of its picture, number), and the start of the file
        keys = sorted({(0, 0)} | {(shown[key], key) for key in packets.keys if key in shown})
        places = [place for place, _ in keys]
        size = stream.codec_context.width, stream.codec_context.height
        result = np.empty((len(wanted), size[1], size[0], 3), np.uint8)
        at, picture = 0, _Pictures()
        while at < len(wanted):
            key = keys[bisect.bisect_right(places, wanted[at]) - 1][1]
            container.seek(packets.seek_time(key), stream=stream)
            # Of two packed pictures that are left out the decoder loses what follows.
            rest = None if packets.packed else {order[place] for place in wanted[at:]}
            decoder = _Decoder(container, stream, packets.places, rest)
            before = at
            for number, frame in decoder.frames():
                if decoder.fed is None or (at == before and number is None):
                    return None
                if number == order[wanted[at]]:
                    result[at] = picture(frame, size)
                    at += 1
                    if at == len(wanted):
                        return result
                    # Another key frame that is not in the decoder yet saves what lies between.
                    if keys[bisect.bisect_right(places, wanted[at]) - 1][1] > decoder.fed:
                        break
            if at == before:
                return None
    return result
