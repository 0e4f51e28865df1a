"""Pictures of dense predictions beside the truth: boxes, masks and class maps. Each function writes one PNG."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import Hook
from torch import Tensor

from ..checkpoints import write_atomically
from ..registry import HOOKS

__all__ = ['DensePictures', 'draw', 'draw_all', 'palette']

PANEL = 2.6  # inches, the width of one
THRESHOLD = 0.5  # least score of what is drawn
MOST_NAMED = 40  # classes in a legend
MASK, MAP = 0.6, 0.7  # opacity of instance masks and of class maps
IGNORED = (255, 255, 255)
COLOURS = (  # told apart well, the first ones best
    '#e6194b',
    '#3cb44b',
    '#ffe119',
    '#4363d8',
    '#f58231',
    '#911eb4',
    '#42d4f4',
    '#f032e6',
    '#bfef45',
    '#fabed4',
    '#469990',
    '#dcbeff',
    '#9a6324',
    '#fffac8',
    '#800000',
    '#aaffc3',
    '#808000',
    '#ffd8b1',
    '#000075',
    '#a9a9a9',
)
CLEAR = ('background', 'canvas')  # names of a class 0 that is not tinted
GOLDEN = 0.618034


def palette(count: int) -> np.ndarray:
    """Colours of classes 0 to count - 1, always the same: uint8 (count, 3)."""
    fixed = [tuple(bytes.fromhex(colour[1:])) for colour in COLOURS]
    others = [
        tuple(
            round(255 * value)
            for value in colorsys.hsv_to_rgb(i * GOLDEN % 1, (0.9, 0.55)[i % 2], (1, 0.75)[i // 2 % 2])
        )
        for i in range(count - len(fixed))
    ]
    return np.array([*fixed, *others][:count], np.uint8).reshape(-1, 3)


def draw(
    image: Tensor,
    prediction: dict,
    truth: dict,
    classes: Sequence[str],
    path: Path | str,
    threshold: float = THRESHOLD,
) -> None:
    """One image: as it is, with the truth, and with what is predicted. See `draw_all`."""
    draw_all([(image, prediction, truth)], classes, path, threshold)


def draw_all(
    samples: Sequence[tuple[Tensor, dict, dict]],
    classes: Sequence[str],
    path: Path | str,
    threshold: float = THRESHOLD,
    title: str = '',
) -> None:
    """Images in threes: as they are, and in grey with the truth and with what is predicted; with a legend of classes.

    Args:
        samples: of each image (uint8 (C, H, W)) its prediction and truth, as `zoo.train.dense` describes them.
        classes: names of the classes.
        path: the PNG to write.
        threshold: detections of lower scores are not drawn.
        title: of the whole.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError('There are no samples to draw.')
    across = min(2, len(samples))  # samples a row
    rows = -(-len(samples) // across)
    height, width = np.median([image.shape[-2:] for image, *_ in samples], axis=0)
    size = 3 * across * PANEL, rows * (PANEL * height / width + 0.3) + 0.8
    figure = Figure(figsize=size, layout='constrained')
    figure.suptitle(title)
    colours = palette(len(classes))
    for axes in figure.subplots(rows, 3 * across, squeeze=False).flat:
        axes.set_axis_off()
        axes.set_anchor('N')
    seen = set()
    for i, (image, prediction, truth) in enumerate(samples):
        own = figure.axes[3 * i : 3 * i + 3]
        own[0].imshow(_pixels(image).astype(np.uint8))
        seen |= _panel(own[1], image, truth, classes, colours, threshold)
        seen |= _panel(own[2], image, prediction, classes, colours, threshold)
        for axes, caption in zip(own, (Path(str(truth.get('name', ''))).name, 'truth', 'prediction'), strict=True):
            axes.set_title(caption, fontsize=9, loc='left')
    shown = sorted(seen)[:MOST_NAMED]
    handles = [Patch(facecolor=colours[i] / 255, edgecolor='gray', label=classes[i]) for i in shown]
    if handles:
        widest = max(len(classes[i]) for i in shown)
        columns = max(1, int(12 * size[0] / (8 + widest)))  # 12 letters an inch
        figure.legend(
            handles=handles, loc='outside lower center', ncols=min(columns, len(shown)), fontsize=9, frameon=False
        )
    figure.savefig(path, dpi=110, format='png')


def _panel(axes, image: Tensor, found: dict, classes: Sequence[str], colours: np.ndarray, threshold: float) -> set[int]:
    """Draw an image with a prediction or truth on it; gives the classes that it shows."""
    pixels = _pixels(image).mean(axis=2, keepdims=True).repeat(3, axis=2)  # colours are the classes'
    if 'mask' in found:
        axes.imshow(_tinted(pixels, _array(found['mask']), classes, colours), interpolation='nearest')
        present = np.unique(_array(found['mask']))
        return {int(i) for i in present if i < len(classes) and not _is_clear(i, classes)}
    boxes, labels = _array(found['boxes']), _array(found['labels'])
    scores = _array(found['scores']) if 'scores' in found else None
    order = [i for i in range(len(labels)) if scores is None or scores[i] >= threshold]
    masks = found.get('masks')
    if masks is not None:
        for i in reversed(order):  # the surest on top
            inside = _array(masks[i]).astype(bool)
            pixels[inside] = (1 - MASK) * pixels[inside] + MASK * colours[labels[i]]
    axes.imshow(pixels.round().astype(np.uint8), interpolation='nearest')
    for i in reversed(order):
        (x0, y0, x1, y1), colour = boxes[i], colours[labels[i]]
        axes.add_patch(
            Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour / 255, linewidth=1.5)
        )
        text = classes[labels[i]] if scores is None else f'{classes[labels[i]]} {100 * scores[i]:.0f}%'
        is_high = y0 > pixels.shape[0] * 0.08  # there is space above
        axes.text(
            x0 - 0.5,
            y0 - 0.5 if is_high else y1 - 0.5,
            text,
            fontsize=7,
            color='black' if colour @ (0.3, 0.6, 0.1) > 130 else 'white',
            verticalalignment='bottom' if is_high else 'top',
            bbox={'facecolor': colour / 255, 'edgecolor': 'none', 'pad': 0.8, 'alpha': 0.85},
            clip_on=True,
        )
    return {int(labels[i]) for i in order}


