"""What a model's classes are called, and which of them a folder of images holds."""

import csv
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

__all__ = ['match_classes', 'model_classes', 'read_class_map', 'read_names', 'synsets']


def _imagenet(num_classes: int) -> ImageNetInfo | None:
    subset = infer_imagenet_subset({'num_classes': num_classes})
    return ImageNetInfo(subset) if subset else None


def synsets(num_classes: int) -> list[str]:
    """WordNet names ('n01440764') of the classes of ImageNet-1k, 12k, 21k or 22k, told by their number; or none."""
    info = _imagenet(num_classes)
    return info.label_names() if info else []


def read_names(path: Path | str) -> list[str]:
    """Names of classes, a line each, in the order of their indices.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return _text(path).split('\n')


def model_classes(num_classes: int, names_file: Path | str | None = None) -> tuple[list[str], str]:
    """Names of a model's classes, and where they are from: a file, ImageNet by the number of classes, or the indices.

    Raises:
        ValueError: the file has another number of names.
    """
    if names_file is not None:
        names = read_names(names_file)
        if len(names) != num_classes:
            raise ValueError(f'{names_file} has {len(names)} names, but the model {num_classes} classes.')
        return names, str(names_file)
    info = _imagenet(num_classes)
    if info is not None:
        return info.label_descriptions(), f"ImageNet's, by their number ({num_classes})"
    return [str(index) for index in range(num_classes)], 'their indices'


def _text(path: Path | str) -> str:
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'There is no file {path}.')
    return path.read_text(encoding='utf-8-sig').replace('\r\n', '\n').rstrip('\n')


def read_class_map(path: Path | str) -> dict[str, int | str]:
    """Which class each folder is of: {folder's name: index or name of the model's class}.

    The file is JSON ({folder: class}, or a list of folders in the order of the model's classes), or text: lines of a
    folder and its class, between them a tab or a comma, or of a folder alone, the line's number being the class.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these, or names a folder twice.
    """
    text = _text(path)
    if Path(path).suffix == '.json':
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f'{path} is not JSON: {error}.') from error
        rows = list(content.items()) if isinstance(content, dict) else [[folder] for folder in content]
    else:
        rows = list(csv.reader(text.splitlines(), delimiter='\t' if '\t' in text else ',', skipinitialspace=True))
    widths = {len(row) for row in rows}
    if widths not in ({1}, {2}):
        raise ValueError(f'{path} must have one or two columns in every line, got {sorted(widths)}.')
    if widths == {1}:
        rows = [(row[0], index) for index, row in enumerate(rows)]
    mapped = {}
    for folder, name in rows:
        folder = str(folder)
        if folder in mapped:
            raise ValueError(f'{path} names the folder {folder!r} twice.')
        mapped[folder] = int(name) if isinstance(name, str) and name.strip().isdigit() else name
    return mapped


def match_classes(
    folders: Sequence[str],
    names: Sequence[str],
    class_map: Mapping[str, int | str] | None = None,
    trained_on: Sequence[str] | None = None,
) -> tuple[list[int], str]:
    """The model's class of each class folder, and in words how it was found.

    By the class map; or by the names of the classes that the model was trained on; or by WordNet's names, if the model
    has as many classes as an ImageNet; or, if there are as many folders as classes, by their order.

    Args:
        folders: names of the class folders.
        names: of the model's classes.
        class_map: as `read_class_map` gives it; may have more folders.
        trained_on: names of the class folders of the model's training data, if they are known.

    Raises:
        ValueError: a folder fits no class, or none of this applies; says which, and what to do.
    """
    if class_map is not None:
        index = {name: i for i, name in reversed(list(enumerate(names)))}
        index |= {name: i for i, name in enumerate(synsets(len(names)))}
        _require(folders, class_map, 'the class map')
        return [_class(folder, class_map[folder], index, len(names)) for folder in folders], 'by the class map'
    if trained_on:
        _require(folders, trained_on, "the model's classes")
        return [list(trained_on).index(folder) for folder in folders], "by the training data's names"
    wordnet = {name: i for i, name in enumerate(synsets(len(names)))}
    if wordnet and any(folder in wordnet for folder in folders):
        _require(folders, wordnet, f"WordNet's names of the model's {len(names)} classes")
        return [wordnet[folder] for folder in folders], "by WordNet's names"
    if len(folders) == len(names):
        return list(range(len(names))), 'by the order of the folders'
    raise ValueError(
        f'The data has {len(folders)} classes ({", ".join(folders[:3])}, ...) and the model {len(names)}, and their '
        f'names do not tell which is which. Give a class map (--class-map): a line for each folder, with its class.'
    )


def _class(folder: str, given: int | str, index: Mapping[str, int], num_classes: int) -> int:
    found = given if isinstance(given, int) else index.get(given)
    if found is None or not 0 <= found < num_classes:
        near = [] if isinstance(given, int) else difflib.get_close_matches(str(given), index, n=3)
        hint = f'; near: {", ".join(near)}' if near else f'; indices go from 0 to {num_classes - 1}'
        raise ValueError(f'The class map gives the folder {folder!r} the class {given!r}, which the model lacks{hint}.')
    return found


def _require(folders: Sequence[str], known, what: str) -> None:
    unknown = [folder for folder in folders if folder not in known]
    if unknown:
        shown = ', '.join(unknown[:10]) + (', ...' if len(unknown) > 10 else '')
        raise ValueError(f'{len(unknown)} class folders are not in {what}: {shown}.')
