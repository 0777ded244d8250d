"""Emoji as captioned images: the pictures in Noto Color Emoji, with Unicode's names and groups of them (UTS #51).

    😀  "grinning face", of "Smileys & Emotion"

Only emoji of one code point are taken, 1,377 in nine groups: of people the font has one picture for every tone of skin,
and of flags one for every country, whose names would be most of the captions.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from research.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 109  # the only one that the font's bitmaps have, in pixels an em
WIDTH, HEIGHT = 136, 128  # of a bitmap
VARIATION = 0xFE0F  # asks for the coloured picture, and is none itself


def names(path: Path) -> list[tuple[str, str, str]]:
    """(character, name, group) of emoji-test.txt, in its order. Raises DataError where it has none."""
    found, group = [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        codes, _, about = line.partition(";")
        status, _, comment = about.partition("#")  # 😀 E1.0 grinning face
        if status.strip() != "fully-qualified":
            continue
        points = [int(code, 16) for code in codes.split() if int(code, 16) != VARIATION]
        if len(points) == 1:
            found.append((chr(points[0]), comment.split(maxsplit=2)[2].strip(), group))
    if not found:
        raise DataError(f"{path}: no emoji in it.")
    return found


def pictures(font: Path, characters: list[str]) -> "list[Image]":
    """Each as an RGB image of 136x136 on white. Raises DataError for a font that can't be read."""
    from PIL import Image, ImageDraw, ImageFont

    try:
        face = ImageFont.truetype(font, SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise DataError(f"{font}: Pillow can't draw with it ({error}).") from None
    found = []
    for character in characters:
        page = Image.new("RGB", (WIDTH, WIDTH), "white")
        ImageDraw.Draw(page).text((0, (WIDTH - HEIGHT) // 2), character, font=face, embedded_color=True)
        found.append(page)
    return found
