"""Shards: tar files of images with their labels, in WebDataset's form, read by position rather than as a stream."""

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.progress import Progress

from .checkpoints import write_atomically
from .images import EXTENSIONS

__all__ = ['ShardReader', 'expand_braces', 'find_shards', 'index_shard']

INFO_FILES = ('_info.json', 'info.json')  # as timm's
LABEL_FIELDS = ('label', 'cls')  # of a JSON file
FORMAT = 1  # of the index
BLOCK = 512  # bytes of tar's units; an archive ends in blocks of zeros
COMPRESSED = ('.gz', '.tgz', '.bz2', '.xz', '.zst')


@dataclass
class Samples:
    """Where the samples of shards are: arrays of one entry a sample, in the order of the shards and their members."""

    shards: np.ndarray  # numbers, int32
    offsets: np.ndarray  # of the image's first byte, int64
    sizes: np.ndarray  # of the image in bytes, int64
    labels: np.ndarray  # int64
    names: np.ndarray  # of the image's member, UTF-8 bytes


class ShardReader:
    """Images and labels of local shards, by position: `reader[i]` is (file, label), with nothing read but image i.

    A sample is the members of a tar file that share a name up to its first dot: an image (`0001.jpg`), and its class
    index in `0001.cls`, as text, or in `0001.json`, as `label` or `cls`. Other members are left alone. Where each one
    is, is found once and kept in the user's cache (XDG_CACHE_HOME, or ~/.cache, /zoo/shards), for as long as the
    shards keep their sizes and times.

    As any sample can be had at any time, a seeded order over all of them, split over processes and workers, loses and
    doubles none however uneven the shards are, and a resumed run goes on at its position.

    Args:
        root: folder of the shards.
        split: a split of root's _info.json; or names with braces, 'train-{0000..0146}.tar', several joined by '::'; or
            a subfolder, all of whose tar files it then is, '' being root itself.

    Raises:
        FileNotFoundError: no such folder, split or shard.
        ValueError: a remote address, a compressed, broken or cut-off shard, one of another length than _info.json says,
            or a sample without image or label.
    """

    def __init__(self, root: Path | str, split: str):
        self.paths, lengths = find_shards(root, split)
        self.samples = _read_index(self.paths)
        counts = np.bincount(self.samples.shards, minlength=len(self.paths))
        for path, count in zip(self.paths, counts.tolist(), strict=True):
            expected = lengths.get(path.name, count)
            if count != expected:
                raise ValueError(f'{path} has {count} samples, but its _info.json says {expected}. Fetch it again.')
        if not len(self):
            raise ValueError(f'There are no samples in {", ".join(map(str, self.paths))}.')

    @property
    def labels(self) -> np.ndarray:
        """Class indices of all samples, int64 (N,)."""
        return self.samples.labels

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        path = self.paths[self.samples.shards[index]]
        size = int(self.samples.sizes[index])
        with open(path, 'rb') as file:  # by each for itself: forked workers would share a position
            file.seek(int(self.samples.offsets[index]))
            content = file.read(size)
        if len(content) != size:
            raise OSError(f'{path} ends within {self.filename(index)}: it has changed since it was opened.')
        return io.BytesIO(content), int(self.samples.labels[index])

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Name of an image: the shard's and the member's."""
        path = self.paths[self.samples.shards[index]]
        member = self.samples.names[index].decode()
        if basename:
            return Path(member).name
        return f'{path.absolute() if absolute else path.name}/{member}'

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        return [self.filename(index, basename, absolute) for index in range(len(self))]


def expand_braces(pattern: str) -> list[str]:
    """'a-{08..10}.{x,y}' -> a-08.x, a-08.y, a-09.x, ...: ranges keep their zeros, lists their order."""
    match = re.search(r'\{([^{}]*)\}', pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r'(\d+)\.\.(\d+)', match[1])
    if bounds:
        width = max(len(bound) for bound in bounds.groups()) if match[1].startswith('0') else 0
        first, last = map(int, bounds.groups())
        parts = [f'{number:0{width}}' for number in range(first, last + 1)]
    elif ',' in match[1]:
        parts = match[1].split(',')
    else:
        raise ValueError(f'{match[0]} in {pattern!r} is neither a range, {{00..12}}, nor a list, {{a,b}}.')
    return [name for part in parts for name in expand_braces(pattern[: match.start()] + part + pattern[match.end() :])]


def find_shards(root: Path | str, split: str) -> tuple[list[Path], dict[str, int]]:
    """Paths of a split's shards, and how many samples they should have, by name, as far as _info.json says."""
    for address in (str(root), split):
        if '://' in address or address.startswith('pipe:'):
            raise ValueError(f'{address!r} is not on this machine: copy the shards to a disk, or mount them, first.')
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f'There is no folder of shards {root.absolute()}.')
    splits = _info(root).get('splits', {})
    lengths = {
        name: length
        for entry in splits.values()
        for name, length in zip(entry['filenames'], entry.get('shard_lengths', ()), strict=False)
    }
    names = split.partition('|')[0]  # timm takes a number of samples after it
    if split in splits:
        paths = [root / name for name in splits[split]['filenames']]
    elif '.tar' in names or '{' in names:
        paths = [root / name for part in names.split('::') for name in expand_braces(part)]
    elif (root / split).is_dir():
        paths = sorted((root / split).glob('*.tar'))
    else:
        known = f' Its _info.json has {", ".join(splits)}.' if splits else ''
        raise FileNotFoundError(f'{root.absolute()} has no split and no subfolder {split!r}.{known}')
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        named = ', '.join(missing[:5]) + (f' and {len(missing) - 5} more' if len(missing) > 5 else '')
        raise FileNotFoundError(f'There are no shards {named}.' if missing else f'{root / split} has no tar files.')
    twice = {str(path) for path in paths if paths.count(path) > 1} if len(set(paths)) < len(paths) else ()
    if twice:
        raise ValueError(f'Shards are named twice: {", ".join(sorted(twice))}.')
    return paths, lengths


