"""Compressed frames that say their own size, read without decoding them."""

import struct

# SOF0 to SOF15 without DHT, JPG and DAC, and SOF55 of JPEG-LS
_STARTS_OF_FRAME = {*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC}


def frame_size(frame: bytes) -> tuple[int, int] | None:
    """Returns rows and columns of a frame of JPEG, JPEG-LS, JPEG 2000 or PNG; None if it is none of them.

    Pillow does not read the headers of frames of 12 and 16 bits, and pydicom and tifffile read them when they decode.
    """
    if frame.startswith(b"\x89PNG"):
        columns, rows = struct.unpack_from(">II", frame, 16)  # of the first chunk, IHDR
        return rows, columns
    if not frame.startswith(b"\xff\xd8"):  # SOI of JPEG and JPEG-LS
        start = frame.find(b"\xff\x4f\xff\x51")  # SOC and SIZ, ISO/IEC 15444-1, A.5.1; a JP2 file has boxes before
        if start < 0:
            return None
        right, bottom, left, top, *_, components = struct.unpack_from(">8IH", frame, start + 8)
        if components > 4:  # up to 16384, each of which would be decoded
            raise ValueError(f"a frame of JPEG 2000 must have at most 4 components, got {components}")
        return bottom - top, right - left
    place = 2
    while place < len(frame):  # segments, ISO/IEC 10918-1, B.1.1.3 and B.2.2
        marker, length = struct.unpack_from(">HH", frame, place)
        if marker == 0xFFFF:  # a fill byte
            place += 1
        elif marker in _STARTS_OF_FRAME:
            return struct.unpack_from(">HH", frame, place + 5)
        else:
            place += 2 + length
    return None
