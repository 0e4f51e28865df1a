"""The classifier: augmentation of batches, targets, distillation, fine-tuning, and how its backbone runs."""

import copy
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F

from zoo.backbones.checkpoints import CheckpointError
from zoo.train.distillation import distillation_loss
from zoo.train.optim import param_groups
from zoo.train.seeding import seed_everything
from zoo.train.tasks import ImageClassifier, binary_cross_entropy, create_backbone

CROSS_ENTROPY = {'type': 'cross_entropy'}
MIXUP = {'mixup_alpha': 0.8, 'cutmix_alpha': 1.0}


def classifier(name='test_resnet', loss=CROSS_ENTROPY, num_classes=3, seed=0, backbone=None, **kwargs):
    torch.manual_seed(seed)
    return ImageClassifier({'name': name, 'num_classes': num_classes, **(backbone or {})}, loss, **kwargs)


def batch(size=4, side=32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (size, 3, side, side + 1), dtype=torch.uint8, generator=generator)
    return images, torch.randint(3, (size,), generator=generator)


def test_a_training_batch_is_normalized_then_erased_then_mixed_as_timm_does():
    erasing = {'probability': 0.8, 'mode': 'pixel', 'max_count': 2}
    task = classifier(mixup=MIXUP, random_erasing=erasing)
    images, labels = batch()
    seed_everything(3)
    ours, targets = task.augment(task.normalize(images), labels)
    seed_everything(3)
    erased = RandomErasing(**erasing, device='cpu')(task.normalize(images))
    assert not torch.equal(erased, task.normalize(images))
    expected, expected_targets = Mixup(**MIXUP, label_smoothing=0.0, num_classes=3)(erased, labels)
    assert torch.equal(ours, expected)
    assert torch.equal(targets, expected_targets)


def test_evaluation_neither_erases_nor_mixes():
    task = classifier(mixup=MIXUP, random_erasing={'probability': 1.0, 'mode': 'pixel'}).eval()
    images, _ = batch()
    plain = classifier().eval()
    with torch.no_grad():
        assert torch.equal(task(images), plain(images))


def test_mixed_labels_are_smoothed_once_as_timms_mixup_and_loss_do():
    task = classifier(loss={**CROSS_ENTROPY, 'label_smoothing': 0.1}, mixup=MIXUP).eval()
    images, labels = batch()
    seed_everything(5)
    loss = task(images, labels, mode='loss')['loss']
    seed_everything(5)
    mixed, targets = Mixup(**MIXUP, label_smoothing=0.1, num_classes=3)(task.normalize(images), labels)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(task.backbone(mixed), targets))
    with pytest.raises(ValueError, match=r'twice: by 0\.1 in loss and by 0\.2 in mixup'):
        classifier(loss={**CROSS_ENTROPY, 'label_smoothing': 0.1}, mixup={**MIXUP, 'label_smoothing': 0.2})


def test_binary_cross_entropy_is_timms():
    torch.manual_seed(0)
    logits, (_, labels) = torch.randn(4, 3), batch()
    soft = torch.rand(4, 3)
    for arguments in ({}, {'target_threshold': 0.2}):
        for targets, smoothing in ((labels, 0.1), (soft, 0.0)):
            ours = binary_cross_entropy(logits, targets, label_smoothing=smoothing, **arguments)
            timms = BinaryCrossEntropy(smoothing=smoothing, **arguments)(logits, targets)
            torch.testing.assert_close(ours, timms)
    summed = binary_cross_entropy(logits, soft, sum_classes=True)
    torch.testing.assert_close(summed, BinaryCrossEntropy(smoothing=0.0, sum_classes=True)(logits, soft))


def test_an_odd_batch_images_of_other_channels_and_unknown_arguments_are_named():
    task = classifier(mixup=MIXUP)
    with pytest.raises(ValueError, match='even, not 3'):
        task(*batch(3), mode='loss')
    with pytest.raises(ValueError, match=r'3 channels, got \(2, 1, 8, 8\)'):
        task(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r'mixup could not be made.*alpha'):
        classifier(mixup={'alpha': 1.0})
    with pytest.raises(ValueError, match=r"random_erasing could not be made.*'pixels'"):
        classifier(random_erasing={'probability': 0.25, 'mode': 'pixels'})


