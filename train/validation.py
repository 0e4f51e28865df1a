"""What is wrong with a config, all at once and before anything is loaded."""

import copy
import inspect
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import timm
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import Registry
from mmengine.runner import set_random_seed
from mmengine.utils import import_modules_from_strings
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import nn
from torch.utils.data import DataLoader

from . import registry
from .batches import fit
from .config import READ, ConfigError, near
from .data import SHARDS, STREAMS, DrawnImages, LabelledImages, build_transform
from .dense.annotations import AnnotatedImages
from .dense.features import Features
from .dense.task import DenseTask
from .digits import Digits
from .distributed import STRATEGIES
from .evaluation import TopK
from .hooks import Checkpoints
from .images import EXTENSIONS
from .loops import TrainLoop
from .optim import CLIP, DenseParamGroups, OptimWrapper, TimmParamGroups, dense_param_groups, param_groups
from .samplers import ShuffledStream
from .shards import find_shards
from .signatures import arguments_of
from .tasks import ImageClassifier, create_backbone

__all__ = ['validate']

PARTS = {  # keys that only make sense together
    'training': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    'validation': ('val_dataloader', 'val_cfg', 'val_evaluator'),
    'testing': ('test_dataloader', 'test_cfg', 'test_evaluator'),
}
DICTS = {
    *(f'{part}_{key}' for part in ('train', 'val', 'test') for key in ('dataloader', 'cfg')),
    *('custom_imports', 'default_hooks', 'env_cfg', 'log_processor', 'model', 'model_wrapper_cfg', 'optim_wrapper'),
    *('preflight', 'randomness', 'recipe', 'scale_lr', 'visualizer'),
}
KINDS = {  # of values of the top level
    frozenset(DICTS): (dict,),
    frozenset({'param_scheduler', 'val_evaluator', 'test_evaluator'}): (dict, list, tuple),
    frozenset({'custom_hooks'}): (list, tuple),
}
OF_MMENGINES_LOADER = {'dataset', 'sampler', 'batch_sampler', 'collate_fn', 'worker_init_fn', 'num_batch_per_epoch'}
ENVIRONMENT = ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit')  # what env_cfg may hold
DOWNLOADS = ('pretrained', 'checkpoint', 'checkpoint_path')  # arguments that bring weights
EPOCH_LENGTH = 1000  # iterations that an epoch is taken to have where its length doesn't matter
PICTURE_SIZES = ((500, 375), (375, 500))  # ImageNet's usual ones: a transform that makes one size makes it of both


def validate(cfg: Config, data: bool = True, world_size: int | None = None) -> None:
    """Check a config as `load_config` gives it: keys, types and names, and what must fit together.

    Nothing is loaded or downloaded: models are built without memory (on the meta device), class folders are listed but
    no image is read, and random numbers are left as they are. What is registered by the config's `custom_imports` is
    known, and an argument that can't be told from a class's or function's code is let through.

    Args:
        cfg: the config.
        data: whether to look at the data's folders, and files of weights, too.
        world_size: number of processes that will train; torchrun's, or 1, if None.

    Raises:
        ConfigError: lists every problem, each by its key, with what was expected.
    """
    check = _Validation(cfg, int(os.environ.get('WORLD_SIZE', 1)) if world_size is None else world_size)
    check.keys()
    check.parts()
    if data:
        check.data()
    if check.problems:
        raise ConfigError(check.problems, cfg.filename or '')


