"""Where a vision transformer looks: its attention rollout over sample images, as a picture."""

from pathlib import Path

import jax
import numpy as np

from experiments.shared import images
from experiments.shared.vit_base import VitBase
from research.data.images import Images
from research.peft.method import Variables
from research.train import plot
from research.vision.rollout import rollout

MOST = 8  # images


def draw(base: VitBase, variables: Variables, test: Images, found: np.ndarray, png: Path) -> None:
    """The first image of each class, at most eight, with the share of each patch laid over it below.

    variables: realised. found: the class number of each row; where it is wrong it stands behind the true one.
    """
    rows = np.unique(test.labels, return_index=True)[1][:MOST]
    sized, normal = images.pixels(base)
    look = jax.jit(lambda v, x: (sized(x), rollout(base.model, v, normal(sized(x)))))
    pictures, maps = jax.device_get(look(variables, test.images[rows]))
    figure = plot.figure(1.5 * len(rows), 3.4)
    for place, row in enumerate(rows):
        true, guess = test.classes[test.labels[row]], test.classes[found[row]]
        for line, title in enumerate((true if true == guess else f"{true} → {guess}", "")):
            axes = figure.add_subplot(2, len(rows), line * len(rows) + place + 1)
            axes.imshow(pictures[place].squeeze(), cmap="gray", vmin=0, vmax=1)
            if line:
                side = pictures.shape[1] - 0.5
                axes.imshow(maps[place], cmap="inferno", alpha=0.65, vmin=0, extent=(-0.5, side, side, -0.5))
            axes.set_title(title, fontsize=7)
            axes.axis("off")
    plot.save(figure, png)
