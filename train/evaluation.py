"""Measures of a trained model, and its evaluation on a folder of labelled images."""

import csv
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.evaluator import BaseMetric
from timm.data import RealLabelsImagenet
from torch import Tensor
from torch.utils.data import Dataset

from . import prediction_pictures
from .checkpoints import write_atomically
from .class_names import match_classes, read_class_map
from .data import LEFT_OUT, LabelledImages
from .distributed import on_first, process_group
from .images import ImageError, write_broken
from .inference import LoadedModel, batches, check_whole, load_model, share
from .registry import METRICS

__all__ = ['ClassResult', 'Evaluation', 'TopK', 'evaluate', 'label_ranks', 'read_real_labels']

K = (1, 5)
REAL_CLASSES = 1000
NO_PREDICTION = -1  # of logits that are not numbers


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of classes that a sample's logits put before its label: 0 if it is predicted. (B, K), (B,) -> (B,).

    Of equal logits the lower index comes first, as for argmax: a model that can't tell classes apart isn't right. A NaN
    counts against the sample.
    """
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return (~(logits <= own) | ((logits == own) & before)).sum(dim=1)


@METRICS.register_module()
class TopK(BaseMetric):
    """Percentage of samples whose label is among the k classes of the highest logits, as `top<k>` for each k.

    Args:
        k: numbers of classes.
    """

    def __init__(self, k=(1, 5), collect_device: str = 'gpu', **kwargs):
        # mmengine's 'cpu' gathers through files in the current folder, its 'gpu' through the process group of any kind.
        super().__init__(collect_device=collect_device, **kwargs)
        self.k = tuple(k)

    def process(self, data_batch, data_samples) -> None:
        """Take the (images, labels) of a batch and its logits, a row a sample. Labels LEFT_OUT don't count."""
        labels = data_batch[1]
        ranks = label_ranks(torch.stack(list(data_samples)).cpu(), labels.clamp(min=0))
        self.results += ranks.masked_fill(labels == LEFT_OUT, LEFT_OUT).tolist()

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        ranks = [rank for rank in results if rank != LEFT_OUT]
        if not ranks:
            raise ValueError('None of the validation images can be read.')
        return {f'top{k}': _share(sum(rank < k for rank in ranks), len(ranks)) for k in self.k}


def _share(part: int, whole: int) -> float:
    return 100 * part / whole


@dataclass
class ClassResult:
    """Results of one class.

    Attributes:
        index: of the class in the model.
        name: of the class.
        folder: name of its folder, or of several.
        images: its number.
        top1, top5: in per cent of them; top5 is None of a choice of five classes or fewer.
        confused: what it is most often taken for wrongly: (class's name, images).
    """

    index: int
    name: str
    folder: str
    images: int
    top1: float
    top5: float | None
    confused: list[tuple[str, int]]


@dataclass
class Evaluation:
    """How a model does on labelled images.

    Attributes:
        model, data: as they were asked for.
        images: number that counts.
        broken: images that can't be read, which don't count: (name, reason).
        metrics: in per cent. top1, top5: among the classes that the data has. Where those are not all of the model's,
            top1_of_all, top5_of_all: among all. With real labels, real_top1, real_top5: among all, over real_images
            of the images. Nothing is given for k that is not less than the number of classes to choose from.
        real_images: number of images that have real labels; None without.
        not_numbers: images whose logits are not all numbers; they count as wrong.
        num_classes: of the data.
        matched: how the model's class of each folder was found.
        per_class: results of each class of the data, in the order of the model's.
        preprocessing: of the images, as text.
        seconds: that it took, with loading.
        files: written ones, by what they are.
    """

    model: str
    data: str
    images: int
    broken: list[tuple[str, str]]
    metrics: dict[str, float]
    real_images: int | None
    not_numbers: int
    num_classes: int
    matched: str
    per_class: list[ClassResult]
    preprocessing: str
    seconds: float
    files: dict[str, Path]


