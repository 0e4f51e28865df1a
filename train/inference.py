"""Trained models at work: by name or from a run's folder, with their own preprocessing, on all processes."""

import ast
import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from mmengine.dist import all_gather_object, get_dist_info
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import zoo
from zoo.backbones import adopted
from zoo.backbones.checkpoints import rename, unwrap
from zoo.models import read_checkpoint

from . import checkpoints
from .class_names import model_classes
from .config import config_names, load_config
from .data import build_transform
from .distributed import process_group
from .images import ImageError, ImageFile, find_images
from .tasks import stored_classes

__all__ = [
    'Batch',
    'Images',
    'LoadedModel',
    'Prediction',
    'batches',
    'check_whole',
    'load_model',
    'predict',
    'run_folder',
    'share',
]

AMP = {'none': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
MODES = {1: 'L', 3: 'RGB'}  # of PIL, by channels
HUBS = ('hf-hub:', 'hf_hub:', 'local-dir:')


@dataclass
class LoadedModel:
    """A model with what it takes to use it.

    Attributes:
        name: as it was asked for.
        model: in evaluation mode, on `device`.
        transform: of a PIL image to a uint8 tensor (C, H, W).
        mean, std: (C, 1, 1), of channels in 0..255.
        image_mode: PIL's mode that images are converted to.
        classes: names of the classes; none of a model without classifier.
        classes_from: where the names are from.
        trained_on: names of the class folders that it was trained on, if they are known.
        device: where it computes.
        amp: dtype of autocast, or None.
        folder: of the run that it is from, or None.
    """

    name: str
    model: nn.Module
    transform: Callable
    mean: Tensor
    std: Tensor
    image_mode: str
    classes: list[str]
    classes_from: str
    trained_on: list[str] | None
    device: torch.device
    amp: torch.dtype | None
    folder: Path | None

    def apply(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """float32 results, on the device, of a function of normalized images, such as the model; images are bytes."""
        images = (images.to(self.device, non_blocking=True) - self.mean) / self.std
        precision = nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)
        with torch.inference_mode(), precision:
            return function(images).float()

    def describe(self) -> dict[str, str]:
        """What its results depend on, as text: weights (a hash), preprocessing, precision, device, versions."""
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return {
            'model': self.name,
            'weights': digest.hexdigest(),
            'transform': ' '.join(str(self.transform).split()),
            'mean': str([round(value, 6) for value in self.mean.flatten().tolist()]),
            'std': str([round(value, 6) for value in self.std.flatten().tolist()]),
            'image_mode': self.image_mode,
            'amp': str(self.amp),
            'device': self.device.type,
            'versions': f'torch {torch.__version__}, timm {timm.__version__}, zoo {zoo.__version__}',
        }


def load_model(
    model: Path | str,
    checkpoint: Path | str | None = None,
    *,
    num_classes: int | None = None,
    classifies: bool = True,
    img_size: int | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    test_size: bool = False,
    names: Path | str | None = None,
    device: str | None = None,
    amp: str = 'none',
) -> LoadedModel:
    """A model for use.

    Args:
        model: name of a model of timm or the zoo; or a config of the zoo's training, or a run's folder, whose
            model.safetensors it takes, and whose validation's preprocessing.
        checkpoint: its weights; without, the pretrained ones that timm or the zoo downloads. Of a run, one of its
            checkpoints (best.pth), in place of its last weights.
        num_classes: that the checkpoint has; read off it if None.
        classifies: whether the classifier is needed.
        img_size, crop_pct, crop_mode, interpolation: in place of those of the model's preprocessing.
        test_size: take the size that the model's cfg gives for tests, where it gives one.
        names: file of the names of the classes, a line each.
        device: 'cuda', 'cpu', ...; the GPU of this process's local rank if there is one, if None.
        amp: 'none', 'bf16' or 'fp16'.

    Raises:
        FileNotFoundError: there is no such checkpoint, or the run has left no weights.
        ValueError: there is no such model, or it can't do what is asked.
        CheckpointError: the checkpoint doesn't fit.
    """
    if amp not in AMP:
        raise ValueError(f'amp must be one of {", ".join(AMP)}, got {amp!r}.')
    place = _device(device)
    asked = {'img_size': img_size, 'crop_pct': crop_pct, 'crop_mode': crop_mode, 'interpolation': interpolation}
    asked = {key: value for key, value in asked.items() if value is not None}
    folder = run_folder(str(model))
    if folder is None:
        loaded = _named(str(model), checkpoint, num_classes, classifies)
        data = resolve_data_config(asked, model=loaded, use_test_size=test_size)
        transform, trained_on = create_transform(**data, normalize=False), None
        mode = MODES.get(data['input_size'][0])
        if mode is None:
            raise ValueError(f'{model} takes {data["input_size"][0]} channels; images have 1 or 3.')
    else:
        if num_classes is not None or test_size:
            raise ValueError(f'{model} is a run of the zoo, which knows its own classes and size.')
        loaded, data, transform, mode, trained_on = _from_run(folder, checkpoint, asked)
    _resize(loaded, data.get('input_size'))
    if classifies and not loaded.num_classes:
        raise ValueError(f'{model} has no classifier.')
    classes, classes_from = model_classes(loaded.num_classes, names)
    if trained_on and names is None and len(trained_on) == len(classes):
        classes, classes_from = trained_on, "the training data's folders"
    channels = [torch.tensor(data[key]).view(-1, 1, 1) * 255 for key in ('mean', 'std')]
    return LoadedModel(
        name=str(model),
        model=loaded.eval().to(place),
        transform=transform,
        mean=channels[0].to(place),
        std=channels[1].to(place),
        image_mode=mode,
        classes=classes,
        classes_from=classes_from,
        trained_on=trained_on,
        device=place,
        amp=AMP[amp],
        folder=folder,
    )


def _device(device: str | None) -> torch.device:
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'There is no device {device!r}: {str(error).splitlines()[0]}') from error
    if place.type == 'cuda':
        if not torch.cuda.is_available():
            raise ValueError(f'The device {device!r} was asked for, but torch finds no GPU.')
        if place.index is None:
            place = torch.device('cuda', int(os.environ.get('LOCAL_RANK', torch.cuda.current_device())))
        torch.cuda.set_device(place)
    return place


