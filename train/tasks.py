"""What a backbone is trained for. Backbones come from timm by name, those of the zoo among them."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import timm
import torch
from mmengine.dist import is_main_process
from mmengine.model import BaseModel
from timm.data import Mixup, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.backbones.checkpoints import unwrap
from zoo.models import read_checkpoint

from .distillation import Teacher, distillation_loss
from .registry import FUNCTIONS, MODELS

__all__ = ['ImageClassifier', 'create_backbone', 'stored_classes']

logger = logging.getLogger(__name__)
FUNCTIONS.register_module(module=F.cross_entropy)


@FUNCTIONS.register_module()
def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    target_threshold: float | None = None,
    sum_classes: bool = False,
) -> Tensor:
    """Mean over samples of each class by itself; targets are class indices or probabilities.

    Args:
        logits: (B, K).
        targets: class indices (B,) or probabilities (B, K).
        label_smoothing: moves this much of the targets to all classes alike.
        target_threshold: targets above it become 1, others 0 (after smoothing).
        sum_classes: sum over the classes instead of their mean.
    """
    if not targets.is_floating_point():
        targets = F.one_hot(targets, logits.shape[1])
    targets = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    if target_threshold is not None:
        targets = targets.gt(target_threshold).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, targets)
    return loss * logits.shape[1] if sum_classes else loss


def create_backbone(name: str, checkpoint: str | None = None, **kwargs) -> nn.Module:
    """`zoo.create_model`, with errors that say what in a config is wrong.

    Args:
        name: a model's name, of the zoo or of timm.
        checkpoint: file of weights to begin from: the authors', timm's, or of a run of the zoo. If `num_classes` is
            another than its classifier's, that is replaced by a new one; weights of another image size go through the
            model's own resizing. Both are logged.
        kwargs: arguments of `timm.create_model` and of the model.

    Raises:
        ValueError: no such model, or an argument that it doesn't take.
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: it can't be read, or doesn't fit the model.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f'There is no model {name!r}.' + (f' Near: {", ".join(near)}.' if near else ''))
    try:
        return _load(name, checkpoint, kwargs) if checkpoint else zoo.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f'{name} could not be made with {kwargs}: {error}') from error


def stored_classes(state_dict: Mapping[str, Tensor], name: str) -> int | None:
    """Number of classes of a state dict of model `name`, or None if it has no classifier of a known name."""
    facts = timm.get_pretrained_cfg(name, allow_unregistered=False)
    classifiers = facts.classifier if facts and facts.classifier else ()
    classifiers = {classifiers} if isinstance(classifiers, str) else {*classifiers}
    weights = (state_dict.get(f'{layer}.weight') for layer in (*sorted(classifiers), 'head'))  # as the authors name it
    return next((len(weight) for weight in weights if weight is not None), None)