def test_soft_distillation_is_the_divergence_at_a_temperature_and_hard_the_teachers_decision():
    torch.manual_seed(0)
    logits, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    truth, guess = (teacher / 3).softmax(1), (logits / 3).softmax(1)
    expected = (truth * (truth.log() - guess.log())).sum() * 9 / 35
    torch.testing.assert_close(distillation_loss(logits, teacher, 'soft', tau=3.0), expected)
    expected = -logits.log_softmax(1)[torch.arange(5), teacher.argmax(1)].mean()
    torch.testing.assert_close(distillation_loss(logits, teacher, 'hard'), expected)
    with pytest.raises(ValueError, match="'firm'"):
        distillation_loss(logits, teacher, 'firm')


TEACHER = {'name': 'test_convnext', 'pretrained': False, 'num_classes': 3}


@pytest.mark.parametrize('kind', ['hard', 'soft'])
def test_a_student_with_two_heads_learns_by_each_as_deit_defines(kind):
    """On the mixed images: (1 - alpha) x labels' loss of one head, alpha x teacher's of the other."""
    distillation = {'kind': kind, 'alpha': 0.3, 'tau': 2.0}
    task = classifier(
        'shvit_s1_distilled', mixup=MIXUP, teacher=TEACHER, distillation=distillation, mean=(0.4,) * 3, std=(0.3,) * 3
    )
    images, labels = batch(side=64)
    frozen = copy.deepcopy(task)
    seed_everything(5)
    loss = task.train()(images, labels, mode='loss')['loss']
    seed_everything(5)
    mixed, targets = frozen.augment((images / 255 - 0.4) / 0.3, labels)
    own, taught = frozen.train().backbone(mixed)
    # The teacher sees the same images in its own normalization.
    mean, std = (torch.tensor(frozen.teacher.model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    truth = frozen.teacher.model((mixed * 0.3 + 0.4 - mean) / std)
    expected = 0.7 * F.cross_entropy(own, targets) + 0.3 * distillation_loss(taught, truth, kind, 2.0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert task.eval()(images).shape == (4, 3)


def test_a_student_with_one_head_learns_by_it():
    task = classifier(teacher=TEACHER).eval()
    images, labels = batch()
    logits, truth = task(images), task.teacher(task.normalize(images))
    expected = 0.5 * F.cross_entropy(logits, labels) + 0.5 * F.cross_entropy(logits, truth.argmax(1))
    torch.testing.assert_close(task(images, labels, mode='loss')['loss'], expected)


def test_the_teacher_is_frozen_in_no_state_and_moves_with_the_task():
    task = classifier(teacher={**TEACHER, 'drop_path_rate': 0.9})
    assert set(task.state_dict()) == {f'backbone.{key}' for key in task.backbone.state_dict()}
    assert all('teacher' not in name for name, _ in task.named_parameters())
    groups = param_groups(task.backbone, 0.1)
    assert sum(len(group['params']) for group in groups) == len(list(task.parameters()))
    task.train()
    assert not any(module.training for module in task.teacher.modules())
    task(*batch(), mode='loss')['loss'].backward()
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    task.double()
    assert {value.dtype for value in task.teacher.state_dict().values() if value.is_floating_point()} == {torch.float64}


def test_a_teacher_of_other_classes_and_distillation_without_one_are_refused():
    with pytest.raises(ValueError, match='knows 5 classes, the student 3'):
        classifier(teacher={**TEACHER, 'num_classes': 5})
    with pytest.raises(ValueError, match='would replace its trained classifier'):
        classifier(teacher={**TEACHER, 'pretrained': True})
    with pytest.raises(ValueError, match='needs a teacher'):
        classifier(distillation={'kind': 'hard'})
    with pytest.raises(ValueError, match=r'kind=.*alfa'):
        classifier(teacher=TEACHER, distillation={'alfa': 0.1})


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run of the zoo on seven classes at 160 pixels."""
    torch.manual_seed(3)
    model = timm.create_model('test_vit', num_classes=7)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    return model, str(tmp_path / 'model.safetensors')


def test_fine_tuning_keeps_a_fitting_classifier_and_says_when_it_replaces_one(checkpoint, caplog):
    model, path = checkpoint
    same = create_backbone('test_vit', checkpoint=path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in same.state_dict().items())
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        other = create_backbone('test_vit', checkpoint=path, num_classes=3)
    assert other.num_classes == 3
    assert other.head.weight.shape[0] == 3
    assert torch.equal(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert 'the classifier of 7 classes to a new one of 3' in caplog.text


def test_fine_tuning_at_another_size_goes_through_the_models_own_resizing(checkpoint, caplog):
    model, path = checkpoint
    with caplog.at_level(logging.WARNING):
        larger = create_backbone('test_vit', checkpoint=path, num_classes=7, img_size=224)
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed, (14, 14), num_prefix_tokens=1)
    torch.testing.assert_close(larger.pos_embed, expected)
    assert 'pos_embed from (1, 101, 64) to (1, 197, 64)' in caplog.text


def test_a_missing_or_unreadable_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth'):
        create_backbone('test_vit', checkpoint=str(tmp_path / 'none.pth'))
    (tmp_path / 'torn.pth').write_bytes(b'PK')
    with pytest.raises(CheckpointError, match=r'torn\.pth'):
        create_backbone('test_vit', checkpoint=str(tmp_path / 'torn.pth'))


def test_the_new_classifier_of_a_fine_tuning_can_be_fresh_and_scaled(checkpoint):
    model, path = checkpoint
    backbone = {'checkpoint': path}
    kept = classifier('test_vit', num_classes=7, backbone=backbone)
    fresh = classifier('test_vit', num_classes=7, backbone=backbone, new_classifier=True)
    scaled = classifier('test_vit', num_classes=7, backbone=backbone, classifier_scale=0.001)
    assert torch.equal(kept.backbone.head.weight, model.head.weight)
    assert not torch.equal(fresh.backbone.head.weight, model.head.weight)
    assert torch.equal(scaled.backbone.head.weight, model.head.weight * 0.001)


@pytest.mark.parametrize(
    'options',
    [{'channels_last': True}, {'grad_checkpointing': True}, {'compile': {'backend': 'eager'}}],
    ids=lambda options: next(iter(options)),
)
def test_how_the_backbone_runs_changes_neither_loss_nor_gradients_nor_names(options):
    images, labels = batch()
    losses, gradients, names = [], [], []
    for kwargs in ({}, options):
        task = classifier('test_convnext', **kwargs)
        loss = task(images, labels, mode='loss')['loss']
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in task.parameters()])
        names.append(list(task.state_dict()))
    torch.testing.assert_close(*losses)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert names[0] == names[1]
    if 'channels_last' in options:
        assert task.normalize(images).is_contiguous(memory_format=torch.channels_last)
        assert any(
            p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
            for p in task.parameters()
        )
    if 'compile' in options:
        assert isinstance(task.backbone, nn.Module)
        assert task.backbone._compiled_call_impl is not None


def test_what_a_backbone_learns_beside_its_labels_is_weighed():
    images, labels = batch(side=64)
    overlock = {
        'dims': (16, 32, 32, 64),
        'depths': (1, 1, 1, 1, 2, 2),
        'num_heads': (1, 2),
        'aux_head': True,
        'drop_path_rate': 0.0,
    }
    task = classifier('overlock_xt', backbone=overlock, auxiliary=0.4)
    second = task.loss(images, labels)['loss']
    task.auxiliary = 0.8
    third = task.loss(images, labels)['loss']
    own, other = task.backbone(task.normalize(images))
    torch.testing.assert_close(third - second, 0.4 * F.cross_entropy(other, labels))
    assert not torch.equal(own, other)
    task.auxiliary = 0.0
    with pytest.raises(ValueError, match='second classifier: give'):
        task.loss(images, labels)

    moh = {'dims': (24, 48, 72, 96), 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 3, 4)}
    moh |= {'shared_heads': (0, 2, 1, 2), 'routed_heads': (1, 0, 1, 1), 'drop_path_rate': 0.0}
    task = classifier('moh_transnext_small_80', backbone=moh, auxiliary=0.01)
    with task.backbone.balance_loss() as balance:
        logits = task.backbone(task.normalize(images))
        expected = F.cross_entropy(logits, labels) + 0.01 * balance()
    torch.testing.assert_close(task.loss(images, labels)['loss'], expected)

    with pytest.raises(ValueError, match='nothing to weigh'):
        classifier(auxiliary=0.1).loss(images, labels)
    with pytest.raises(ValueError, match='without a teacher'):
        classifier(auxiliary=0.1, teacher={'name': 'test_resnet', 'pretrained': False})