def run_folder(model: str) -> Path | None:
    """Folder of the run that a config or the folder itself asks for; None for a model's name.

    Raises:
        FileNotFoundError: the config's run has no folder here.
        ValueError: it is none of these; says which names are near.
    """
    if timm.is_model(model) or model.startswith(HUBS):
        return None
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or model.removesuffix('.py') in config_names():
        folder = Path(load_config(model).work_dir)
        if not folder.is_dir():
            raise FileNotFoundError(f'{model} was not trained here: there is no folder {folder}. Give the folder.')
        return folder
    near = difflib.get_close_matches(model, [*timm.list_models(), *config_names()], n=5)
    hint = f' Near: {", ".join(near)}.' if near else ''
    raise ValueError(f'There is no model, config or folder of a run {model!r}.{hint}')


def _named(name: str, checkpoint: Path | str | None, num_classes: int | None, classifies: bool) -> nn.Module:
    if checkpoint is None:
        if num_classes is not None:
            raise ValueError('num_classes is of a checkpoint; the pretrained weights have their own.')
        cfg = {} if name.startswith(HUBS) else timm.get_pretrained_cfg(name).to_dict()
        if cfg and not any(cfg.get(key) for key in ('url', 'file', 'hf_hub_id')):
            raise ValueError(f'{name} has no pretrained weights to download; give a checkpoint.')
        return zoo.create_model(name, pretrained=True)
    state_dict = rename(unwrap(read_checkpoint(checkpoint), name), adopted.official_keys(name))
    found = stored_classes(state_dict, name) if num_classes is None else num_classes
    try:
        model = zoo.create_model(name, checkpoint=checkpoint, **({} if found is None else {'num_classes': found}))
    except zoo.CheckpointError:
        if classifies or found is not None:
            raise
        model = zoo.create_model(name, checkpoint=checkpoint, num_classes=0)  # self-supervised ones have no classifier
    if classifies and not _has_classifier_of(model, state_dict):
        raise ValueError(
            f'{checkpoint} has no classifier of {model.num_classes} classes for {name}, which would predict at random.'
        )
    return model


def _has_classifier_of(model: nn.Module, state_dict) -> bool:
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple | list) else (heads,):
        weights = [value for key, value in head.state_dict().items() if key.endswith('weight')]
        for weight in weights:
            if not any(
                value.numel() == weight.numel() and torch.equal(value.flatten().to(weight.dtype), weight.flatten())
                for value in state_dict.values()
                if isinstance(value, Tensor)
            ):
                return False
    return True