def _load(name: str, checkpoint: str, kwargs: dict) -> nn.Module:
    kwargs = {key: value for key, value in kwargs.items() if key != 'pretrained'}
    state_dict = unwrap(read_checkpoint(checkpoint), name)
    facts = timm.get_pretrained_cfg(name, allow_unregistered=False)
    stored = stored_classes(state_dict, name)
    wanted = kwargs.pop('num_classes', stored or (facts.num_classes if facts else 1000))
    stored = stored or wanted
    model = zoo.create_model(name, checkpoint=checkpoint, num_classes=stored, **kwargs)
    changes = [
        f'{key} from {tuple(state_dict[key].shape)} to {tuple(value.shape)}'
        for key, value in model.state_dict().items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    if stored != wanted:
        model.reset_classifier(wanted)
        changes.append(f'the classifier of {stored} classes to a new one of {wanted}')
    if changes and is_main_process():
        more = f', and {len(changes) - 3} more' if len(changes) > 3 else ''
        logger.warning(f'{name} changed what it took from {checkpoint}: {"; ".join(changes[-3:])}{more}.')
    return model


def _function(name: str):
    function = FUNCTIONS.get(name)
    if function is None:
        raise ValueError(f'There is no loss {name!r}. Losses: {", ".join(sorted(FUNCTIONS.module_dict))}.')
    return function


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """One label an image.

    A training batch is normalized, then randomly erased, then mixed, as timm's pipeline without its prefetcher does.
    Labels are smoothed once, by the loss: with mixup too, whose own smoothing is off unless it is asked for.

    Args:
        backbone: `name` and other arguments of `create_backbone`.
        loss: function of logits and targets: its registered name as `type`, and more arguments.
        mean, std: of the images' channels, in 0..1; those of the backbone's pretrained_cfg unless given.
        mixup: arguments of timm's Mixup (CutMix too) for training batches; none if None.
        random_erasing: arguments of timm's RandomErasing (probability, mode, max_count, ...); none if None.
        teacher: `name`, `checkpoint` and other arguments of `create_backbone` for a model to learn from; without a
            checkpoint, timm's or the authors' weights are downloaded. It is in no state dict.
        distillation: `kind` ('hard' or 'soft'), `alpha` (the teacher's share of the loss, 0.5) and `tau` (the
            temperature, 1). A backbone with a distillation head learns from the teacher by that head, another by its
            only logits.
        auxiliary: weight of the loss of a backbone's second classifier (OverLoCK with aux_head), or of what keeps its
            routers in balance (MoH's `balance_loss`), which is added to that of the labels.
        new_classifier: leave a checkpoint's classifier, though it fits, for a newly initialized one.
        classifier_scale: what the initial weights of the classifier are multiplied by.
        channels_last: memory format of backbone and images.
        grad_checkpointing: compute activations again in the backward pass instead of keeping them.
        compile: whether to compile the backbone, or the arguments of torch.compile.

    Raises:
        ValueError: a model, loss or argument that doesn't exist, or two that contradict each other.
    """

    exported = 'backbone.'  # the weights that a run leaves for use elsewhere

    def __init__(
        self,
        backbone: dict,
        loss: dict,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        mixup: dict | None = None,
        random_erasing: dict | None = None,
        teacher: dict | None = None,
        distillation: dict | None = None,
        auxiliary: float = 0.0,
        new_classifier: bool = False,
        classifier_scale: float | None = None,
        channels_last: bool = False,
        grad_checkpointing: bool = False,
        compile: bool | dict = False,
    ):
        super().__init__()
        self.backbone = create_backbone(**backbone)
        loss = dict(loss)
        self._loss = _function(loss.pop('type'))
        self._loss_arguments = loss
        self.mixup = _mixup(mixup, loss, self.num_classes) if mixup else None
        self.random_erasing = _made('random_erasing', RandomErasing, random_erasing) if random_erasing else None
        stored = resolve_model_data_config(self.backbone)
        for key, value in (('mean', mean), ('std', std)):
            channels = torch.tensor(value or stored[key]).view(-1, 1, 1)
            self.register_buffer(key, 255 * channels, persistent=False)  # images come as bytes
        if auxiliary and teacher:
            raise ValueError('auxiliary is of a backbone that learns without a teacher: leave one of them out.')
        self.auxiliary = auxiliary
        self._teach(teacher, distillation)
        if new_classifier:
            self.backbone.reset_classifier(self.num_classes)
        if classifier_scale is not None:
            self._scale_classifier(classifier_scale)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone.to(memory_format=self.memory_format)
        if grad_checkpointing:
            self.backbone.set_grad_checkpointing(True)
        if compile:
            self.backbone.compile(**(compile if isinstance(compile, dict) else {}))

    def _teach(self, teacher: dict | None, distillation: dict | None) -> None:
        if distillation and not teacher:
            raise ValueError('distillation needs a teacher: teacher=dict(name=...).')
        arguments = {'kind': 'hard', 'alpha': 0.5, 'tau': 1.0, **(distillation or {})}
        alpha = arguments.pop('alpha')
        self.distillation_alpha = alpha if teacher else 0.0
        self._distillation = arguments
        if set(arguments) != {'kind', 'tau'} or arguments['kind'] not in ('hard', 'soft'):
            raise ValueError(f"distillation takes kind='hard' or 'soft', alpha and tau, got {distillation}.")
        # Not a submodule: in no state dict, optimizer, average or gradient bucket.
        self.__dict__['teacher'] = None
        if teacher:
            mean, std = self.mean / 255, self.std / 255
            self.__dict__['teacher'] = Teacher(_teacher(dict(teacher)), self.num_classes, mean, std)
            if hasattr(self.backbone, 'set_distilled_training'):
                self.backbone.set_distilled_training(True)

    def _scale_classifier(self, factor: float) -> None:
        classifiers = self.backbone.get_classifier()
        with torch.no_grad():
            for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
                for parameter in classifier.parameters():
                    parameter.mul_(factor)

    def _apply(self, fn, recurse: bool = True):
        if self.__dict__.get('teacher') is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    def init_weights(self) -> None:
        """Nothing: timm has initialized or loaded the backbone, and mmengine would call its init_weights again."""

    def forward(self, images: Tensor, labels: Tensor | None = None, mode: str = 'tensor'):
        """Logits, or with mode='loss' and labels {'loss': scalar}. Images are uint8 (B, C, H, W), labels int64 (B,)."""
        if mode == 'loss':
            return self.loss(images, labels)
        return self.predict(images)

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes), float32, of images as bytes."""
        return _at_least_float32(self.backbone(self.normalize(images)))

    def loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss of a training batch."""
        images, labels = self.augment(self.normalize(images), labels)
        is_routed = self.auxiliary and hasattr(self.backbone, 'balance_loss')
        with self.backbone.balance_loss() if is_routed else nullcontext() as balance:
            outputs = self.backbone(images)
        own, taught = outputs if isinstance(outputs, tuple | list) else (outputs, outputs)
        loss = self._loss(_at_least_float32(own), labels, **self._loss_arguments)
        if self.teacher is not None:
            return {'loss': self._distilled(loss, taught, images)}
        beside = None
        if is_routed:
            beside = balance()
        elif taught is not own:
            beside = self._loss(_at_least_float32(taught), labels, **self._loss_arguments)
        if self.training and bool(self.auxiliary) != (beside is not None):
            what = 'nothing to weigh' if beside is None else 'a second classifier: give the weight of its loss'
            raise ValueError(f'auxiliary={self.auxiliary}, but the backbone has {what}.')
        return {'loss': loss if beside is None else loss + self.auxiliary * beside}

    def _distilled(self, loss: Tensor, taught: Tensor, images: Tensor) -> Tensor:
        truth = _at_least_float32(self.teacher(images))
        distilled = distillation_loss(_at_least_float32(taught), truth, **self._distillation)
        return (1 - self.distillation_alpha) * loss + self.distillation_alpha * distilled

    def normalize(self, images: Tensor) -> Tensor:
        """Bytes to floats of the mean and standard deviation that the backbone expects."""
        if images.shape[1] != len(self.mean):
            raise ValueError(f'Expected images of {len(self.mean)} channels, got {tuple(images.shape)}.')
        return ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A normalized training batch erased and mixed, and its labels, as probabilities (B, num_classes) if mixed."""
        if self.random_erasing is not None:
            self.random_erasing.device = images.device
            images = self.random_erasing(images)
        if self.mixup is not None:
            if len(images) % 2:
                raise ValueError(f'mixup pairs the images of a batch, which must be even, not {len(images)}.')
            images, labels = self.mixup(images, labels)
        return images, labels


def _teacher(arguments: dict) -> nn.Module:
    arguments.setdefault('pretrained', 'checkpoint' not in arguments)
    if 'num_classes' in arguments and (arguments['pretrained'] or 'checkpoint' in arguments):
        raise ValueError('teacher.num_classes would replace its trained classifier by a new one. Leave it out.')
    return create_backbone(**arguments)


def _mixup(arguments: dict, loss: dict, num_classes: int) -> Mixup:
    if arguments.get('label_smoothing') and loss.get('label_smoothing'):
        raise ValueError(
            f'Labels would be smoothed twice: by {loss["label_smoothing"]} in loss and by '
            f'{arguments["label_smoothing"]} in mixup. Leave one out.'
        )
    return _made('mixup', Mixup, {'label_smoothing': 0.0, **arguments, 'num_classes': num_classes})


def _made(name: str, cls: type, arguments: dict):
    try:
        return cls(**arguments)
    except (AssertionError, TypeError) as error:
        raise ValueError(f'{name} could not be made with {dict(arguments)}: {error or "wrong value"}') from error


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.element_size() < 4 else logits