class _Labelled(Dataset):
    """Samples of LabelledImages as `inference.Images` gives them."""

    def __init__(self, images: LabelledImages, classes: Sequence[int]):
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int):
        try:
            image, label = self.images.read(position)
        except ImageError as error:
            return position, None, (error.name, error.reason), -1
        return position, self.images.transform(image), None, self.classes[label]


def read_real_labels(path: Path | str | None) -> list[list[int]]:
    """ImageNet's reassessed labels (arXiv 2006.07159): of each validation image in order, the classes that are right.

    Args:
        path: real.json of github.com/google-research/reassessed-imagenet; None for the copy that comes with timm.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a list of lists of class indices.
    """
    if path is None:
        names = [f'ILSVRC2012_val_{number + 1:08}.JPEG' for number in range(50_000)]
        return list(RealLabelsImagenet(names).real_labels.values())
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'There is no file of real labels {path}.')
    labels = json.loads(path.read_text())
    if not isinstance(labels, list) or not all(
        isinstance(own, list) and all(isinstance(label, int) for label in own) for own in labels
    ):
        raise ValueError(f'{path} is not a list with a list of class indices for each image.')
    return labels


def _real_of(filename: str, real: Sequence[Sequence[int]]) -> Sequence[int]:
    """The real labels of an image by the number in its name, ILSVRC2012_val_00000001.JPEG being the first."""
    number = re.search(r'(?:^|_)(\d+)$', Path(filename).stem)
    if number is None or not 1 <= int(number[1]) <= len(real):
        raise ValueError(
            f'{filename} has no real labels: its name must end in a number from 1 to {len(real)}, as in '
            'ILSVRC2012_val_00000001.JPEG.'
        )
    return real[int(number[1]) - 1]


def evaluate(
    model: Path | str | LoadedModel,
    data: Path | str,
    *,
    split: str = '',
    reader: str = '',
    class_map: Path | str | None = None,
    real_labels: Path | str | None = None,
    out: Path | str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    on_error: str = 'raise',
    progress: bool = False,
    **loading,
) -> Evaluation:
    """Accuracy of a model on labelled images; over all processes of a run under torchrun, each of which has it.

    Where the data has only some of the model's classes, as ImageNet-A and ImageNet-R have, the predictions are made
    among these, as their authors do; `metrics` has the accuracies among all classes too.

    Args:
        model: a model loaded by `load_model`, or what that takes.
        data: folder of a folder for each class, or what the reader reads.
        split, reader: of `LabelledImages`.
        class_map: file that says which of the model's classes each folder is of, see `class_names.read_class_map`;
            without, see `class_names.match_classes`.
        real_labels: ImageNet's reassessed labels: their file, or 'timm' for timm's copy. Images without any don't count
            in these measures.
        out: folder to write to: metrics.json, classes.csv (a line a class), predictions.csv (a line an image),
            confusion.png, and broken_images.txt if there are any; nothing is written if None.
        batch_size: images at a time.
        workers: processes that read images.
        on_error: what an image that can't be decoded does: 'raise', or 'skip' (it doesn't count, and is listed).
        progress: show a bar.
        loading: other arguments of `load_model`.

    Raises:
        ImageError: an image can't be decoded, and on_error is 'raise'.
        FileNotFoundError: of the data or another file.
        ValueError: classes or real labels that don't fit, or of `load_model` and `LabelledImages`.
    """
    start = time.perf_counter()
    real = None if real_labels is None else read_real_labels(None if str(real_labels) == 'timm' else real_labels)
    mapping = None if class_map is None else read_class_map(class_map)
    with process_group():
        loaded = model if isinstance(model, LoadedModel) else load_model(model, **loading)
        if real is not None and len(loaded.classes) != REAL_CLASSES:
            raise ValueError(f"The real labels are ImageNet-1k's classes; the model has {len(loaded.classes)} classes.")
        images = LabelledImages(data, split, {'type': 'PILToTensor'}, reader, loaded.image_mode)
        images.transform = loaded.transform
        folders, classes, matched = _match(images, loaded, mapping)
        reals = None if real is None else [_real_of(images.filename(i), real) for i in range(len(images))]
        own, broken = _rows(
            loaded, _Labelled(images, classes), sorted(set(classes)), reals, on_error, batch_size, workers, progress
        )
        rows = np.concatenate(all_gather_object(own))
        broken = sorted(item for part in all_gather_object(broken) for item in part)
        check_whole([*rows['position'].tolist(), *(position for position, *_ in broken)], len(images))
        rows.sort(order='position')
        result = _summary(loaded, str(data), rows, broken, folders, classes, matched)
        result.seconds = time.perf_counter() - start
        if out is not None:
            result.files = on_first(_write, Path(out).expanduser(), result, rows, loaded, images)
    return result


