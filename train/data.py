"""Labelled images through timm's readers, with errors that name the file or folder at fault."""

from pathlib import Path

from PIL import Image
from timm.data import create_transform
from timm.data.readers import create_reader
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .registry import DATASETS, TRANSFORMS
from .seeding import seed_everything

__all__ = ['LabelledImages', 'build_transform', 'check_classes', 'timm_transform']

STREAMS = ('wds/', 'hfids/', 'tfds/')

for _name in dir(v2):
    _transform = getattr(v2, _name)
    if isinstance(_transform, type) and issubclass(_transform, v2.Transform):
        TRANSFORMS.register_module(name=_name, module=_transform)


@TRANSFORMS.register_module()
def timm_transform(**kwargs):
    """timm's transform of the same arguments, up to a uint8 tensor: the task normalizes, on its device."""
    return create_transform(**kwargs, normalize=False)


def build_transform(transform):
    """A transform from its config: one dict, or a list of them to apply in turn."""
    steps = transform if isinstance(transform, list | tuple) else [transform]
    return v2.Compose([TRANSFORMS.build(step) for step in steps])


@DATASETS.register_module()
class LabelledImages(Dataset):
    """Images with class indices: (transformed image, label).

    Args:
        root: the data's folder; with timm's default reader, images are in root/split/class name/.
        split: subfolder of root, or the reader's name for the part; '' if root (a folder or tar file) is the part.
        transform: config of the transform, or a list of them.
        reader: timm's name of a reader that reads by position: '' (folders, tar files) or 'hfds/<name>'.
        image_mode: PIL's mode that images are converted to.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a class without images, images outside any class, or a reader that only streams.
    """

    def __init__(self, root, split: str, transform, reader: str = '', image_mode: str = 'RGB'):
        if reader.startswith(STREAMS):
            raise ValueError(f'{reader!r} only streams; an exact resume needs a reader that reads by position.')
        folder = Path(root).expanduser()
        if not reader:
            folder = folder / split
            if not folder.exists():
                raise FileNotFoundError(f'There is no image folder {folder.absolute()}.')
        self.reader = create_reader(reader, root=str(folder), split=split)
        if folder.is_dir() and not reader:
            _check_folder(folder, self.reader)
        self.transform = build_transform(transform)
        self.image_mode = image_mode

    @property
    def metainfo(self) -> dict:
        """`classes`: their names, in the order of their indices."""
        class_to_idx = getattr(self.reader, 'class_to_idx', None) or {}
        return {'classes': sorted(class_to_idx, key=class_to_idx.get)}

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, draw):
        """Sample of an index, or of a sampler's (index, key), whose random numbers are then those of the key."""
        index, key = draw if isinstance(draw, tuple) else (draw, None)
        image, label = self.read(index)
        if key is not None:
            seed_everything(*key)
        return self.transform(image), label

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image as it is stored, in `image_mode`, and its label."""
        file, label, *_ = self.reader[index]
        try:
            with file:
                return Image.open(file).convert(self.image_mode), label
        except (OSError, SyntaxError, ValueError) as error:  # all of which Pillow raises for files it can't decode
            raise OSError(f'Cannot read the image {self.reader.filename(index, absolute=True)}: {error}') from error


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
