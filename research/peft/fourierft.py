"""FourierFT: the update is given by a few of its Fourier coefficients (Gao et al., arXiv 2405.03003, section 3).

    W + s Re(IDFT2(C)),    C zero but for C[u_k, v_k] = c_k,  k < n:
    dW[i, j] = s / (in * out) sum_k c_k cos(2 pi (u_k i / in + v_k j / out))

    after   peft {"q": {"fourierft": FourierFt(spectrum[L, n], where[L, 2, n], scale[L])}}

c starts at N(0, 1), as in the paper's algorithm and HF PEFT: a fresh one is not the base, unless `start=zeros`. The
positions (u, v) are uniform, without the paper's preference for a band of frequencies, and the same for all kernels of
one shape. They come from `seed` alone, so that no adapter stores them; those that HF draws with torch's generator are
others, but may be put into `where`.

The real part is the transform of C's Hermitian part, so half the spectrum and a real inverse FFT suffice:
O(in * out * log) a kernel. As 2n cosines and sines it would be a product of rank 2n, which is cheaper only for
2n (in + out) < in * out: not at the default n. The update is made dense.

HF's fourierft_spectrum is spectrum; its indices (2, n) are (v, u), as its kernels are (out, in).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.errors import FlagError, did_you_mean
from research.nn.dot import Plus
from research.nn.sites import LinearNode, Site
from research.peft.method import Card, Method, PyTree, Sites, at_least, constant, leaf, normal, place, select, zeros
from research.peft.shira import places

CARD = Card(paper="2405.03003", kind="reparametrisation", small="frequencies=50,scale=20")
STARTS = {"normal": normal(1.0), "zeros": zeros}


class FourierFt(LinearNode):
    """spectrum [n] trains; where [2, n] int32 are the u and v; scale [] is s."""

    spectrum: Any
    where: Any
    scale: Any
    trained: ClassVar[tuple[str, ...]] = ("spectrum",)

    def weight(self, w: Any, rng: jax.Array | None) -> Plus:
        return Plus(w, self.scale * self.update(*w.shape))

    def update(self, d_in: int, d_out: int) -> jax.Array:
        """Re(IDFT2(C)) [in, out]."""
        width = d_out // 2 + 1
        half = jnp.zeros((d_in, width))
        for u, v in (self.where, -self.where):  # of each coefficient and its mirror image, what lies in the half
            half = half.at[u % d_in, v % d_out].add(self.spectrum / 2, mode="drop")
        return jnp.fft.irfft2(half, (d_in, d_out))


def fourierft(
    frequencies: int = 1000, scale: float = 150.0, seed: int = 777, start: str = "normal", targets: str = "attn/(q|v)"
) -> Method:
    """Fourier coefficients of the update of chosen projections.

    Args:
        frequencies: n, at most all in * out of a kernel.
        scale: s.
        seed: of the positions.
        start: of the coefficients, normal or zeros.
        targets: pattern of linear sites; "all" is every one in the layers.
    Raises FlagError for a value out of range and a pattern without a match.
    """
    at_least("frequencies", frequencies, 1)
    at_least("seed", seed, 0)
    if scale == 0:
        raise FlagError("scale=0.0 would switch the update off: choose another value, such as 150.")
    if start not in STARTS:
        raise FlagError(f"unknown start {start!r}.{did_you_mean(start, STARTS)}")

    def node(site: Site, rng: jax.Array) -> FourierFt:
        d_in, d_out = site.shape
        if frequencies > d_in * d_out:
            raise FlagError(
                f"frequencies={frequencies} is more than a kernel [{d_in}, {d_out}] has: at most {d_in * d_out}."
            )
        flat = places(seed, "", d_in * d_out, frequencies)
        where = np.stack([flat // d_out, flat % d_out]).astype(np.int32)
        return FourierFt(
            leaf(site, rng, STARTS[start], (frequencies,)),
            leaf(site, rng, lambda rng, shape: jnp.broadcast_to(jnp.asarray(where), shape), (2, frequencies)),
            leaf(site, rng, constant(scale), ()),
        )

    def init(rng: jax.Array, sites: Sites) -> PyTree:
        return place(select(sites, "linear", targets), "fourierft", rng, node)

    return Method(init, identity=start == "zeros")