def _info(root: Path) -> dict:
    for name in INFO_FILES:
        if (root / name).exists():
            try:
                return json.loads((root / name).read_text())
            except ValueError as error:
                raise ValueError(f'{root / name} is not JSON: {error}') from error
    return {}


def _read_index(paths: list[Path]) -> Samples:
    """The index of these shards, from the cache or by reading all of their headers. Processes wait for the first."""
    signature = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    digest = hashlib.sha256(json.dumps([FORMAT, signature]).encode()).hexdigest()
    cached = _cache_folder() / f'{digest}.npz'
    with FileLock(cached.with_suffix('.lock')):
        if cached.exists():
            with np.load(cached) as arrays:
                return Samples(**arrays)
        samples = _index(paths)
        write_atomically(cached, lambda temporary: _write_index(temporary, samples))
    return samples


def _cache_folder() -> Path:
    """A folder of the user's that can be written to; if there is none, a temporary one."""
    folder = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'zoo' / 'shards'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.gettempdir(), f'zoo-{getattr(os, "getuid", int)()}-shards')
        folder.mkdir(exist_ok=True)
    return folder


def _write_index(path: Path, samples: Samples) -> None:
    with open(path, 'wb') as file:
        np.savez(file, **vars(samples))


def _index(paths: list[Path]) -> Samples:
    with Progress(transient=True) as progress:
        shown = progress.track(paths, description='indexing shards')
        rows = [(number, *row) for number, path in enumerate(shown) for row in index_shard(path)]
    shards, offsets, sizes, labels, names = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    return Samples(
        np.array(shards, np.int32),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        np.array(labels, np.int64),
        np.array([name.encode() for name in names], np.bytes_),
    )


def index_shard(path: Path) -> Iterator[tuple[int, int, int, str]]:
    """(offset, size, label, name) of a shard's images, in the order of their samples. Reads headers and labels only.

    Raises:
        ValueError: the shard is compressed, broken or cut off, or a sample lacks its image or label.
    """
    if path.suffix in COMPRESSED:
        raise ValueError(f'{path} is compressed, so that nothing in it can be read by position. Decompress it.')
    images, labels = {}, {}
    try:
        with tarfile.open(path, 'r:') as archive:
            for member in archive:
                key, extension = _split_name(member.name)
                if not member.isfile() or key is None:
                    continue
                if f'.{extension}' in EXTENSIONS:
                    if key in images:
                        raise ValueError(f'{path} has two images of sample {key}.')
                    images[key] = member.offset_data, member.size, member.name
                elif extension == 'cls' or (extension == 'json' and key not in labels):
                    labels[key] = _label(archive.extractfile(member).read(), extension, f'{path}/{member.name}')
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f'{path} is not a whole tar file: {error}. Fetch it again.') from error
    with open(path, 'rb') as file:
        file.seek(end)
        if not file.read(BLOCK).strip(b'\0') == b'' or os.path.getsize(path) < end + BLOCK:
            raise ValueError(f'{path} is cut off, or still being written: a tar file ends in zeros. Fetch it again.')
    for key in dict.fromkeys((*images, *labels)):
        if labels.get(key) is None and key in images:
            raise ValueError(f'Sample {key} of {path} has no label: neither {key}.cls nor one in {key}.json.')
        if key in images:
            offset, size, name = images[key]
            yield offset, size, labels[key], name
        elif labels[key] is not None:
            raise ValueError(f'Sample {key} of {path} has a label, but no image.')


def _split_name(name: str) -> tuple[str | None, str]:
    """Key and extension of a member's name: WebDataset's rule, up to the first dot of its last part and after it."""
    match = re.fullmatch(r'((?:.*/)?[^./]+)\.([^/]*)', name.removeprefix('./'))
    return (match[1], match[2].lower()) if match else (None, '')


def _label(content: bytes, extension: str, name: str) -> int | None:
    """The class index in a .cls or .json file; None if the latter has none."""
    try:
        if extension == 'cls':
            label = int(content)
        else:
            fields = json.loads(content)
            found = [fields[field] for field in LABEL_FIELDS if field in fields] if isinstance(fields, dict) else ()
            if not found:
                return None
            label = found[0]
    except ValueError as error:
        raise ValueError(f'{name} holds no class index: {content[:40]!r}.') from error
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise ValueError(f'{name} holds no class index, but {label!r}.')
    return label
