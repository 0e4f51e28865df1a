"""Labelled images through timm's readers, with errors that name the file or folder at fault."""

import warnings
from pathlib import Path

import numpy as np
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from PIL import Image
from rich.console import Console
from timm.data import create_transform
from timm.data.readers import create_reader
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .augmentation import keep_no_bits
from .images import EXTENSIONS, ImageError, append_broken, collect_broken, decode
from .registry import DATASETS, HOOKS, TRANSFORMS
from .seeding import seed_everything
from .shards import ShardReader

__all__ = [
    'LEFT_OUT',
    'BrokenImages',
    'DrawnImages',
    'LabelledImages',
    'build_transform',
    'check_classes',
    'timm_transform',
]

LEFT_OUT = -1  # label of a sample that stands for an image that can't be read, where none can replace it
REPLACEMENTS = 100  # drawn for one broken image before giving up
SHARDS = 'wds/'
STREAMS = ('hfids/', 'tfds/')

for _name in dir(v2):
    _transform = getattr(v2, _name)
    if isinstance(_transform, type) and issubclass(_transform, v2.Transform):
        TRANSFORMS.register_module(name=_name, module=_transform)


@TRANSFORMS.register_module()
def timm_transform(**kwargs):
    """timm's transform of the same arguments, up to a uint8 tensor: the task normalizes, on its device."""
    return keep_no_bits(create_transform(**kwargs, normalize=False))


def build_transform(transform):
    """A transform from its config: one dict, or a list of them to apply in turn.

    Of a step that holds others, as RandomChoice does, each of its `transforms` is such a config too.
    """
    steps = transform if isinstance(transform, list | tuple) else [transform]
    return v2.Compose([_build_step(step) for step in steps])


def _build_step(step):
    if isinstance(step, dict) and 'transforms' in step:
        step = {**step, 'transforms': [build_transform(inner) for inner in step['transforms']]}
    return TRANSFORMS.build(step)


class DrawnImages(Dataset):
    """Images with what is known of them, by position or as a sampler draws them.

    Args:
        on_error: what an image that can't be decoded does. 'raise': it ends the run, and is named. 'skip': it is noted
            in the run's folder (see `BrokenImages`), and another image, drawn by the key of its draw, takes its place,
            so that an exact resume and the other processes stay in step. Without a key, as in validation, what `blank`
            gives does. A file that can't be opened always ends the run.

    Raises:
        ValueError: on_error is something else.
    """

    def __init__(self, on_error: str):
        if on_error not in ('raise', 'skip'):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
        self.on_error = on_error
        self.broken_folder = None  # the run's, once it begins
        self._noted = set()  # by this process

    def __getitem__(self, draw):
        """Sample of an index, or of a sampler's (index, key), whose random numbers are then those of the key."""
        index, key = draw if isinstance(draw, tuple) else (draw, None)
        image, known = self.read(index) if self.on_error == 'raise' else self._read_or_replace(index, key)
        if key is not None:
            seed_everything(*key)
        return self.finish(image, known)

    def read(self, index: int) -> tuple[Image.Image, object]:
        """The image as it is stored, and what is known of it.

        Raises:
            ImageError: the image can't be decoded; names it.
            OSError: its file can't be read.
        """
        raise NotImplementedError

    def blank(self, index: int) -> tuple[Image.Image, object]:
        """What stands for an image that can't be read, where none can replace it."""
        raise NotImplementedError

    def finish(self, image: Image.Image, known):
        """The sample that is made of what was read."""
        raise NotImplementedError

    def note_in(self, folder: Path | str) -> None:
        """Note what can't be read in a run's folder from now on."""
        self.broken_folder = folder

    def _read_or_replace(self, index: int, key) -> tuple[Image.Image, object]:
        for attempt in range(REPLACEMENTS):
            try:
                return self.read(index)
            except ImageError as error:
                self._note(error)
            if key is None:
                return self.blank(index)
            index = int(np.random.default_rng((*key, attempt)).integers(len(self)))
        raise OSError(f'{REPLACEMENTS} images that were drawn one after another can not be read.')

    def _note(self, error: ImageError) -> None:
        if self.broken_folder is None:
            warnings.warn(f'{error} (skipped)', stacklevel=2)
        elif error.name not in self._noted:
            append_broken(self.broken_folder, error.name, error.reason)
            self._noted.add(error.name)