class _Validation:
    def __init__(self, cfg: Config, world_size: int):
        self.original = cfg
        self.cfg = cfg.to_dict()
        self.world_size = world_size
        self.problems: list[str] = []
        self.model: ImageClassifier | DenseTask | None = None  # on the meta device, if it could be built
        self.taken: set[tuple[int, ...]] = set()  # shapes of images that it takes
        self.batch: int | None = None  # images of a process's batch
        self.accumulated = 1  # batches to a step
        self.sampler: dict | None = None  # of the training
        self.samplers: dict[str, Callable | None] = {}  # classes, by loader
        self.loop: Callable | None = None  # of the training
        self.folders: dict[str, Path] = {}  # of images, by loader

    def report(self, key: str, message: str) -> None:
        self.problems.append(f'{key}: {message}')

    def has_problem(self, key: str) -> bool:
        return any(re.match(rf'{re.escape(key)}\b', problem) for problem in self.problems)

    @contextmanager
    def reporting(self, key: str, errors: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
        """Errors in here are problems of a key, unless it has been reported already."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                yield
        except errors as error:
            if not self.has_problem(key):
                self.report(key, ' '.join(str(error).split()) or type(error).__name__)

    # Keys of the top level

    def keys(self) -> None:
        for key, value in list(self.cfg.items()):
            expected = next((kinds for keys, kinds in KINDS.items() if key in keys), None)
            if expected and value is not None and not isinstance(value, expected):
                kinds = ' or '.join(kind.__name__ for kind in expected)
                self.report(key, f'expected {kinds}, got {_short(self.cfg.pop(key))}.')
        imports = self.cfg.get('custom_imports')
        if imports:
            with self.reporting('custom_imports'):
                import_modules_from_strings(**imports)
        for key in self.cfg:
            if key not in READ and not self._is_variable(key):
                self.report(key, f'nothing reads it.{_hint(key, READ, cutoff=0.75)}')
        for name, keys in PARTS.items():
            there = [key for key in keys if self.cfg.get(key) is not None or self.has_problem(key)]
            if there and len(there) < len(keys):
                missing = ', '.join(key for key in keys if key not in there)
                self.report(there[0], f'{name} needs {missing} too. For none, leave out {", ".join(there)}.')
        if self.cfg.get('model') is None and not self.has_problem('model'):
            self.report('model', 'expected a dict with the type of a model, got none.')
        strategy = self.cfg.get('strategy', 'ddp')
        if strategy not in STRATEGIES:
            self.report('strategy', f'expected {" or ".join(STRATEGIES)}, got {strategy!r}.')

    def _is_variable(self, key: str) -> bool:
        """Whether the config file, or a module that it imports, uses the name."""
        imports = (self.cfg.get('custom_imports') or {}).get('imports', ())
        names = [imports] if isinstance(imports, str) else imports
        texts = [self.original.text or '', *(_source(sys.modules[name]) for name in names if name in sys.modules)]
        if sum(len(re.findall(rf'\b{re.escape(key)}\b', text)) for text in texts) > 1:
            return True
        parts = {name: part for name, part in self.cfg.items() if name in READ}
        return any(_is_part(self.cfg[key], value) for value in _values(parts))

    # What registries build

    def parts(self) -> None:
        self._model()
        for name in ('train', 'val', 'test'):
            if self.cfg.get(f'{name}_dataloader') is not None:
                self._loader(f'{name}_dataloader', self.cfg[f'{name}_dataloader'])
            if self.cfg.get(f'{name}_evaluator') is not None:
                self._evaluator(f'{name}_evaluator', self.cfg[f'{name}_evaluator'])
        self._batch()
        self._loops()
        self._optimizer()
        self._hooks()
        self._rest()

    def buildable(
        self,
        key: str,
        part,
        where: Registry,
        given: Iterable[str] = (),
        extra: Iterable[str] = (),
        default: str | None = None,
        kind: str | None = None,
    ) -> Callable | None:
        """What a dict's type names in a registry, after a check of its arguments; None if that is reported.

        Args:
            key: of the dict.
            part: the dict.
            where: the registry.
            given: arguments that whoever builds it adds.
            extra: keys that whoever builds it takes out.
            default: type of a dict without one.
            kind: what it is called; the registry's name if None.
        """
        kind = kind or where.name.replace('_', ' ')
        if not isinstance(part, dict):
            self.report(key, f'expected a dict with the type of a {kind}, got {_short(part)}.')
            return None
        name = part.get('type', default)
        if name is None:
            self.report(key, f'has no type: expected the name of a {kind}.')
            return None
        target = _find(where, name) if isinstance(name, str) else name
        if not callable(target):
            names = _names(where)
            self.report(f'{key}.type', f'there is no {kind} {name!r}.{_hint(name, names)}')
            return None
        self.arguments(key, part, target, given, {'type', '_scope_', *extra})
        return target

    def arguments(
        self, key: str, part: dict, target: Callable, given: Iterable[str] = (), extra: Iterable[str] = ()
    ) -> None:
        """Check the names of the arguments in a dict against what the target takes beside what it is given."""
        takes = arguments_of(target)
        given, extra = set(given), set(extra)
        own = [name for name in takes.names if name not in given]
        is_open = takes.is_open
        if target is EMAHook:  # passes the rest to the average's class
            average = _find(registry.MODELS, part.get('ema_type', 'ExponentialMovingAverage'))
            if average is not None:
                own += arguments_of(average).names
                is_open = arguments_of(average).is_open
        name = getattr(target, '__name__', str(target))
        for unknown in [] if is_open else [other for other in part if other not in {*own, *given, *extra}]:
            self.report(f'{key}.{unknown}', f'{name} does not take it.{_hint(unknown, own)}')
        missing = takes.required - given - part.keys()
        if missing:
            self.report(key, f'{name} needs {", ".join(sorted(missing))} too.')

    def nested(self, key: str, part, target: Callable, given: Iterable[str] = (), extra: Iterable[str] = ()) -> None:
        """The same for a dict without a type, or nothing."""
        if isinstance(part, dict):
            self.arguments(key, part, target, given, extra)
        elif part is not None:
            self.report(key, f'expected a dict, got {_short(part)}.')

    def _model(self) -> None:
        part = self.cfg.get('model')
        if part is None:
            return
        target = self.buildable('model', part, registry.MODELS)
        if isinstance(target, type) and issubclass(target, DenseTask):
            self._dense_model(part)
        if not (isinstance(target, type) and issubclass(target, ImageClassifier)):
            return
        self._named_model('model.backbone', part.get('backbone'))
        if part.get('teacher') is not None:
            self._named_model('model.teacher', part['teacher'])
        if part.get('loss') is not None:
            targets = ('logits', 'targets', 'input', 'target')
            self.buildable('model.loss', part['loss'], registry.FUNCTIONS, targets, kind='loss')
        self.nested('model.mixup', part.get('mixup'), Mixup, given=('num_classes',))
        self.nested('model.random_erasing', part.get('random_erasing'), RandomErasing)
        if target is ImageClassifier and not self.has_problem('model'):
            self._build_model(part)

    def _dense_model(self, part: dict) -> None:
        """A detector or segmentor, built without memory too."""
        self._named_model('model.backbone', part.get('backbone'), Features)
        for name in ('neck', 'head', 'auxiliary'):
            for key, own in _each(f'model.{name}', part.get(name) or ()):
                given = ('feature_info', 'num_classes') if name == 'auxiliary' else ('feature_info',)
                self.buildable(key, own, registry.MODELS, given, ('weight',), kind=name)
        if not self.has_problem('model'):
            self._build_model(part, is_dense=True)

    def _named_model(self, key: str, part, target: Callable = create_backbone) -> None:
        self.nested(key, part, target)
        name = part.get('name') if isinstance(part, dict) else None
        if not isinstance(name, str):
            return
        if not timm.is_model(name):
            self.report(f'{key}.name', f'there is no model {name!r}.{_hint(name, timm.list_models())}')
        elif part.get('pretrained') and not part.keys() & {'checkpoint', 'pretrained_cfg', 'pretrained_cfg_overlay'}:
            facts = timm.get_pretrained_cfg(name)
            if not (facts and facts.has_weights):
                self.report(f'{key}.pretrained', f'{name} has no weights to download: give checkpoint=FILE.')

    def _build_model(self, part: dict, is_dense: bool = False) -> None:
        """Build it without memory, one time more for each argument that a backbone refuses."""
        part = copy.deepcopy({**part, 'compile': False})
        for name in ('backbone', 'teacher'):
            if part.get(name):
                kept = {key: value for key, value in part[name].items() if key not in DOWNLOADS}
                part[name] = {**kept, 'pretrained': False, 'device': 'meta'}
        if part.get('teacher') and 'checkpoint' in self.cfg['model']['teacher'] and 'num_classes' in part['backbone']:
            part['teacher']['num_classes'] = part['backbone']['num_classes']  # as the file has, which isn't read
        around = torch.device('meta') if is_dense else nullcontext()
        refused = []
        while True:
            try:
                with _random_numbers_kept(), warnings.catch_warnings(), around:
                    warnings.simplefilter('ignore')
                    self.model = registry.MODELS.build(copy.deepcopy(part)).eval()
                break
            except Exception as error:
                found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
                owner = next((n for n in ('backbone', 'teacher') if found and found[1] in (part.get(n) or ())), None)
                if owner is None:
                    self.report('model', ' '.join(str(error).split()))
                    break
                del part[owner][found[1]]
                if found[1] != 'device':  # a model of yours may not take that
                    refused.append((owner, found[1]))
        for owner, name in refused:
            made = self.model and (self.model.backbone if owner == 'backbone' else self.model.teacher.model)
            names = arguments_of(type(made)).names if made is not None else ()
            model = self.cfg['model'][owner]['name']
            self.report(f'model.{owner}.{name}', f'{model} does not take it.{_hint(name, names)}')

    def _loader(self, key: str, part) -> None:
        names = set(inspect.signature(DataLoader).parameters) | OF_MMENGINES_LOADER
        for unknown in [other for other in part if other not in names]:
            self.report(f'{key}.{unknown}', f'a dataloader does not take it.{_hint(unknown, names)}')
        for missing in [name for name in ('dataset', 'sampler') if part.get(name) is None]:
            self.report(key, f'needs {missing} too.')
        if part.get('dataset') is not None:
            self._dataset(f'{key}.dataset', part['dataset'])
        if part.get('sampler') is not None:
            given = ('dataset', 'seed')
            self.samplers[key] = self.buildable(f'{key}.sampler', part['sampler'], registry.DATA_SAMPLERS, given)
        if part.get('collate_fn') is None and self.model is not None:
            needed = 'default_collate' if isinstance(self.model, ImageClassifier) else 'collate'
            self.report(key, f"needs collate_fn=dict(type='{needed}') too: mmengine's own makes lists of samples.")
        if part.get('batch_sampler') is not None:
            given = ('sampler', 'batch_size')
            self.buildable(f'{key}.batch_sampler', part['batch_sampler'], registry.DATA_SAMPLERS, given)
        for name in ('collate_fn', 'worker_init_fn'):
            if isinstance(part.get(name), dict):
                given = ('data_batch', 'batch', 'worker_id')
                self.buildable(f'{key}.{name}', part[name], registry.FUNCTIONS, given)
        own = {name: value for name, value in part.items() if name in names - OF_MMENGINES_LOADER}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                DataLoader(range(1), **own)  # whose constructor checks values, and starts nothing
        except Exception as error:
            self.report(key, ' '.join(str(error).split()))

    def _dataset(self, key: str, part) -> None:
        target = self.buildable(key, part, registry.DATASETS)
        if target is None:
            return
        inner = part.get('datasets', part.get('dataset'))  # of a wrapper
        for place, other in enumerate(inner if isinstance(inner, list | tuple) else [inner]):
            if isinstance(other, dict):
                self._dataset(f'{key}.datasets.{place}' if 'datasets' in part else f'{key}.dataset', other)
        if not (isinstance(target, type) and issubclass(target, DrawnImages)):
            return
        if str(part.get('reader', '')).startswith(STREAMS):
            self.report(f'{key}.reader', f'{part["reader"]!r} only streams; an exact resume needs positions.')
        transform = part.get('transform')
        if transform is not None:
            self._steps(f'{key}.transform', transform)
            if not self.has_problem(f'{key}.transform'):
                with self.reporting(f'{key}.transform'), _random_numbers_kept():
                    built = build_transform(transform)
                    if issubclass(target, LabelledImages):
                        self._pictures(f'{key}.transform', built, part.get('image_mode', 'RGB'))

    def _steps(self, key: str, transform) -> None:
        """The steps of a transform, and those that a step chooses among."""
        for where, step in _each(key, transform):
            self.buildable(where, step, registry.TRANSFORMS)
            inner = step.get('transforms') if isinstance(step, dict) else None
            for place, other in enumerate(inner or ()):
                self._steps(f'{where}.transforms.{place}', other)

    def _pictures(self, key: str, transform: Callable, mode: str) -> None:
        """Check what a transform makes of images against the model."""
        try:
            made = [transform(Image.new(mode, size)) for size in PICTURE_SIZES]
        except ValueError:  # as of a crop that is larger than these images, if not yours
            return
        if not isinstance(self.model, ImageClassifier):
            return
        for image in made:
            if not isinstance(image, torch.Tensor):
                self.report(key, f'makes a {type(image).__name__}, expected a tensor: end it with PILToTensor.')
                return
            if image.dtype != torch.uint8:
                dtype = str(image.dtype).removeprefix('torch.')
                self.report(key, f'makes {dtype}, expected uint8: the model itself normalizes bytes. Leave that out.')
                return
        shape = tuple(made[0].shape)
        if shape != made[1].shape or shape in self.taken:
            return
        self._input(key, 'model.backbone', self.model.backbone, shape)
        if self.model.teacher is not None and key.startswith('train'):
            self._input(key, 'model.teacher', self.model.teacher.model, shape)
        if not self.has_problem(key):
            self.taken.add(shape)

    def _input(self, key: str, owner: str, model: nn.Module, shape: tuple[int, ...]) -> None:
        name = self.cfg['model'][owner.partition('.')[2]]['name']
        size = 'x'.join(map(str, shape))
        channels = getattr(model, 'in_chans', shape[0])
        if channels != shape[0]:
            expected = f'{name} takes {channels} channels: set image_mode or {owner}.in_chans.'
            self.report(key, f'makes images of {size} (channels x height x width), but {expected}')
            return
        device = next(model.parameters()).device
        try:
            with torch.no_grad():
                model(torch.empty(1, *shape, device=device))
        except (AssertionError, RuntimeError, ValueError) as error:
            said = ' '.join(str(error).split())
            ours = type(model).__module__.startswith(('timm.', 'zoo.'))
            if isinstance(error, NotImplementedError) or (isinstance(error, RuntimeError) and not ours):
                return  # what the meta device can't do is no fault
            takes = 'img_size' in arguments_of(type(model)).names
            cure = f'give {owner}.img_size or another size here' if takes else 'give another size here'
            self.report(key, f'makes images of {size}, which {name} refuses ({said}): {cure}.')

    def _evaluator(self, key: str, part) -> None:
        if isinstance(part, dict) and 'metrics' in part:
            self.buildable(key, part, registry.EVALUATOR, default='Evaluator')
            part = part['metrics']
            key = f'{key}.metrics'
        for where, metric in _each(key, part):
            if isinstance(metric, dict):
                self.buildable(where, metric, registry.METRICS)

    def _batch(self) -> None:
        """The batch of a process, as `fit` divides it."""
        loader = self.cfg.get('train_dataloader')
        size = loader.get('batch_size') if isinstance(loader, dict) else None
        if not _is_count(size) or self.has_problem('train_dataloader.sampler'):
            return
        fitted = self.original
        total, wrapper = self.cfg.get('total_batch'), self.cfg.get('optim_wrapper') or {}
        if not _is_count(total if total is not None else 1):
            self.report('total_batch', f'expected a positive integer, got {total!r}.')
        elif wrapper and _is_count(wrapper.get('accumulative_counts', 1)):
            with self.reporting('total_batch' if total else 'scale_lr'):
                fitted = fit(self.original, self.world_size)
        self.batch = fitted.train_dataloader.batch_size
        self.sampler = fitted.train_dataloader.get('sampler')
        accumulated = (fitted.get('optim_wrapper') or {}).get('accumulative_counts', 1)
        self.accumulated = accumulated if _is_count(accumulated) else 1
        if self.batch % 2 and isinstance(self.cfg.get('model'), dict) and self.cfg['model'].get('mixup'):
            self.report('train_dataloader.batch_size', f'{self.batch} is odd, but mixup pairs the images of a batch.')

    def _loops(self) -> None:
        given = ('runner', 'dataloader', 'evaluator')
        part = self.cfg.get('train_cfg')
        if part is not None:
            by_epoch = isinstance(part, dict) and part.get('by_epoch', True)
            default = 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop'
            self.loop = self.buildable('train_cfg', part, registry.LOOPS, given, ('by_epoch',), default)
            lengths = ('max_epochs', 'max_steps', 'val_interval') if self.loop is TrainLoop else ()
            for name in (name for name in lengths if part.get(name) is not None):
                if not _is_count(part[name]):
                    self.report(f'train_cfg.{name}', f'expected a positive integer, got {part[name]!r}.')
            if lengths and (part.get('max_epochs') is None) == (part.get('max_steps') is None):
                self.report('train_cfg', 'TrainLoop needs max_epochs or max_steps, one of them.')
        for key, sampler in self.samplers.items():
            name = getattr(sampler, '__name__', '')
            if key == 'train_dataloader' and self.loop is TrainLoop and sampler in (DefaultSampler, InfiniteSampler):
                self.report(f'{key}.sampler', f'TrainLoop goes through a ShuffledStream, got {name}.')
            elif key != 'train_dataloader' and sampler is ShuffledStream:
                self.report(f'{key}.sampler', f'{name} never ends: expected DefaultSampler with shuffle=False.')
        for name, default in (('val_cfg', 'ValLoop'), ('test_cfg', 'TestLoop')):
            if self.cfg.get(name) is not None:
                self.buildable(name, self.cfg[name], registry.LOOPS, given, default=default)

    def _optimizer(self) -> None:
        part = self.cfg.get('optim_wrapper')
        if not isinstance(part, dict) or not isinstance(part.get('optimizer'), dict):
            if part is not None:
                self.report('optim_wrapper', 'needs optimizer, a dict with its type.')
            return
        extra = ('constructor', 'paramwise_cfg')
        self.buildable('optim_wrapper', part, registry.OPTIM_WRAPPERS, ('optimizer',), extra, 'OptimWrapper')
        self.buildable('optim_wrapper.optimizer', part['optimizer'], registry.OPTIMIZERS, given=('params',))
        self._param_groups(part)
        clip = part.get('clip_grad')
        kind = clip.get('type', 'norm') if isinstance(clip, dict) else None
        if kind in CLIP:
            self.arguments('optim_wrapper.clip_grad', clip, CLIP[kind], given=('parameters',), extra=('type',))
        optimizer = wrapper = None
        values = (KeyError, TypeError, ValueError)  # other errors may be of this machine, as where there is no CUDA
        parameter = nn.Parameter(torch.zeros(2, 2))
        with self.reporting('optim_wrapper.optimizer', values):
            optimizer = registry.OPTIMIZERS.build({**part['optimizer'], 'params': [parameter]})
        optimizer = optimizer or torch.optim.SGD([parameter], lr=1.0)
        with self.reporting('optim_wrapper', values):
            settings = {name: value for name, value in part.items() if name not in extra}
            wrapper = registry.OPTIM_WRAPPERS.build({'type': 'OptimWrapper', **settings, 'optimizer': optimizer})
        self._schedules(wrapper or OptimWrapper(optimizer))

    def _param_groups(self, part: dict) -> None:
        name = part.get('constructor', 'DefaultOptimWrapperConstructor')
        constructor = _find(registry.OPTIM_WRAPPER_CONSTRUCTORS, name)
        if constructor is None:
            hint = _hint(name, _names(registry.OPTIM_WRAPPER_CONSTRUCTORS))
            self.report('optim_wrapper.constructor', f'there is no constructor {name!r}.{hint}')
        if not (isinstance(constructor, type) and issubclass(constructor, TimmParamGroups)):
            return
        of_task = issubclass(constructor, DenseParamGroups)
        make, of = (dense_param_groups, 'task') if of_task else (param_groups, 'backbone')
        groups = part.get('paramwise_cfg') or {}
        self.nested('optim_wrapper.paramwise_cfg', groups, make, given=(of, 'lr', 'weight_decay'))
        if 'lr' not in part['optimizer']:
            self.report('optim_wrapper.optimizer', 'needs lr too.')
        if self.model is not None and not self.has_problem('optim_wrapper.paramwise_cfg'):
            with self.reporting('optim_wrapper.paramwise_cfg'):
                of = self.model if of_task else self.model.backbone
                make(of, 1.0, part['optimizer'].get('weight_decay', 0.0), **groups)

    def _schedules(self, wrapper) -> None:
        part = self.cfg.get('param_scheduler')
        loop = self.cfg.get('train_cfg') or {}
        epochs = 1 if loop.get('max_epochs') is None else loop['max_epochs']
        for key, schedule in _each('param_scheduler', [] if part is None else part):
            given, extra = ('optimizer', 'epoch_length', 'end'), ('convert_to_iter_based', 'by_epoch')
            if self.buildable(key, schedule, registry.PARAM_SCHEDULERS, given, extra) is None or self.has_problem(key):
                continue
            if not _is_count(epochs):
                continue  # reported
            iterations = loop.get('max_steps') if _is_count(loop.get('max_steps')) else epochs * EPOCH_LENGTH
            end = epochs if schedule.get('by_epoch', True) else iterations * getattr(wrapper, 'accumulative_counts', 1)
            built = None
            with self.reporting(key):
                given = {'optimizer': wrapper, 'epoch_length': EPOCH_LENGTH}
                built = registry.PARAM_SCHEDULERS.build({'end': end, **schedule}, default_args=given)
            if getattr(built, 'by_epoch', False) and self.loop is TrainLoop:
                self.report(
                    key,
                    f'{type(built).__name__} counts epochs, but TrainLoop steps by iteration: give '
                    'convert_to_iter_based=True for lengths in epochs, or by_epoch=False for lengths in iterations.',
                )

    def _hooks(self) -> None:
        hooks = [(f'default_hooks.{name}', hook) for name, hook in (self.cfg.get('default_hooks') or {}).items()]
        hooks += _each('custom_hooks', self.cfg.get('custom_hooks') or [])
        for key, hook in hooks:
            if hook is None or isinstance(hook, Hook):
                continue
            target = self.buildable(key, hook, registry.HOOKS, extra=('priority',))
            if target is Checkpoints:
                self._measure(key, hook.get('best', 'top1'))

    def _measure(self, key: str, best: str) -> None:
        """Whether the validation gives the measure that the best checkpoint is chosen by, if that can be told."""
        part = self.cfg.get('val_evaluator')
        metrics = [metric for _, metric in _each('', part)]
        if not all(isinstance(m, dict) and _find(registry.METRICS, m.get('type')) is TopK for m in metrics):
            return
        if part is None or any(m.get('prefix') for m in metrics):
            return
        default = inspect.signature(TopK).parameters['k'].default
        measures = [f'top{k}' for metric in metrics for k in metric.get('k', default)]
        if best not in measures:
            self.report(f'{key}.best', f'{best!r} is not measured: val_evaluator gives {", ".join(measures)}.')

    def _rest(self) -> None:
        if isinstance(self.cfg.get('visualizer'), dict):
            self.buildable('visualizer', self.cfg['visualizer'], registry.VISUALIZERS)
            for key, backend in _each('visualizer.vis_backends', self.cfg['visualizer'].get('vis_backends') or []):
                self.buildable(key, backend, registry.VISBACKENDS, given=('save_dir',))
        if isinstance(self.cfg.get('log_processor'), dict):
            self.buildable('log_processor', self.cfg['log_processor'], registry.LOG_PROCESSORS, default='LogProcessor')
        if self.cfg.get('model_wrapper_cfg') is not None:
            self.buildable('model_wrapper_cfg', self.cfg['model_wrapper_cfg'], registry.MODEL_WRAPPERS, ('module',))
        self.nested('randomness', self.cfg.get('randomness'), set_random_seed)
        for unknown in [other for other in self.cfg.get('env_cfg') or () if other not in ENVIRONMENT]:
            self.report(f'env_cfg.{unknown}', f'nothing reads it.{_hint(unknown, ENVIRONMENT)}')

    # Folders and files

    def data(self) -> None:
        for name in ('backbone', 'teacher'):
            part = self.cfg['model'].get(name) if isinstance(self.cfg.get('model'), dict) else None
            for key in ('checkpoint', 'checkpoint_path'):
                if isinstance(part, dict) and part.get(key):
                    self._file(f'model.{name}.{key}', part[key])
        if self.cfg.get('load_from'):
            self._file('load_from', self.cfg['load_from'])
        for name in ('train', 'val', 'test'):
            self._annotated(f'{name}_dataloader.dataset')
        loaders = [f'{name}_dataloader' for name in ('train', 'val', 'test')]
        found = [self._classes(loader) for loader in loaders]
        count = None if self.model is None else self.model.num_classes
        if self._class_problems(loaders, found, count):  # quickly found: folders weren't looked through to the end
            all_leaves = {key: sorted(set(_leaves(folder))) for key, folder in self.folders.items()}
            found = [names and all_leaves[key] for key, names in zip(loaders, found, strict=True)]
        for key, message in self._class_problems(loaders, found, count):
            self.report(key, message)

    @staticmethod
    def _class_problems(loaders: list[str], found: list[list[str] | None], count: int | None) -> list[tuple[str, str]]:
        train, *others = found
        problems = []
        for loader, names in zip(loaders[1:], others, strict=True):
            if train and names and train != names:
                only = ', '.join(islice(sorted(set(train) ^ set(names)), 10))
                problems.append((f'{loader}.dataset', f'classes in only one of it and the training data: {only}.'))
        if train and count not in (None, len(train)):
            cure = f'but the training data has {len(train)} classes: give {len(train)}.'
            problems.append(('model.backbone.num_classes', f'{count}, {cure}'))
        return problems

    def _annotated(self, key: str) -> None:
        """Whether the folders and files of a dense dataset are there; what is in them, the dataset itself looks at."""
        part = (self.cfg.get(key.partition('.')[0]) or {}).get('dataset')
        target = _find(registry.DATASETS, part.get('type')) if isinstance(part, dict) else None
        if not (isinstance(target, type) and issubclass(target, AnnotatedImages)) or target.writes:
            return
        for name in ('root', 'images', 'masks', 'annotations'):
            path = part.get(name)
            if path is not None and not (isinstance(path, str | os.PathLike) and Path(path).expanduser().exists()):
                self.report(f'{key}.{name}', f'there is no {"file" if name == "annotations" else "folder"} {path}.')

    def _file(self, key: str, path: str) -> None:
        if not isinstance(path, str | os.PathLike):
            self.report(key, f'expected a path, got {path!r}.')
        elif not Path(path).expanduser().is_file() and '://' not in str(path):
            self.report(key, f'there is no file {path}.')

    def _classes(self, loader: str) -> list[str] | None:
        """Names of a dataset's classes if it is a folder; None if they can't be told, or there is a problem."""
        key = f'{loader}.dataset'
        part = (self.cfg.get(loader) or {}).get('dataset')
        target = _find(registry.DATASETS, part.get('type')) if isinstance(part, dict) else None
        if not (isinstance(target, type) and issubclass(target, LabelledImages)):
            return None
        for name in ('root', 'split'):
            if name in part and not isinstance(part[name], str | os.PathLike):
                self.report(f'{key}.{name}', f'expected a path, got {part[name]!r}.')
        if self.has_problem(f'{key}.root') or self.has_problem(f'{key}.split') or not {'root', 'split'} <= part.keys():
            return None
        is_training, reader = loader.startswith('train'), part.get('reader') or ''
        if reader:
            if reader.startswith(SHARDS):
                self._shards(key, part, is_training)
            return None
        root = Path(part['root']).expanduser()
        folder = root / part['split']
        if not folder.exists():
            if not (issubclass(target, Digits) and not root.exists()):  # which writes them
                there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
                hint = f' {root} has {", ".join(there[:10])}.' if there else ''
                self.report(key, f'there is no image folder {folder.absolute()}.{hint}')
            return None
        self.folders[loader] = folder
        return self._folder(key, folder, is_training) if folder.is_dir() else None

    def _shards(self, key: str, part: dict, is_training: bool) -> None:
        with self.reporting(key):
            paths, lengths = find_shards(part['root'], part['split'])
            if is_training and all(path.name in lengths for path in paths):
                self._epoch(sum(lengths[path.name] for path in paths))

    def _folder(self, key: str, folder: Path, is_training: bool) -> list[str] | None:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        folders = [entry.path for entry in entries if entry.is_dir() and not entry.name.startswith('.')]
        if any(_is_image(entry) for entry in entries):
            self.report(key, f'{folder} has images outside of class folders.')
            return None
        leaves = {path: set(_leaves(path, quick=True)) for path in folders}
        empty = [Path(path).name for path, names in leaves.items() if not names]
        if empty or not folders:
            said = f'class folders without images: {", ".join(empty[:10])}' if empty else 'no class folders'
            self.report(key, f'{folder} has {said}.')
            return None
        if is_training and self.batch is not None:
            draws = self.world_size * self.batch * self.accumulated
            self._epoch(sum(1 for _ in islice(_images(folder), 2 * draws + 1000)))  # as many as tell
        return sorted(set().union(*leaves.values()))

    def _epoch(self, images: int) -> None:
        """Whether an epoch of so many images has a batch, and as many as are accumulated, on each process."""
        if self.batch is None or self.sampler is None:
            return
        loader = self.cfg['train_dataloader']
        sampler = registry.DATA_SAMPLERS.build(self.sampler, default_args={'dataset': range(images), 'seed': 0})
        if isinstance(sampler, ShuffledStream):
            sampler.world_size = self.world_size
            own = len(sampler)
        else:
            own = -(-images // self.world_size)
        batches = own // self.batch if loader.get('drop_last') else -(-own // self.batch)
        if batches < self.accumulated:
            wanted = f'{self.accumulated} batches' if self.accumulated > 1 else 'a batch'
            self.report(
                'train_dataloader.batch_size',
                f'{images} training images on {self.world_size} process(es) leave {images // self.world_size} to each '
                f'in an epoch, which do not fill {wanted} of {self.batch}. Give a smaller one.',
            )


def _source(module) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ''


def _values(part) -> Iterator:
    yield part
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ():
        yield from _values(value)


def _is_part(part, whole) -> bool:
    """Whether two values are equal, or the second has all that the first, a dict, has."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and _is_part(value, whole[key]) for key, value in part.items())
    return part == whole


def _each(key: str, part) -> list[tuple[str, object]]:
    """The parts of a list by their keys, or the only one."""
    if isinstance(part, Sequence) and not isinstance(part, str):
        return [(f'{key}.{place}', other) for place, other in enumerate(part)]
    return [(key, part)]


def _find(where: Registry, name) -> Callable | None:
    if not isinstance(name, str):
        return name
    try:
        return where.get(name)
    except (ImportError, RuntimeError):  # mmengine's of a dotted name that it can't import
        return None


def _names(where: Registry | None) -> list[str]:
    names = []
    while where is not None:
        names += where.module_dict
        where = where.parent
    return names


def _hint(name, names: Iterable[str], cutoff: float = 0.6) -> str:
    names = sorted(names)
    close = near(str(name), names, cutoff=cutoff)
    if close:
        return f' Did you mean {" or ".join(close)}?'
    return f' Expected one of {", ".join(names)}.' if 0 < len(names) <= 20 else ''


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _is_image(entry: os.DirEntry) -> bool:
    return os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file()


def _leaves(folder: Path | str, quick: bool = False) -> Iterator[str]:
    """Names of the folders with images, by which timm's reader names classes; quickly, of none below another."""
    below, has_images = [], False
    for entry in os.scandir(folder):
        if not has_images and _is_image(entry):
            has_images = True
            yield Path(folder).name
            if quick:
                return
        elif entry.is_dir():
            below.append(entry.path)
    for path in below:
        yield from _leaves(path, quick)


def _images(folder: Path) -> Iterator[str]:
    for path, _, files in os.walk(folder, followlinks=True):
        for name in files:
            if os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield os.path.join(path, name)
