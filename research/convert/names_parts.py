"""What the tables of names of several families share."""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A leaf of ours, its name in their files (`{i}` is the layer) and the letters of its shape, in our order.

    conv: a kernel that is `[in, out]` in their files too. part: where their tensor is q, k and v along its last axis
    (in our order), which of the three this leaf is. top: their name has never a prefix. form: how they store what is
    of another rank there: "patches", "batched" (one axis of 1 more) or "flat" (one less).
    """

    ours: str
    theirs: str
    shape: str
    conv: bool = False
    part: int | None = None
    top: bool = False
    form: str | None = None

    @property
    def transposed(self) -> bool:
        return self.ours.endswith("kernel") and not self.conv and self.form is None


def pairs(ours: str, theirs: str, kernel: str, bias: str | None = None, **more: Any) -> list[Row]:
    """A projection: kernel `[in, out]` and, if `bias` names its letter, a bias."""
    rows = [Row(f"{ours}/kernel", f"{theirs}.weight", kernel, **more)]
    return rows + ([Row(f"{ours}/bias", f"{theirs}.bias", bias, **more)] if bias else [])


def fused(theirs: str, **more: Any) -> list[Row]:
    """Query, key and value that are one projection there."""
    return [row for i, x in enumerate("qkv") for row in pairs(f"layers/attn/{x}", theirs, "D D", "D", part=i, **more)]


def norm(ours: str, theirs: str) -> list[Row]:
    """A layer norm."""
    return [Row(f"{ours}/scale", f"{theirs}.weight", "D"), Row(f"{ours}/bias", f"{theirs}.bias", "D")]