def _match(images: LabelledImages, loaded: LoadedModel, mapping) -> tuple[list[str], list[int], str]:
    """Names of the data's classes, the model's class of each, and how that was found."""
    folders = images.metainfo['classes']
    if not folders:  # as of shards, whose labels are indices
        labels = getattr(images.reader, 'labels', None)
        count = len(loaded.classes) if labels is None else int(labels.max()) + 1
        folders = [str(label) for label in range(count if mapping else max(count, len(loaded.classes)))]
        if mapping is None and count <= len(loaded.classes):
            return folders, list(range(len(folders))), 'by their indices'
    return folders, *match_classes(folders, loaded.classes, mapping, loaded.trained_on)


ROW = np.dtype(
    [
        ('position', np.int64),
        ('label', np.int64),  # the model's class
        ('rank', np.int64),  # of the label, among the data's classes
        ('rank_of_all', np.int64),
        ('real_rank', np.int64),  # the best of the real labels'; -1 if there are none
        ('prediction', np.int64),  # among the data's classes
        ('probability', np.float64),  # that it is given
    ]
)


def _rows(
    loaded: LoadedModel,
    dataset: _Labelled,
    candidates: list[int],
    reals: list | None,
    on_error: str,
    batch_size: int,
    workers: int,
    progress: bool,
) -> tuple[np.ndarray, list[tuple[int, str, str]]]:
    """What is to be known of each image of this process, a row each; and the images that can't be read."""
    found, broken = [np.empty(0, ROW)], []
    chosen = torch.tensor(candidates, device=loaded.device)
    for batch in batches(dataset, share(len(dataset), batch_size), workers, on_error, 'evaluating', progress):
        broken += batch.broken
        if batch.images is None:
            continue
        logits = loaded.apply(loaded.model, batch.images)
        labels = batch.labels.to(loaded.device)
        among = logits[:, chosen]
        top = among.softmax(dim=1).max(dim=1)
        is_number = ~logits.isnan().any(dim=1)
        rows = np.empty(len(labels), ROW)
        columns = {
            'label': labels,
            'rank': label_ranks(among, torch.searchsorted(chosen, labels)).where(is_number, logits.shape[1]),
            'rank_of_all': label_ranks(logits, labels).where(is_number, logits.shape[1]),
            'real_rank': _real_ranks(logits, is_number, reals and [reals[position] for position in batch.positions]),
            'prediction': chosen[among.argmax(dim=1)].where(is_number, NO_PREDICTION),
            'probability': top.values,
        }
        rows['position'] = batch.positions
        for name, column in columns.items():
            rows[name] = column.cpu().numpy()
        found.append(rows)
    return np.concatenate(found), broken


def _real_ranks(logits: Tensor, is_number: Tensor, reals: list[Sequence[int]] | None) -> Tensor:
    """The best rank of any of a sample's real labels; -1 if it has none. (B, K) -> (B,)."""
    ranks = torch.full((len(logits),), -1, device=logits.device)
    for i, labels in enumerate(reals or ()):
        if labels:
            right = torch.tensor(labels, device=logits.device)
            ranks[i] = label_ranks(logits[i].expand(len(right), -1), right).min() if is_number[i] else logits.shape[1]
    return ranks