@DATASETS.register_module()
class LabelledImages(DrawnImages):
    """Images with class indices: (transformed image, label).

    Args:
        root: the data's folder; with timm's default reader, images are in root/split/class name/.
        split: subfolder of root, or the reader's name for the part; '' if root (a folder or tar file) is the part.
        transform: config of the transform, or a list of them.
        reader: timm's name of a reader that reads by position: '' (folders, tar files), 'hfds/<name>', or 'wds/', whose
            shards are then read by position too (see `ShardReader`).
        image_mode: PIL's mode that images are converted to.
        on_error: see `DrawnImages`; what stands for a broken image in validation is a blank one with the label
            LEFT_OUT, which measures leave out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a class without images, images outside any class, or a reader that only streams.
    """

    def __init__(self, root, split: str, transform, reader: str = '', image_mode: str = 'RGB', on_error: str = 'raise'):
        super().__init__(on_error)
        if reader.startswith(STREAMS):
            raise ValueError(f'{reader!r} only streams; an exact resume needs a reader that reads by position.')
        folder = Path(root).expanduser()
        if not reader:
            folder = folder / split
            if not folder.exists():
                raise FileNotFoundError(f'There is no image folder {folder.absolute()}.')
        self.reader = _reader(reader, folder, split)
        self.transform = build_transform(transform)
        self.image_mode = image_mode

    @property
    def metainfo(self) -> dict:
        """`classes`: their names, in the order of their indices."""
        names = ('class_to_idx', 'class_name_to_idx')  # the latter of timm's reader of tar files
        class_to_idx = next((found for name in names if (found := getattr(self.reader, name, None))), {})
        return {'classes': sorted(class_to_idx, key=class_to_idx.get)}

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image as it is stored, in `image_mode`, and its label.

        Raises:
            ImageError: the image can't be decoded; names it.
            OSError: its file can't be read.
        """
        file, label, *_ = self.reader[index]
        with file:
            return decode(file, self.image_mode, self.filename(index)), int(label)

    def blank(self, index: int) -> tuple[Image.Image, int]:
        return Image.new(self.image_mode, (256, 256)), LEFT_OUT

    def finish(self, image: Image.Image, label: int):
        return self.transform(image), label

    def filename(self, index: int) -> str:
        """Where an image is, for people."""
        return self.reader.filename(index, absolute=True)


@HOOKS.register_module()
class BrokenImages(Hook):
    """Have the datasets with on_error='skip' note what they can't read: broken_images.txt in the run's folder.

    A line each: path, tab, reason, of all workers and processes. Their number is printed at the end. Until then, and
    after a kill, the notes are in the folder broken_images/, and a resumed run adds to them.
    """

    def before_run(self, runner) -> None:
        for loop in (runner.train_loop, runner.val_loop):
            dataset = None if loop is None else loop.dataloader.dataset
            if isinstance(dataset, DrawnImages):
                dataset.note_in(runner.work_dir)

    def after_run(self, runner) -> None:
        barrier()
        if not is_main_process():
            return
        broken = collect_broken(runner.work_dir)
        if broken:
            listed = Path(runner.work_dir, 'broken_images.txt')
            Console().print(f'[bold red]Images that can not be read, and were skipped: {len(broken)}[/]; see {listed}.')


def _reader(reader: str, folder: Path, split: str):
    if reader.startswith(SHARDS):
        return ShardReader(folder, split)
    if reader:
        return create_reader(reader, root=str(folder), split=split)
    if not folder.is_dir():  # open tar files would share a position with those of forked workers
        return create_reader('', root=str(folder), cache_tarfiles=False)
    # timm's own extensions are png, jpg and jpeg: images of others would vanish.
    found = create_reader('', root=str(folder), input_key=';'.join(sorted(EXTENSIONS)))
    _check_folder(folder, found)
    return found


def _check_folder(folder: Path, reader) -> None:
    filenames = [Path(name) for name in reader.filenames()]
    if any(len(name.parts) == 1 for name in filenames):
        raise ValueError(f'{folder} has images outside of class folders.')
    classes = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith('.')}
    empty = classes - {name.parts[0] for name in filenames}
    if empty:
        raise ValueError(f'Class folders without images in {folder}: {", ".join(sorted(empty))}.')


def check_classes(train: LabelledImages, test: LabelledImages, num_classes: int) -> None:
    """ValueError if the two parts don't have the same classes, or the model has another number of them."""
    train_classes, test_classes = train.metainfo['classes'], test.metainfo['classes']
    if train_classes != test_classes:
        only = sorted(set(train_classes) ^ set(test_classes))
        raise ValueError(f'Classes in only one of training and test data: {", ".join(only)}.')
    if train_classes and len(train_classes) != num_classes:
        raise ValueError(f'The data has {len(train_classes)} classes, but the model num_classes={num_classes}.')
