"""Video files, decoded sparsely with PyAV on one thread. The only module that knows FFmpeg."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image

from openm3.errors import PromptError
from openm3.tokens.sources import MediaLimits

# FFmpeg is told the container, and so never tries the many formats that can name other files or addresses.
_DEMUXERS = {"MP4": "mov", "MOV": "mov", "Matroska": "matroska", "AVI": "avi"}


class VideoFile(AbstractContextManager["VideoFile"]):
    """The first video stream of a file: `seconds` at which its frames are shown, ascending from 0, and `duration`.

    Raises PromptError, also while iterating, for a file that holds no video or exceeds `limits`.
    """

    def __init__(self, data: bytes, name: str, limits: MediaLimits) -> None:
        self._limits = limits
        self._name = name
        options = {"max_pixels": str(limits.frame_pixels)}
        try:
            self._container = av.open(
                io.BytesIO(data),
                mode="r",
                format=_DEMUXERS[name],
                options=options,
                metadata_errors="replace",
                buffer_size=1 << 18,
                io_open=_refuse_other_files,
            )
        except Exception as error:
            raise _damaged(error) from None
        try:
            self._read(options)
        except Exception as error:
            self._container.close()
            raise error if isinstance(error, PromptError) else _damaged(error) from None

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def frames(self, chosen: Sequence[int]) -> Iterator[tuple[float, Image.Image]]:
        """The chosen frames in ascending order with their times, upright and in RGB.

        Those that cannot be decoded are left out. Raises PromptError if none can.
        """
        wanted = [self._pts[i] for i in chosen]
        found = False
        waiting = wanted[::-1]
        for frame in self._decoded(set(wanted)):
            pts = frame.dts if frame.pts is None else frame.pts
            if pts is None or pts < waiting[-1]:
                continue
            while waiting and waiting[-1] <= pts:
                waiting.pop()
            found = True
            yield (pts - self._pts[0]) * self._tick, _upright(frame, self._limits)
            if not waiting:
                return
        if not found:
            raise PromptError("no frame of the video can be decoded: it is damaged or was cut off")

    def _read(self, options: dict[str, str]) -> None:
        """Choose the stream, keep its packets, and work out from them when frames are shown."""
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise PromptError("the file holds no video, only sound or pictures")
        stream = streams[0]
        self._context = stream.codec_context
        if self._context is None:
            raise PromptError("the video is of a kind that this build of FFmpeg cannot decode")
        width, height = self._context.width, self._context.height
        if width * height > self._limits.frame_pixels:
            raise PromptError(f"the video is {width}x{height} pixels, more than {self._limits.frame_pixels:,} together")
        self._context.options = options
        self._context.thread_count = 1
        if stream.frames > self._limits.video_frames:
            raise PromptError(f"the video claims {stream.frames:,} frames, more than {self._limits.video_frames:,}")
        self._packets = self._demuxed(stream)
        self._tick = float(stream.time_base or 1 / 1000)
        self._pts = sorted({packet.pts for packet in self._packets if packet.pts is not None and not packet.is_discard})
        if not self._pts:
            raise PromptError("the video holds no frames: it is damaged or was cut off")
        self.seconds = [(pts - self._pts[0]) * self._tick for pts in self._pts]
        # The last frame stays as long as the others on average.
        self.duration = self.seconds[-1] * (1 + 1 / max(1, len(self._pts) - 1))
        if self.duration > self._limits.video_seconds:
            raise PromptError(f"the video lasts {self.duration:,.0f} s, more than {self._limits.video_seconds:,.0f} s")

    def _demuxed(self, stream: av.VideoStream) -> list[av.Packet[av.VideoStream]]:
        """All packets of the stream that are there, every one with a time."""
        packets: list[av.Packet[av.VideoStream]] = []
        try:
            for packet in self._container.demux(stream):
                if not packet.size:
                    continue
                if packet.pts is None or self._name == "AVI":
                    packet.pts = packet.dts if packet.dts is not None else len(packets)
                packets.append(packet)
                if len(packets) > self._limits.video_frames:
                    raise PromptError(f"the video has more than {self._limits.video_frames:,} frames")
        except FFmpegError:
            pass  # Cut off: what came before is there.
        return packets

    def _decoded(self, wanted: set[int]) -> Iterator[av.VideoFrame]:
        """Frames in the order they are shown: those of the wanted times, and others that had to be decoded for them."""
        if self._name == "AVI":
            # It says when packets are decoded, not when frames are shown: they come in order, one a packet.
            frames = (frame for packet in [*self._packets, None] for frame in _tolerant(self._context, packet))
            for pts, frame in zip(self._pts, frames, strict=False):
                frame.pts = pts
                yield frame
            return
        fed = False
        for packet, needed in zip(self._packets, self._needed(wanted), strict=True):
            if needed:
                # What nothing refers to costs nothing.
                self._context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                yield from _tolerant(self._context, packet)
            elif fed:
                yield from _tolerant(self._context, None)
                self._context.flush_buffers()
            fed = needed
        yield from _tolerant(self._context, None)

    def _needed(self, wanted: set[int]) -> list[bool]:
        """Which packets must be decoded: for each wanted one those from the keyframe before it on."""
        needed = [False] * len(self._packets)
        keys: list[int] = []
        start = end = 0
        for i, packet in enumerate(self._packets):
            if packet.is_keyframe:
                keys.append(i)
            if packet.pts in wanted:
                # A frame shown before its keyframe belongs to the one before.
                fitting = (key for key in reversed(keys[-8:]) if _pts(self._packets[key]) <= _pts(packet))
                key = next(fitting, 0)
                first = end if key == start else key
                needed[first : i + 1] = [True] * (i + 1 - first)
                start, end = key, i + 1
        return needed


def _pts(packet: av.Packet[av.VideoStream]) -> int:
    assert packet.pts is not None  # `_demuxed` has seen to it
    return packet.pts


def _tolerant(context: av.VideoCodecContext, packet: av.Packet[av.VideoStream] | None) -> list[av.VideoFrame]:
    """The frames that a packet completes, or, for None, all that are left; none if it is damaged."""
    try:
        return context.decode(packet)
    except Exception:  # a decoder can fail in any way on such bytes
        return []


def _upright(frame: av.VideoFrame, limits: MediaLimits) -> Image.Image:
    if frame.width * frame.height > limits.frame_pixels:
        raise PromptError(f"a frame of the video has more than {limits.frame_pixels:,} pixels")
    try:
        frame_HWC = frame.to_ndarray(format="rgb24", threads=1)
        return Image.fromarray(np.ascontiguousarray(np.rot90(frame_HWC, round(frame.rotation / 90))))
    except Exception as error:
        raise _damaged(error) from None


def _refuse_other_files(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise PermissionError("a video may not name other files")


def _damaged(error: Exception) -> PromptError:
    reason = getattr(error, "strerror", None) or str(error)
    return PromptError(f"the video is damaged or was cut off: {reason or type(error).__name__}")