def _accuracies(ranks: np.ndarray, num_classes: int, before: str = '', after: str = '') -> dict[str, float]:
    return {f'{before}top{k}{after}': _share(int((ranks < k).sum()), len(ranks)) for k in K if k < num_classes}


def _summary(loaded: LoadedModel, data: str, rows, broken, folders, classes, matched: str) -> Evaluation:
    if not len(rows):
        raise ValueError(f'None of the images of {data} can be read.')
    num_classes, all_classes = len(set(classes)), len(loaded.classes)
    metrics = _accuracies(rows['rank'], num_classes)
    if num_classes < all_classes:
        metrics |= _accuracies(rows['rank_of_all'], all_classes, after='_of_all')
    real = rows['real_rank'][rows['real_rank'] >= 0]
    if len(real):
        metrics |= _accuracies(real, all_classes, before='real_')
    per_class = []
    for index in sorted(set(classes)):
        of_class = rows[rows['label'] == index]
        measures = _accuracies(of_class['rank'], num_classes) if len(of_class) else {}
        wrong = Counter(of_class['prediction'][of_class['prediction'] != index].tolist())
        per_class.append(
            ClassResult(
                index=index,
                name=loaded.classes[index],
                folder=', '.join(folder for folder, own in zip(folders, classes, strict=True) if own == index),
                images=len(of_class),
                top1=measures.get('top1', float('nan')),
                top5=measures.get('top5'),
                confused=[(_name(loaded, taken), count) for taken, count in wrong.most_common(3)],
            )
        )
    return Evaluation(
        model=loaded.name,
        data=data,
        images=len(rows),
        broken=[(name, reason) for _, name, reason in broken],
        metrics=metrics,
        real_images=len(real) if len(real) else None,
        not_numbers=int((rows['prediction'] == NO_PREDICTION).sum()),
        num_classes=num_classes,
        matched=matched,
        per_class=per_class,
        preprocessing=' '.join(str(loaded.transform).split()),
        seconds=0.0,
        files={},
    )


def _name(loaded: LoadedModel, index: int) -> str:
    return 'not a number' if index == NO_PREDICTION else loaded.classes[index]


def _write(folder: Path, result: Evaluation, rows, loaded: LoadedModel, images: LabelledImages) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        'measures': folder / 'metrics.json',
        'classes': folder / 'classes.csv',
        'predictions': folder / 'predictions.csv',
        'confusion': folder / 'confusion.png',
    }
    classes = [['class', 'folder', 'index', 'images', 'top1', 'top5', 'most often taken for', 'images of these']]
    for own in result.per_class:
        taken, count = own.confused[0] if own.confused else ('', 0)
        top5 = '' if own.top5 is None else f'{own.top5:.2f}'
        classes.append([own.name, own.folder, own.index, own.images, f'{own.top1:.2f}', top5, taken, count])
    predictions = [['file', 'label', 'prediction', 'probability', 'label name', 'prediction name']]
    for row in rows:
        label, prediction = int(row['label']), int(row['prediction'])
        predictions.append(
            [
                images.filename(int(row['position'])),
                label,
                prediction,
                f'{row["probability"]:.4f}',
                loaded.classes[label],
                _name(loaded, prediction),
            ]
        )
    for what, table in (('classes', classes), ('predictions', predictions)):
        write_atomically(files[what], lambda path, table=table: _write_csv(path, table))
    names = {own.index: own.name for own in result.per_class}
    write_atomically(
        files['confusion'],
        lambda path: prediction_pictures.confusion(rows['label'], rows['prediction'], names, path),
    )
    listed = folder / 'broken_images.txt'
    listed.unlink(missing_ok=True)  # of an earlier evaluation
    if result.broken:
        files['broken images'] = listed
        write_broken(listed, result.broken)
    summary = {key: value for key, value in asdict(result).items() if key not in ('per_class', 'files')}
    summary |= loaded.describe()
    write_atomically(files['measures'], lambda path: path.write_text(json.dumps(summary, indent=1) + '\n'))
    return files


def _write_csv(path: Path, table: list[list]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows(table)