def _resize(model: nn.Module, input_size: Sequence[int] | None) -> None:
    """Make a model of one fixed image size take another, where timm can."""
    size = getattr(getattr(model, 'patch_embed', None), 'img_size', None)
    if input_size and size and tuple(size) != tuple(input_size[-2:]) and hasattr(model, 'set_input_size'):
        model.set_input_size(img_size=tuple(input_size[-2:]))


def _from_run(folder: Path, checkpoint: Path | str | None, asked: dict):
    """Model, mean and std, transform, image mode and class names of a run."""
    path = Path(checkpoint).expanduser() if checkpoint is not None else checkpoints.newest_whole(folder)
    if path is None or not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path or folder / "iter_*.pth"}.')
    torn = checkpoints.damage(path) if checkpoint is not None else None
    if torn is not None:
        raise ValueError(f'{path} is not a whole checkpoint: {torn}.')
    stored = checkpoints.load(path)
    cfg = _parse(stored['meta']['cfg'])
    arguments = dict(cfg['model']['backbone'])
    name = arguments.pop('name')
    if not timm.is_model(name):
        raise ValueError(f'{name}, which the run in {folder} trained, is not known: give the config, which imports it.')
    sources = ('checkpoint', 'pretrained')  # of what it began with
    model = timm.create_model(name, **{key: value for key, value in arguments.items() if key not in sources})
    weights = folder / 'model.safetensors'
    if checkpoint is None and weights.is_file():
        path, state_dict = weights, load_file(weights)
    else:
        prefix = checkpoints.BACKBONE
        state_dict = {k.removeprefix(prefix): v for k, v in stored['state_dict'].items() if k.startswith(prefix)}
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f'{path} does not fit the model of {folder}: {error}') from error
    data = resolve_data_config(
        {key: cfg['model'][key] for key in ('mean', 'std') if cfg['model'].get(key)}, model=model
    )
    dataset = (cfg.get('val_dataloader') or {}).get('dataset')
    if dataset is None:
        raise ValueError(f'The run in {folder} has no validation, whose preprocessing could be taken.')
    steps = dataset['transform'] if isinstance(dataset['transform'], list) else [dataset['transform']]
    data.pop('input_size')
    if asked:
        steps = _overridden(steps, asked, folder)
        if 'img_size' in asked:
            data['input_size'] = (3, asked['img_size'], asked['img_size'])
    trained_on = stored['meta'].get('dataset_meta', {}).get('classes') or None
    return model, data, build_transform(steps), dataset.get('image_mode', 'RGB'), trained_on


def _overridden(steps: list[dict], asked: dict, folder: Path) -> list[dict]:
    if len(steps) != 1 or steps[0]['type'] != 'timm_transform':
        raise ValueError(
            f'The run in {folder} was validated with its own transform, which has no {", ".join(asked)} to set. '
            'Give the model by its name, with model.safetensors as checkpoint.'
        )
    asked = dict(asked)
    if 'img_size' in asked:
        asked['input_size'] = asked.pop('img_size')
    return [{**steps[0], **asked}]


