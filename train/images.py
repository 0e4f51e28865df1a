"""Images in files, folders and tar files, by position; and the record of those that can't be read."""

import io
import os
import socket
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .checkpoints import write_atomically

__all__ = [
    'EXTENSIONS',
    'ImageError',
    'ImageFile',
    'append_broken',
    'collect_broken',
    'decode',
    'find_images',
    'read_broken',
    'write_broken',
]

# By which images are found in folders and tar files; a file that is given by name may have any.
EXTENSIONS = frozenset(
    (
        '.jpg',
        '.jpeg',
        '.jpe',
        '.jfif',
        '.png',
        '.webp',
        '.bmp',
        '.gif',
        '.tif',
        '.tiff',
        '.ppm',
        '.pgm',
        '.jp2',
        '.avif',
    )
)
BROKEN_LIST, BROKEN_PARTS = 'broken_images.txt', 'broken_images'


class ImageError(OSError):
    """An image whose bytes are not those of a whole image: `name`, and the `reason`."""

    def __init__(self, message: str, name: str = '', reason: str = ''):
        super().__init__(message)
        self.name, self.reason = name, reason


def decode(file: BinaryIO, mode: str | None, name: str) -> Image.Image:
    """The image in an open file, converted to PIL's `mode`; the first frame of several, not turned by its EXIF tag.

    With None it stays in the mode that it is stored in, as maps of classes have to.

    Of 16-bit grey images the upper byte is taken, as Pillow does for 16-bit colours; its own conversion would clip
    them to white.

    Raises:
        ImageError: the bytes can't be decoded, or are of too many pixels; names the file.
        OSError: the file can't be read, which is no fault of the image's.
    """
    content = file.read()
    try:
        if not content:
            raise ValueError('the file is empty')
        image = Image.open(io.BytesIO(content))
        if mode is None:
            image.load()
            return image
        return _eight_bits(image).convert(mode)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything for a broken file
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose message names the buffer
            reason = 'not an image, or cut short in its header'
        raise ImageError(f'Cannot read the image {name}: {reason}', name, reason) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG'):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError(f'its pixels (mode {image.mode}) have 32 bits and so no known range; convert them to 8 or 16')
    return image


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a file, or in an uncompressed tar file: `size` bytes at `offset` of it."""

    path: str
    member: str | None = None
    offset: int = 0
    size: int = 0

    @property
    def name(self) -> str:
        """The path; of a tar's member, that of the tar and the member's in it."""
        return self.path if self.member is None else f'{self.path}/{self.member}'

    def read(self, mode: str = 'RGB') -> Image.Image:
        """The image. Raises as `decode`."""
        with open(self.path, 'rb') as file:
            if self.member is None:
                return decode(file, mode, self.name)
            file.seek(self.offset)
            return decode(io.BytesIO(file.read(self.size)), mode, self.name)


def find_images(inputs: Iterable[Path | str]) -> list[ImageFile]:
    """Images of files, folders (with what lies below), tar files such as WebDataset's shards, and wildcards.

    In the order of the inputs, and within each in the order of their names.

    Raises:
        FileNotFoundError: there is no such file or folder, or nothing that a wildcard matches.
        ValueError: a folder or tar file without images, or a tar file that is compressed or cut short.
    """
    found = []
    for given in inputs:
        text = os.path.expanduser(given)
        paths = [text]
        if not os.path.exists(text):
            paths = sorted(glob(text, recursive=True)) if has_magic(text) else []
        if not paths:
            raise FileNotFoundError(f'There is no file or folder {given}.')
        for path in paths:
            images = _in_folder(path) if os.path.isdir(path) else _in_file(path)
            if not images:
                raise ValueError(f'{path} holds no images (by name: {", ".join(sorted(EXTENSIONS))}).')
            found += images
    return found


def _in_folder(folder: str) -> list[ImageFile]:
    def stop(error: OSError):
        raise error

    images = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        folders.sort()
        for file in sorted(files):
            path = os.path.join(parent, file)
            if file.endswith('.tar'):
                images += _in_tar(path)
            elif os.path.splitext(file)[1].lower() in EXTENSIONS:
                images.append(ImageFile(path))
    return images


def _in_file(path: str) -> list[ImageFile]:
    if tuple(Path(path).suffixes[-2:-1]) == ('.tar',) or path.endswith('.tgz'):
        raise ValueError(f'{path} is compressed; images are read by position, from plain .tar files.')
    return _in_tar(path) if path.endswith('.tar') else [ImageFile(path)]


def _in_tar(path: str) -> list[ImageFile]:
    try:
        with tarfile.open(path, 'r:') as tar:
            members = [
                ImageFile(path, member.name, member.offset_data, member.size)
                for member in tar
                if member.isfile() and os.path.splitext(member.name)[1].lower() in EXTENSIONS
            ]
    except tarfile.TarError as error:
        raise ValueError(f'{path} is not a whole tar file: {error}.') from error
    return sorted(members, key=lambda image: image.name)


def _line(name: str, reason: str) -> str:
    plain = (' '.join(text.split()) if '\n' in text or '\t' in text else text for text in (name, reason))
    return '\t'.join(plain) + '\n'


def write_broken(path: Path | str, broken: Mapping[str, str] | Sequence[tuple[str, str]]) -> None:
    """Write a list of images that can't be read, a line each: name, tab, reason."""
    lines = [_line(name, reason) for name, reason in dict(broken).items()]
    write_atomically(path, lambda temporary: Path(temporary).write_text(''.join(lines), encoding='utf-8'))


def append_broken(work_dir: Path | str, name: str, reason: str) -> None:
    """Note an image that can't be read, in a file of this process, until `collect_broken` makes one list of them."""
    folder = Path(work_dir, BROKEN_PARTS)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f'{socket.gethostname()}_{os.getpid()}.txt', 'a', encoding='utf-8') as file:
        file.write(_line(name, reason))


def read_broken(work_dir: Path | str) -> dict[str, str]:
    """Names of the images that could not be read in a run, with the reasons, in the order of the names."""
    paths = [Path(work_dir, BROKEN_LIST), *Path(work_dir, BROKEN_PARTS).glob('*.txt')]
    lines = [line for path in paths if path.exists() for line in path.read_text(encoding='utf-8').split('\n')]
    return dict(sorted(line.split('\t', 1) for line in lines if '\t' in line))  # a kill may leave half a line


def collect_broken(work_dir: Path | str) -> dict[str, str]:
    """Write what all processes of a run have noted as broken_images.txt in its folder, and return it."""
    broken = read_broken(work_dir)
    if broken:
        write_broken(Path(work_dir, BROKEN_LIST), broken)
        for path in Path(work_dir, BROKEN_PARTS).glob('*.txt'):
            path.unlink()
    return broken
