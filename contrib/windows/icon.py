"""Draws the icon: python contrib/windows/icon.py TARGET

A white key on a blue square with round corners, once for each size that Windows asks for. The
same bytes come out everywhere: the pictures are plain bitmaps, for what compresses differs from
one zlib to another.
"""

import math
import struct
import sys
from pathlib import Path

# A notification icon at 100, 125, 150, 200, 250, 300 and 400 %; the last one for folder views.
SIZES = (16, 20, 24, 32, 40, 48, 64, 256)
BLUE = (0x1D, 0x5F, 0x99)
WHITE = (0xFF, 0xFF, 0xFF)

# The key, on a square whose side is 16: its ring, and shaft and teeth as boxes.
RING = (5.5, 8.0, 2.5, 1.0)  # centre, radius, half of the width
BOXES = ((9.0, 7.0, 14.0, 9.0), (10.0, 9.0, 11.0, 11.0), (12.0, 9.0, 14.0, 12.0))
CORNER = 3.0


def outside_box(x: float, y: float, box: tuple[float, ...], corner: float = 0.0) -> float:
    """How far X, Y is outside of BOX with round corners; less than nothing when it is inside."""
    left, top, right, bottom = box
    dx = max(left - x, x - right) + corner
    dy = max(top - y, y - bottom) + corner
    across = math.sqrt(max(dx, 0.0) * max(dx, 0.0) + max(dy, 0.0) * max(dy, 0.0))
    return across + min(max(dx, dy), 0.0) - corner


def outside_key(x: float, y: float) -> float:
    middle_x, middle_y, radius, half = RING
    to_middle = math.sqrt((x - middle_x) * (x - middle_x) + (y - middle_y) * (y - middle_y))
    return min(abs(to_middle - radius) - half, *(outside_box(x, y, box) for box in BOXES))


def covered(outside: float, scale: float) -> float:
    """The part of a pixel that a shape covers, by the distance of its middle to the edge."""
    return min(max(0.5 - outside * scale, 0.0), 1.0)


def pixel(x: float, y: float, scale: float) -> bytes:
    key = covered(outside_key(x, y), scale)
    square = covered(outside_box(x, y, (0.0, 0.0, 16.0, 16.0), CORNER), scale)
    red, green, blue = (round(b + (w - b) * key) for b, w in zip(BLUE, WHITE))
    return bytes((blue, green, red, round(255 * square)))


def picture(size: int) -> bytes:
    """BITMAPINFOHEADER, the pixels from the lowest row to the highest, and the mask of older
    systems, which is as empty as alpha lets it be."""
    header = struct.pack(
        "<IiiHHIIiiII",
        40,  # biSize
        size,  # biWidth
        2 * size,  # biHeight: of pixels and mask
        1,  # biPlanes
        32,  # biBitCount
        0,  # biCompression: BI_RGB
        0,  # biSizeImage: may be 0 for BI_RGB
        0,  # biXPelsPerMeter
        0,  # biYPelsPerMeter
        0,  # biClrUsed
        0,  # biClrImportant
    )
    scale = size / 16
    middles = [(i + 0.5) / scale for i in range(size)]
    pixels = b"".join(pixel(x, y, scale) for y in reversed(middles) for x in middles)
    row_of_mask = bytes((size + 31) // 32 * 4)
    return header + pixels + row_of_mask * size


def icon() -> bytes:
    """ICONDIR, an ICONDIRENTRY for each picture, and the pictures."""
    pictures = [picture(size) for size in SIZES]
    directory = struct.pack("<HHH", 0, 1, len(SIZES))  # idReserved, idType, idCount
    offset = len(directory) + 16 * len(SIZES)
    for size, data in zip(SIZES, pictures):
        side = size % 256  # 0 means 256
        # bWidth, bHeight, bColorCount, bReserved, wPlanes, wBitCount, dwBytesInRes, dwImageOffset
        directory += struct.pack("<BBBBHHII", side, side, 0, 0, 1, 32, len(data), offset)
        offset += len(data)
    return directory + b"".join(pictures)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(icon())
