"""Videos of which every frame shows its own number, made by FFmpeg; and what FFmpeg reads of them.

Imports nothing of MXNet.
"""

import os
import re
import struct
import subprocess

import imageio_ffmpeg
import numpy as np

INPUTS = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "inputs", "videos"
)
BITS, SIZE = 10, (176, 96)
# A static FFmpeg dies where it loads the C library's character sets (MPEG-TS).
ENVIRONMENT = {**os.environ, "GCONV_PATH": "/nonexistent"}
X264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-threads", "1")


def ffmpeg(*arguments, **more):
    """Run FFmpeg and return the finished process."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT, **more)


def frame(number, size=SIZE, shade=0):
    """Return a moving texture with the number as ten black or white blocks in the top row."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    wave = 128 + 50 * np.sin((x + 3 * number) / 9) + 30 * np.cos((y - 2 * number) / 7) + shade
    wave = wave.clip(0, 255)
    picture = np.stack([wave, wave * 0.9, 255 - wave], -1).astype(np.uint8)
    for bit in range(BITS):
        picture[:16, 16 * bit : 16 * bit + 16] = 255 * (number >> bit & 1)
    # Two corners tell mirrored and turned pictures apart.
    picture[-16:, :16] = 255, 0, 0
    picture[-16:, -16:] = 0, 255, 0
    return picture


def number_of(picture):
    """Return the number that a frame shows."""
    blocks = picture[4:12, : 16 * BITS].reshape(8, BITS, 16, 3)[:, :, 4:12].mean((0, 2, 3))
    return int(sum(1 << bit for bit, value in enumerate(blocks) if value > 127))


def make(path, frames, *arguments, rate=25, size=SIZE, shade=0):
    """Encode ``frames`` numbered frames; return the path."""
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", rate)
    content = b"".join(frame(number, size, shade).tobytes() for number in range(frames))
    ffmpeg(*raw, "-i", "-", *arguments, path, input=content)
    return path


def truth(path):
    """Return the frames that FFmpeg gives when it decodes a file from its start."""
    pictures = ("-fps_mode", "passthrough", "-c:v", "ppm", "-pix_fmt", "rgb24", "-f", "image2pipe")
    content = ffmpeg("-i", path, "-an", "-sn", "-dn", *pictures, "-").stdout
    frames, at = [], 0
    while at < len(content):
        head = re.compile(rb"P6\s(\d+) (\d+)\s255\s").match(content, at)
        width, height = int(head[1]), int(head[2])
        pixels = np.frombuffer(content, np.uint8, width * height * 3, head.end())
        frames.append(pixels.reshape(height, width, 3))
        at = head.end() + pixels.size
    return frames


def packed(path, frames, gop):
    """Write an AVI of MPEG-4 with packed B-frames (DivX), as HMDB51 has them."""
    stream = os.fspath(path) + ".m4v"
    make(stream, frames, "-c:v", "mpeg4", "-bf", 1, "-g", gop, "-q:v", 4, "-f", "m4v")
    with open(stream, "rb") as file:
        content = file.read()
    pictures = [match.start() for match in re.finditer(b"\0\0\1\xb6", content)]
    starts = [0]
    for before, at in zip(pictures, pictures[1:]):
        # Headers before a picture belong to it.
        head = re.search(b"\0\0\1[\xb0\xb5\0-\x2f\xb2\xb3]", content[before + 4 : at])
        starts.append(before + 4 + head.start() if head else at)
    units = [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)])]
    kinds = ["IPBS"[content[at + 4] >> 6] for at in pictures]
    at = units[0].find(b"\0\0\1\xb2")
    rest = re.sub(rb"\x00\x00\x01\xb2Lavc[^\x00]*", b"", units[0][at:])
    units[0] = units[0][:at] + b"\0\0\1\xb2DivX503b1393p\0" + rest
    chunks, number = [], 0
    while number < len(units):
        pair = number + 1 < len(units) and kinds[number + 1] == "B"
        both = units[number] + (units[number + 1] if pair else b"")
        chunks.append((both, kinds[number] == "I"))
        if pair:
            chunks.append((b"\0\0\1\xb6\x50\x4f", False))
        number += 1 + pair
    write_avi(path, chunks)
    os.remove(stream)
    return path


def write_avi(path, chunks, code=b"DX50"):
    """Write chunks (bytes, whether it is a key frame) as an AVI of 25 frames a second."""

    def chunk(name, data):
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) & 1)

    width, height = SIZE
    movie, index = b"movi", b""
    for data, key in chunks:
        index += b"00dc" + struct.pack("<III", 0x10 * key, len(movie), len(data))
        movie += chunk(b"00dc", data)
    count = len(chunks)
    header = struct.pack("<14I", 40000, 0, 0, 0x10, count, 0, 1, 100000, width, height, 0, 0, 0, 0)
    numbers = (0, 0, 0, 0, 1, 25, 0, count, 100000, 0xFFFFFFFF, 0, 0, 0, width, height)
    stream = b"vids" + code + struct.pack("<IHHIIIIIIIIhhhh", *numbers)
    sizes = (40, width, height, 1, 24, code, width * height * 3, 0, 0, 0, 0)
    described = chunk(b"strh", stream) + chunk(b"strf", struct.pack("<IiiHH4sIiiII", *sizes))
    headers = b"hdrl" + chunk(b"avih", header) + chunk(b"LIST", b"strl" + described)
    body = b"AVI " + chunk(b"LIST", headers) + chunk(b"LIST", movie) + chunk(b"idx1", index)
    with open(path, "wb") as file:
        file.write(chunk(b"RIFF", body))
