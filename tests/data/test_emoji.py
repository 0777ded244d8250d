"""Emoji: names and groups as Unicode lists them; a font that is none is named. The pictures need the packages."""

from pathlib import Path

import pytest

from research.data import emoji
from research.errors import DataError

LISTED = """# emoji-test.txt
# group: Smileys & Emotion
# subgroup: face-smiling
1F600 ; fully-qualified # \U0001f600 E1.0 grinning face
263A FE0F ; fully-qualified # \u263a\ufe0f E0.6 smiling face
263A ; unqualified # \u263a E0.6 smiling face
# group: People & Body
1F44B 1F3FB ; fully-qualified # \U0001f44b\U0001f3fb E1.0 waving hand: light skin tone
1F3FB ; component # \U0001f3fb E1.0 light skin tone
1F44B ; fully-qualified # \U0001f44b E0.6 waving hand
"""


def test_names_and_groups_of_single_characters(tmp_path: Path):
    (tmp_path / "list.txt").write_text(LISTED, encoding="utf-8")
    smileys = [("\U0001f600", "grinning face"), ("\u263a", "smiling face")]
    expected = [(*row, "Smileys & Emotion") for row in smileys] + [("\U0001f44b", "waving hand", "People & Body")]
    assert emoji.names(tmp_path / "list.txt") == expected
    (tmp_path / "none.txt").write_text("# group: Smileys", encoding="utf-8")
    with pytest.raises(DataError, match="no emoji"):
        emoji.names(tmp_path / "none.txt")


def test_a_file_that_is_no_font_is_named(tmp_path: Path):
    (tmp_path / "font.ttf").write_bytes(b"no")
    with pytest.raises(DataError, match="font.ttf: Pillow can't draw"):
        emoji.pictures(tmp_path / "font.ttf", ["a"])
