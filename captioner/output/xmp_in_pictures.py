"""XMP packets in JPEG, PNG and WebP files: read, put in and replaced, every other byte of the file as it was.

Exiv2 could do it, but writes the camera's metadata anew, in another byte order; so it has the packet alone to work on.
Formats: XMP Specification Part 3 (Adobe 2020), PNG 3rd edition, WebP container specification.
"""

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_JPEG_XMP, _PNG_XMP = b"http://ns.adobe.com/xap/1.0/\0", b"XML:com.adobe.xmp\0"
_LARGEST_PACKET = 2**26  # bytes
_WEBP_HAS_XMP, _WEBP_HAS_ALPHA = 0x04, 0x10


class Unsuitable(Exception):
    """Why a file is left as it is."""


def packet_of(content: bytes) -> bytes | None:
    """The XMP packet of a file; None: it has none.

    Raises:
        Unsuitable: the file is damaged, or of another format.
    """
    packets = [packet for packet in map(_packet_in(content), _parts(content)) if packet is not None]
    if len(packets) > 1:
        raise Unsuitable("it holds several XMP packets")
    return packets[0] if packets else None


def with_packet(content: bytes, packet: bytes) -> bytes:
    """The file with that packet instead of its own, or besides what it has.

    Raises:
        Unsuitable: the file is damaged or of another format, or the packet has no place in it.
    """
    read, parts = _packet_in(content), _parts(content)
    packet_of(content)
    there = next((i for i, part in enumerate(parts) if read(part) is not None), None)
    if content.startswith(_JPEG):
        own = _jpeg_part(packet)
        if there is not None and len(own) != len(parts[there]) and any(p[4:8] == b"MPF\0" for p in parts[:there]):
            raise Unsuitable("it holds several pictures, whose distances would change")
        after_head = next(i for i, p in enumerate(parts) if i and p[:2] != b"\xff\xe0" and p[4:8] != b"Exif")
    elif content.startswith(_PNG):
        own, after_head = _png_part(packet), 2
    else:
        own, after_head = _chunk(b"XMP ", packet), len(parts) - 1
        if not any(part.startswith(b"VP8X") for part in parts):
            parts.insert(1, _vp8x(content))
            after_head += 1
        parts = [_with_flag(part) if part.startswith(b"VP8X") else part for part in parts]
    if there is None:
        parts.insert(after_head, own)
    else:
        parts[there] = own
    if _is_webp(content):
        parts[0] = struct.pack("<4sI4s", b"RIFF", 4 + sum(map(len, parts[1:-1])), b"WEBP")
    return b"".join(parts)


def _is_webp(content: bytes) -> bool:
    return content[:4] == b"RIFF" and content[8:12] == b"WEBP"


def _parts(content: bytes) -> list[bytes]:
    """The head of a file, its segments or chunks, and what follows them; together they are the file."""
    at, parts = (12 if _is_webp(content) else len(_PNG) if content.startswith(_PNG) else 2), []
    parts.append(content[:at])
    try:
        if content.startswith(_JPEG):
            while content[at + 1] != 0xDA:  # the first scan
                marker, size = struct.unpack_from(">HH", content, at)
                if not 0xFFC0 <= marker <= 0xFFFE or 0xFFD0 <= marker <= 0xFFD9:
                    raise Unsuitable(f"it is no orderly JPEG file at byte {at:,}")
                parts.append(content[at : at + 2 + size])
                at += 2 + size
        elif content.startswith(_PNG):
            name = b""
            while name != b"IEND":
                size, name = struct.unpack_from(">I4s", content, at)
                parts.append(content[at : at + 12 + size])
                at += 12 + size
        elif _is_webp(content):
            end = 8 + struct.unpack_from("<I", content, 4)[0]
            while at < end:
                (size,) = struct.unpack_from("<I", content, at + 4)
                parts.append(content[at : at + 8 + size + size % 2])
                at += 8 + size + size % 2
        else:
            raise Unsuitable("only JPEG, PNG and WebP files take it inside")
    except (struct.error, IndexError):
        at = len(content) + 1
    if at > len(content):
        raise Unsuitable("it is cut off")
    return [*parts, content[at:]]


def _packet_in(content: bytes) -> Callable[[bytes], bytes | None]:
    """What takes the packet out of a part of such a file; None: there is none in this part."""
    return _jpeg_packet if content.startswith(_JPEG) else _png_packet if content.startswith(_PNG) else _webp_packet


def _jpeg_packet(part: bytes) -> bytes | None:
    is_xmp = part.startswith(b"\xff\xe1") and part.startswith(_JPEG_XMP, 4)
    return part[4 + len(_JPEG_XMP) :] if is_xmp else None


def _webp_packet(part: bytes) -> bytes | None:
    return part[8 : 8 + struct.unpack_from("<I", part, 4)[0]] if part.startswith(b"XMP ") else None


def _jpeg_part(packet: bytes) -> bytes:
    size = 2 + len(_JPEG_XMP) + len(packet)
    if size >= 2**16:
        raise Unsuitable("its XMP is too long for a JPEG file")
    return struct.pack(">HH", 0xFFE1, size) + _JPEG_XMP + packet


def _png_packet(part: bytes) -> bytes | None:
    if not part.startswith(b"iTXt" + _PNG_XMP, 4):
        return None
    flags, text = part[8 + len(_PNG_XMP) :][:2], part[8 + len(_PNG_XMP) + 2 : -4]
    try:
        text = text.split(b"\0", 2)[2]  # after the language and the translated keyword
        return _decompressed(text) if flags[:1] == b"\1" else text
    except (IndexError, zlib.error) as error:
        raise Unsuitable("its XMP is damaged") from error


def _decompressed(data: bytes) -> bytes:
    """A few bytes may stand for gigabytes."""
    inflated = zlib.decompressobj()
    text = inflated.decompress(data, _LARGEST_PACKET)
    if not inflated.eof:
        raise Unsuitable("its XMP is too long" if inflated.unconsumed_tail else "its XMP is damaged")
    return text


def _png_part(packet: bytes) -> bytes:
    data = b"iTXt" + _PNG_XMP + b"\0\0\0\0" + packet
    return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _vp8x(content: bytes) -> bytes:
    """The header that makes a simple WebP file an extended one."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            (width, height), alpha = image.size, "A" in image.getbands()
    except Exception as error:  # damaged pictures raise many kinds
        raise Unsuitable(f"it is damaged ({error})") from error
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return _chunk(b"VP8X", struct.pack("<I", _WEBP_HAS_ALPHA if alpha else 0) + sizes)


def _with_flag(vp8x: bytes) -> bytes:
    return vp8x[:8] + bytes([vp8x[8] | _WEBP_HAS_XMP]) + vp8x[9:]