def _tinted(pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str], colours: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) under the colours of their classes (H, W); white where none counts."""
    known = labels < len(classes)
    tints = np.where(known[..., None], colours[np.where(known, labels, 0)], IGNORED)
    opacity = np.full(labels.shape, MAP)
    if _is_clear(0, classes):
        opacity[labels == 0] = 0
    return ((1 - opacity[..., None]) * pixels + opacity[..., None] * tints).round().astype(np.uint8)


def _is_clear(index: int, classes: Sequence[str]) -> bool:
    return index == 0 and classes[0].lower() in CLEAR


def _pixels(image: Tensor) -> np.ndarray:
    pixels = _array(image).astype(float)
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].repeat(3, axis=0)
    return pixels.transpose(1, 2, 0).copy()


def _array(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


@HOOKS.register_module()
class DensePictures(Hook):
    """Draw predictions.png in the run's folder after each validation: the first images with truth and prediction.

    Where several processes validate, the first images of the first process.

    Args:
        count: number of images.
        threshold: detections of lower scores are not drawn.
    """

    def __init__(self, count: int = 8, threshold: float = THRESHOLD):
        if count < 1:
            raise ValueError(f'count must be at least 1, got {count}.')
        self.count = count
        self.threshold = threshold
        self.samples: list[tuple[Tensor, dict, dict]] = []

    def before_val_epoch(self, runner) -> None:
        self.samples = []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if is_main_process():
            for image, truth, prediction in zip(*data_batch, outputs, strict=True):
                if len(self.samples) < self.count:
                    self.samples.append((image, self._kept(prediction), truth))

    @master_only
    def after_val_epoch(self, runner, metrics=None) -> None:
        if self.samples:
            write_atomically(
                Path(runner.work_dir, 'predictions.png'),
                lambda path: draw_all(
                    self.samples,
                    runner.val_dataloader.dataset.metainfo['classes'],
                    path,
                    self.threshold,
                    title=f'After {runner.iter} iterations',
                ),
            )
        self.samples = []

    def _kept(self, prediction: dict) -> dict:
        """What is to be drawn of a prediction, off the model's device."""
        keep = prediction['scores'] >= self.threshold if 'scores' in prediction else slice(None)
        return {name: value[keep].cpu() for name, value in prediction.items() if isinstance(value, torch.Tensor)}