def _parse(text: str) -> dict:
    """`model` and `val_dataloader` of a config's text, which is not run: a checkpoint can hold no code."""

    def value(node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
            return {keyword.arg: value(keyword.value) for keyword in node.keywords}
        if isinstance(node, ast.List | ast.Tuple):
            return [value(element) for element in node.elts]
        if isinstance(node, ast.Dict):
            return {value(key): value(item) for key, item in zip(node.keys, node.values, strict=True)}
        return ast.literal_eval(node)

    return {
        node.targets[0].id: value(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in ('model', 'val_dataloader')
    }


class Images(Dataset):
    """(position, uint8 image, None, -1) of each file; of one that can't be decoded, (position, None, error, -1)."""

    def __init__(self, files: Sequence[ImageFile], transform: Callable, image_mode: str):
        self.files, self.transform, self.image_mode = files, transform, image_mode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, position: int):
        try:
            return position, self.transform(self.files[position].read(self.image_mode)), None, -1
        except ImageError as error:
            return position, None, (error.name, error.reason), -1


@dataclass
class Batch:
    """Images that could be read, uint8 (B, C, H, W) or None, their positions and labels, and those that could not."""

    positions: list[int]
    images: Tensor | None
    labels: Tensor
    broken: list[tuple[int, str, str]]

    def pin_memory(self) -> 'Batch':
        """Have the images where a GPU copies from; what a DataLoader calls."""
        if self.images is not None:
            self.images = self.images.pin_memory()
        return self


def _collate(samples) -> Batch:
    whole = [sample for sample in samples if sample[2] is None]
    return Batch(
        positions=[position for position, *_ in whole],
        images=torch.stack([image for _, image, _, _ in whole]) if whole else None,
        labels=torch.tensor([label for *_, label in whole], dtype=torch.int64),
        broken=[(position, *error) for position, _, error, _ in samples if error is not None],
    )


def batches(
    dataset: Dataset, indices: Sequence[Sequence[int]], workers: int, on_error: str, title: str, progress: bool
) -> Iterator[Batch]:
    """Batches of the samples of these indices, as `Images` gives them, shown by a bar if `progress`.

    Raises:
        ImageError: an image can't be decoded, and on_error is 'raise'.
        ValueError: on_error is neither 'raise' nor 'skip'.
    """
    if on_error not in ('raise', 'skip'):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")
    loader = DataLoader(
        dataset,
        batch_sampler=indices,
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    rank, world_size = get_dist_info()
    bar = Progress(
        TextColumn(title if world_size == 1 else f'{title} (rank 0 of {world_size})'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('images'),
        TimeRemainingColumn(),
        disable=not progress or rank > 0,
    )
    with bar:
        task = bar.add_task(title, total=sum(map(len, indices)))
        for batch in loader:
            if batch.broken and on_error == 'raise':
                _, name, reason = batch.broken[0]
                raise ImageError(f'Cannot read the image {name}: {reason}', name, reason)
            yield batch
            bar.advance(task, len(batch.positions) + len(batch.broken))


def share(size: int, batch_size: int) -> list[range]:
    """Batches of this process: of 0, 1, ..., size - 1, those that its rank, plus multiples of the world size, gives."""
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
    rank, world_size = get_dist_info()
    own = range(rank, size, world_size)
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def check_whole(positions: Iterable[int], size: int) -> None:
    """RuntimeError unless the positions are 0, 1, ..., size - 1, each once."""
    if sorted(positions) != list(range(size)):
        raise RuntimeError('The processes have lost or doubled images: do they see the same files?')


@dataclass
class Prediction:
    """What a model takes an image for.

    Attributes:
        image: that it is of.
        classes: names of the most probable classes, the most probable first.
        indices: of these classes.
        probabilities: of these classes.
        error: why the image can't be read; the lists are empty then.
    """

    image: ImageFile
    classes: list[str]
    indices: list[int]
    probabilities: list[float]
    error: str | None = None

    @property
    def name(self) -> str:
        """Of the image's file."""
        return self.image.name


def predict(
    model: Path | str | LoadedModel,
    images: Sequence[Path | str],
    k: int = 5,
    *,
    batch_size: int = 64,
    workers: int = 0,
    on_error: str = 'skip',
    progress: bool = False,
    **loading,
) -> list[Prediction]:
    """Predictions for images, in the order of `find_images`. Every process of a run under torchrun has all of them.

    Args:
        model: a model loaded by `load_model`, or what that takes.
        images: files, folders, tar files or wildcards.
        k: classes given of each image; all if the model has fewer.
        batch_size: images at a time.
        workers: processes that read images.
        on_error: what an image that can't be decoded does: 'skip' (its prediction has the error) or 'raise'.
        progress: show a bar.
        loading: other arguments of `load_model`.

    Raises:
        ImageError: an image can't be decoded, and on_error is 'raise'.
        FileNotFoundError, ValueError: of `find_images` and `load_model`.
    """
    if k < 1:
        raise ValueError(f'k must be at least 1, got {k}.')
    files = find_images(images)
    with process_group():
        loaded = model if isinstance(model, LoadedModel) else load_model(model, **loading)
        dataset = Images(files, loaded.transform, loaded.image_mode)
        own = []
        for batch in batches(dataset, share(len(files), batch_size), workers, on_error, 'predicting', progress):
            own += [(position, Prediction(files[position], [], [], [], reason)) for position, _, reason in batch.broken]
            if batch.images is None:
                continue
            probabilities = loaded.apply(loaded.model, batch.images).softmax(dim=1).cpu()
            top = probabilities.topk(min(k, probabilities.shape[1]), dim=1)
            for position, values, indices in zip(
                batch.positions, top.values.tolist(), top.indices.tolist(), strict=True
            ):
                names = [loaded.classes[index] for index in indices]
                own.append((position, Prediction(files[position], names, indices, values)))
        everyones = [item for part in all_gather_object(own) for item in part]
    check_whole((position for position, _ in everyones), len(files))
    return [prediction for _, prediction in sorted(everyones, key=lambda item: item[0])]
