"""Detectors: losses, predictions in pixels of the image, equality with torchvision's, stages, views, bad targets."""

import math
from collections import OrderedDict
from functools import partial
from unittest import mock

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn
from torchvision import tv_tensors
from torchvision.models import detection
from torchvision.models.detection import roi_heads as torchvision_roi_heads
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

from zoo.train.dense.detection_onestage import RetinaNet
from zoo.train.dense.detection_rcnn import FasterRCNN, MaskRCNN
from zoo.train.dense.detection_roi import RoIPool, RoIStage
from zoo.train.dense.detectors import Detector, checked_targets, merge_detections, paste_masks
from zoo.train.dense.features import levels
from zoo.train.dense.task import collate
from zoo.train.registry import MODELS

CLASSES = 3
RPN = {'pre_nms_top_n': (200, 100), 'post_nms_top_n': (100, 20)}
HEADS = {
    'RetinaNet': {},
    'FCOS': {},
    'FasterRCNN': {'rpn': RPN, 'samples': 16},
    'MaskRCNN': {'rpn': RPN, 'samples': 16, 'box_head': '4conv1fc', 'norm': 'syncbn', 'box_loss': 'giou'},
    'CascadeRCNN': {'rpn': RPN, 'samples': 16, 'masks': True},
}


def detector(head='FasterRCNN', seed=0, test=None, options=None, **arguments):
    torch.manual_seed(seed)
    return Detector(
        {'name': 'van_b0'},
        {'type': head, 'num_classes': CLASSES, **(HEADS[head] if options is None else options)},
        {'type': 'FPN', 'out_channels': 32, 'extra_levels': 1},
        {'resize': None, 'score_threshold': 0.0, 'max_detections': 12, **(test or {})},
        **arguments,
    )


def scene(height, width, boxes, labels=None, seed=0):
    """Rectangles of a colour a class on noise, and what a dataset says of them."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(90, 110, (3, height, width), dtype=torch.uint8, generator=generator)
    labels = list(range(len(boxes))) if labels is None else labels
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, label, (x0, y0, x1, y1) in zip(masks, labels, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
        image[:, y0:y1, x0:x1] = torch.tensor([255 if channel == label else 0 for channel in range(3)])[:, None, None]
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    target = {
        'name': f'scene {seed}',
        'image_id': seed,
        'boxes': tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=(height, width)),
        'labels': torch.tensor(labels, dtype=torch.int64),
        'masks': tv_tensors.Mask(masks),
    }
    return image, target


def batch():
    scenes = [
        scene(75, 90, [(10, 12, 42, 50), (50, 8, 85, 70)], seed=1),
        scene(64, 96, [(30, 20, 80, 56)], [2], seed=2),
    ]
    return [image for image, _ in scenes], [target for _, target in scenes]


def empty_batch():
    scenes = [scene(75, 90, [], seed=1), scene(64, 96, [], seed=2)]
    return [image for image, _ in scenes], [target for _, target in scenes]


def without_gradient(model):
    return [name for name, own in model.named_parameters() if own.grad is None or not own.grad.isfinite().all()]


# Losses and predictions of each


@pytest.mark.parametrize('head', HEADS)
def test_losses_are_finite_and_reach_all_parameters_with_and_without_objects(head):
    model = detector(head).train()
    for samples in (batch(), empty_batch()):
        model.zero_grad()
        losses = model(*samples, mode='loss')
        assert all('loss' in name and loss.ndim == 0 and loss.isfinite() for name, loss in losses.items()), losses
        sum(losses.values()).backward()
        assert without_gradient(model) == []
    images, (first, _) = batch()
    mixed = model.loss(images, [first, empty_batch()[1][1]])
    assert all(loss.isfinite() for loss in mixed.values())


@pytest.mark.parametrize('head', HEADS)
def test_predictions_are_in_pixels_of_the_images_given(head):
    model = detector(head, test={'resize': (64, 100)}).eval()
    images = [torch.randint(256, size, dtype=torch.uint8) for size in ((3, 40, 61), (3, 90, 70))]
    with torch.no_grad():
        predictions = model(images)
    for image, prediction in zip(images, predictions, strict=True):
        height, width = image.shape[-2:]
        boxes, scores, labels = (prediction[key] for key in ('boxes', 'scores', 'labels'))
        assert len(boxes) > 0
        assert boxes.dtype == scores.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height] * 2)).all()
        assert (boxes[:, 2:] > 0.7 * torch.tensor([width, height])).any(0).all()  # they fill the image
        assert torch.equal(scores, scores.sort(descending=True).values)
        assert (labels >= 0).all()
        assert (labels < CLASSES).all()
        assert ('masks' in prediction) == (head in ('MaskRCNN', 'CascadeRCNN'))
        if 'masks' in prediction:
            assert prediction['masks'].dtype == torch.bool
            assert prediction['masks'].shape == (len(boxes), height, width)


@pytest.mark.parametrize('head', HEADS)
def test_an_images_prediction_does_not_depend_on_the_others_of_its_batch(head):
    model = detector(head).eval()
    large, small = (torch.randint(256, size, dtype=torch.uint8) for size in ((3, 96, 130), (3, 70, 60)))
    with torch.no_grad():
        together, _ = model([large, small])
        _, swapped = model([small, large])
        alone = model([large])[0]
    for key, value in alone.items():
        assert value.shape == together[key].shape == swapped[key].shape
        if value.is_floating_point():
            torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(swapped[key], value, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('head', HEADS)
def test_under_autocast_what_boxes_are_made_of_is_float32(head):
    model = detector(head).train()
    exact = _seeded_losses(model)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = _seeded_losses(model)
    for name, loss in mixed.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.1, abs=0.05)
    sum(mixed.values()).backward()
    assert without_gradient(model) == []
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        prediction = model.eval()(batch()[0])[0]
    assert prediction['boxes'].dtype == prediction['scores'].dtype == torch.float32
    assert not torch.equal(prediction['boxes'], prediction['boxes'].bfloat16().float())


def _seeded_losses(model):
    torch.manual_seed(1)
    return model.loss(*batch())


@pytest.mark.parametrize('head', ['FCOS', 'CascadeRCNN'])
def test_nothing_found_is_an_empty_prediction(head):
    model = detector(head, test={'score_threshold': 0.99, 'flip': True}).eval()
    with torch.no_grad():
        prediction = model([torch.zeros(3, 80, 100, dtype=torch.uint8)])[0]
    shapes = {'boxes': (0, 4), 'scores': (0,), 'labels': (0,), 'masks': (0, 80, 100)}
    assert {key: tuple(value.shape) for key, value in prediction.items()} == {key: shapes[key] for key in prediction}


@pytest.mark.parametrize('head', ['RetinaNet', 'MaskRCNN'])
def test_channels_last_changes_no_loss(head):
    expected = _seeded_losses(detector(head))
    for name, loss in _seeded_losses(detector(head, channels_last=True)).items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-5)


def test_mmengine_takes_a_step():
    model = detector('MaskRCNN')
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 1e-3))
    before = model.head.rpn.head.cls_logits.weight.clone()
    logged = model.train_step(collate(list(zip(*batch(), strict=True))), wrapper)
    assert logged['loss'].item() == pytest.approx(sum(v.item() for k, v in logged.items() if k != 'loss'), rel=1e-5)
    assert not torch.equal(model.head.rpn.head.cls_logits.weight, before)


# Equality with torchvision's


class Body(nn.Module):
    """Backbone and neck of a detector, as torchvision expects them."""

    out_channels = 32

    def __init__(self, model):
        super().__init__()
        self.extract = model.extract

    def forward(self, images):
        return OrderedDict((str(level), x) for level, x in enumerate(self.extract(images)))


def same_size_batch():
    scenes = [
        scene(96, 128, [(10, 12, 42, 50), (50, 8, 115, 70)], seed=1),
        scene(96, 128, [(30, 20, 80, 56)], [2], seed=2),
    ]
    return [image for image, _ in scenes], [target for _, target in scenes]


def transform_of(model):
    statistics = {'image_mean': model.mean.flatten().tolist(), 'image_std': model.std.flatten().tolist()}
    return {'min_size': 96, 'max_size': 128, **statistics}


def compare(model, theirs, shift, names):
    images, targets = same_size_batch()
    plain = [{key: torch.as_tensor(target[key]) for key in ('boxes', 'labels', 'masks')} for target in targets]
    plain = [{**target, 'labels': target['labels'] + shift} for target in plain]
    ours = model.train().loss(images, targets)
    centred = partial(roi_align, aligned=True)  # for what masks are compared with
    with mock.patch.object(torchvision_roi_heads, 'roi_align', centred):
        expected = theirs.train()([image.float() for image in images], plain)
    assert set(ours) == {names.get(name, name) for name in expected}
    for name, loss in expected.items():
        torch.testing.assert_close(ours[names.get(name, name)], loss, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        found = model.eval()(images)
        expected = theirs.eval()([image.float() for image in images])
    for own, other in zip(found, expected, strict=True):
        assert len(own['boxes']) > 10
        torch.testing.assert_close(own['boxes'], other['boxes'], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(own['scores'], other['scores'])
        assert torch.equal(own['labels'] + shift, other['labels'])


@pytest.mark.parametrize('head', ['RetinaNet', 'FCOS'])
def test_detectors_of_one_stage_are_torchvisions(head):
    model = detector(head)
    theirs = getattr(detection, head)(
        Body(model),
        CLASSES,
        anchor_generator=model.head.anchor_generator,
        score_thresh=0.0,
        nms_thresh=model.head.nms_threshold,
        detections_per_img=12,
        **transform_of(model),
    )
    theirs.head.load_state_dict(model.head.head.state_dict())
    parts = ('classification', 'bbox_regression', 'bbox_ctrness')
    compare(model, theirs, 0, {name: f'loss_{name}' for name in parts})


@pytest.mark.parametrize('head', ['FasterRCNN', 'MaskRCNN'])
def test_detectors_of_two_stages_are_torchvisions_but_for_where_pixels_have_their_centres(head):
    model = detector(head, options={'rpn': RPN, 'samples': 16})
    theirs = getattr(detection, head)(
        Body(model),
        CLASSES + 1,
        rpn_anchor_generator=model.head.rpn.anchor_generator,
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=20,
        box_score_thresh=0.0,
        box_detections_per_img=12,
        box_batch_size_per_image=16,
        **transform_of(model),
    )
    for rpn in (theirs.rpn, model.head.rpn):
        rpn.register_forward_pre_hook(lambda *_: torch.manual_seed(5) and None)  # samples alike
    theirs.rpn.load_state_dict(model.head.rpn.state_dict())
    theirs.roi_heads.load_state_dict(model.head.roi_heads.state_dict())
    theirs.roi_heads.box_roi_pool = model.head.roi_heads.box_roi_pool
    theirs.roi_heads.mask_roi_pool = model.head.roi_heads.mask_roi_pool
    compare(model, theirs, 1, {})


def test_masks_within_boxes_are_torchvisions():
    model = detector('MaskRCNN', options={}).eval()
    head = model.head
    maps = [torch.randn(2, 32, 96 // stride, 128 // stride) for stride in (4, 8, 16, 32, 64)]
    proposals = [torch.tensor([[5.0, 6, 60, 70], [40, 8, 120, 90]]), torch.tensor([[0.0, 0, 30, 30]])]
    images = ImageList(torch.zeros(2, 3, 96, 128), [(96, 128)] * 2)
    with torch.no_grad():
        expected, _ = head.roi_heads({str(i): x for i, x in enumerate(maps)}, proposals, images.image_sizes)
        labels = [own['labels'] - 1 for own in expected]
        masks = head.predict_masks(maps, images, [own['boxes'] for own in expected], labels)
    for own, other in zip(masks, expected, strict=True):
        assert own.shape == (len(other['boxes']), 28, 28)
        torch.testing.assert_close(own, other['masks'][:, 0])


# Levels


def test_anchors_lie_by_the_strides_whatever_the_size_of_the_batch():
    info = levels([32] * 3, [16, 32, 64])
    anchors = RetinaNet(info, 2).anchor_generator
    maps = [torch.zeros(1, 32, -(-160 // stride), -(-97 // stride)) for stride in (16, 32, 64)]
    (own,) = anchors(ImageList(torch.zeros(1, 3, 160, 97), [(160, 97)]), maps)
    centres = ((own[:, :2] + own[:, 2:]) / 2).unflatten(0, (-1, 9))[:, 0]
    expected = [(x * s, y * s) for s, x in zip((16, 32, 64), maps, strict=True) for y, x in _grid(x)]
    assert centres.tolist() == [list(map(float, centre)) for centre in expected]
    sizes = (own[:, 2:] - own[:, :2]).prod(1).sqrt().unflatten(0, (-1, 9))[:, 3:6].mean(1)  # the ratio 1 of each level
    assert sizes[[0, 70, -1]].tolist() == pytest.approx([4 * 1.28 * stride for stride in (16, 32, 64)], rel=0.05)


def _grid(x):
    return [(row, column) for row in range(x.shape[-2]) for column in range(x.shape[-1])]


def test_pooling_is_torchvisions_on_boxes_moved_by_half_a_pixel_of_their_level():
    strides, sides = (4, 8, 16, 32), (20, 111.9, 112, 223, 224, 447, 448, 900)
    chosen = (4, 4, 8, 8, 16, 16, 32, 32)
    maps = {str(i): torch.randn(1, 5, 1024 // stride, 1024 // stride) for i, stride in enumerate(strides)}
    boxes = torch.tensor([[30.0, 40, 30 + side, 40 + side] for side in sides])
    shift = torch.tensor(chosen)[:, None] / 2
    theirs = MultiScaleRoIAlign(list(maps), 7, 0)(maps, [boxes - shift], [(1024, 1024)])
    torch.testing.assert_close(RoIPool(strides, 7)(maps, [boxes]), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('strides', 'pooled'),
    [((4, 8, 16, 32, 64), [4, 8, 16, 32]), ((16, 32, 64), [16, 32]), ((64,), [64]), ((7, 14, 28, 56), [7, 14, 28])],
)
def test_levels_to_pool_from_are_those_of_stride_32_and_finer(strides, pooled):
    info = levels([32] * len(strides), strides)
    assert list(FasterRCNN(info, 2).roi_heads.box_roi_pool.strides) == pooled
    assert list(FasterRCNN(info, 2, roi_levels=1).roi_heads.box_roi_pool.strides) == [strides[0]]


def test_strides_without_4_and_an_odd_image():
    torch.manual_seed(0)
    model = Detector(
        {'name': 'shvit_s1'},
        {'type': 'MaskRCNN', 'num_classes': CLASSES, 'rpn': RPN},
        {'type': 'FPN', 'out_channels': 32},
        {'resize': None, 'score_threshold': 0.0},
    )
    assert model.feature_info.reduction() == [16, 32, 64]
    losses = model.train().loss(*batch())
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        assert model.eval()([torch.zeros(3, 97, 161)])[0]['boxes'][:, 2].max() > 150


# Stages


@pytest.fixture
def truth():
    """An object of 10 x 10 pixels; proposals that overlap it by 0.55, 0.65, 0.75, and one that doesn't."""
    target = {
        'boxes': torch.tensor([[20.0, 20, 30, 30]]),
        'labels': torch.tensor([2]),
        'masks': torch.zeros(1, 64, 64, dtype=torch.uint8),
    }
    proposals = torch.tensor([[20.0, 20, 30, 25.5], [20, 20, 30, 26.5], [20, 20, 30, 27.5], [40, 40, 60, 60]])
    return target, proposals


def test_each_stage_of_a_cascade_asks_for_more_overlap_and_finer_boxes(truth):
    target, proposals = truth
    info = levels([32] * 2, [8, 16])
    stages = MODELS.build({'type': 'CascadeRCNN', 'feature_info': info, 'num_classes': CLASSES}).roi_heads
    positives = [[2, 2, 2, 0], [0, 2, 2, 0], [0, 0, 2, 0]]
    deviations = [(0.1, 0.2), (0.05, 0.1), (1 / 30, 1 / 15)]
    for stage, expected, (place, size) in zip(stages, positives, deviations, strict=True):
        _, (labels,) = stage.assign_targets_to_proposals([proposals], [target['boxes']], [target['labels']])
        assert labels.tolist() == expected
        deltas = stage.box_coder.encode_single(torch.tensor([[22.0, 20, 32, 40]]), target['boxes'])
        assert deltas[0].tolist() == pytest.approx([0.2 / place, 0.5 / place, 0.0, math.log(2) / size])


def test_a_cascade_weighs_its_stages_and_hands_on_boxes_without_the_objects(truth, monkeypatch):
    target, proposals = truth
    info = levels([32] * 2, [8, 16])
    head = MODELS.build({'type': 'CascadeRCNN', 'feature_info': info, 'num_classes': CLASSES}).train()
    given = []
    losses = RoIStage.losses

    def seen(stage, maps, proposals, sizes, targets):
        given.append(proposals[0])
        return losses(stage, maps, proposals, sizes, targets)

    monkeypatch.setattr(RoIStage, 'losses', seen)
    for stage in head.roi_heads:
        nn.init.zeros_(stage.box_predictor.cls_score.weight)
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
    nn.init.constant_(head.roi_heads[0].box_predictor.bbox_pred.bias[:1], 10 * 0.1)  # to the right by a tenth
    maps = {'0': torch.randn(1, 32, 8, 8), '1': torch.randn(1, 32, 4, 4)}
    found = head._losses(maps, [proposals], [(64, 64)], [target])
    for stage, weight in enumerate((1, 0.5, 0.25), start=1):
        assert found[f'loss_classifier_{stage}'].item() == pytest.approx(weight * math.log(4))
    moved = proposals + torch.tensor([[1.0, 0, 1, 0]] * 3 + [[2.0, 0, 2, 0]])
    torch.testing.assert_close(given[1], moved)
    torch.testing.assert_close(given[2], moved)


def test_a_cascade_averages_the_probabilities_of_its_stages_for_the_last_boxes():
    info = levels([32] * 2, [8, 16])
    torch.manual_seed(0)
    head = MODELS.build({'type': 'CascadeRCNN', 'feature_info': info, 'num_classes': 1, 'score_threshold': 0.0}).eval()
    maps = {'0': torch.randn(1, 32, 8, 8), '1': torch.randn(1, 32, 4, 4)}
    boxes, probabilities = [torch.tensor([[10.0, 12, 40, 50]])], []
    with torch.no_grad():
        for stage in head.roi_heads:
            nn.init.normal_(stage.box_predictor.bbox_pred.bias)
            nn.init.normal_(stage.box_predictor.cls_score.bias)
            logits, deltas = stage.boxes(maps, boxes[-1:])
            probabilities.append(logits.softmax(1))
            boxes.append(stage.box_coder.decode_single(deltas[:, :4], boxes[-1]))
        found = head._detect(maps, boxes[:1], [(64, 64)])[0]
    torch.testing.assert_close(found['boxes'], boxes[-1].clamp(0, 64))
    torch.testing.assert_close(found['scores'], sum(probabilities)[:, 1] / 3)
    assert found['labels'].tolist() == [0]


def test_boxes_are_refined_by_the_objects_class_or_the_likeliest():
    stage = RoIStage(8, [8], CLASSES)
    proposals = [torch.tensor([[10.0, 10, 30, 30]] * 2)]
    deltas = torch.zeros(2, CLASSES + 1, 4)
    deltas[:, :, 0] = 10 * torch.tensor([0.0, 0.1, 0.2, 0.3])  # to the right, by so many widths
    logits = torch.tensor([[9.0, 1, 3, 2]] * 2)
    moved = stage.refine(logits, deltas.flatten(1), proposals, [(64, 40)], torch.tensor([1, 0]))[0]
    assert moved[:, 0].tolist() == pytest.approx([12, 14])
    moved = stage.refine(logits, 3 * deltas.flatten(1), proposals, [(64, 40)])[0]
    assert moved[0].tolist() == pytest.approx([22, 10, 40, 30])


@pytest.mark.parametrize('class_agnostic', [False, True])
def test_giou_is_of_decoded_boxes_weighs_ten_and_is_divided_by_all_samples(truth, class_agnostic):
    target, proposals = truth
    stage = RoIStage(8, [8], CLASSES, box_loss='giou', class_agnostic=class_agnostic, iou_threshold=0.6).train()
    nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
    maps = {'0': torch.randn(1, 8, 8, 8)}
    losses, _ = stage.losses(maps, [proposals], [(64, 64)], [target])
    # Positives overlap by 0.65, 0.75 and, the object itself, 1; all lie in it, so GIoU is IoU. There are 5 samples.
    assert losses['loss_box_reg'].item() == pytest.approx(10 * (0.35 + 0.25) / 5, rel=1e-4)


# Views


def test_boxes_of_views_come_back_into_the_image():
    model = detector(test={'resize': (64, 100), 'scales': (1.0, 0.5), 'flip': True}).eval()
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    seen = []

    def detect(maps, images):
        ((height, width),) = images.image_sizes
        seen.append((height, width))
        box = torch.tensor([[0.25 * width, 0.5 * height, 0.5 * width, 0.75 * height]])
        return [{'boxes': box, 'scores': torch.tensor([0.5 + 0.1 * len(seen)]), 'labels': torch.tensor([1])}]

    model.head.detect = detect
    with torch.no_grad():
        prediction = model([image])[0]
    assert seen == [(64, 96), (64, 96), (32, 48), (32, 48)]
    assert prediction['boxes'].tolist() == [[24, 16, 36, 24], [12, 16, 24, 24]]  # the mirrored one was the surer
    assert prediction['scores'].tolist() == pytest.approx([0.9, 0.8])


@pytest.mark.parametrize(('side', 'expected'), [((80, 100), (64, 80)), ((50, 200), (25, 100)), ((33, 65), (51, 100))])
def test_images_are_resized_to_the_short_side_unless_the_long_one_gets_too_long(side, expected):
    model = detector(test={'resize': (64, 100)})
    assert model.resize(torch.zeros(3, *side, dtype=torch.uint8)).shape == (3, *expected)
    half = model.resize(torch.zeros(3, *side), 0.5).shape
    assert max(abs(2 * x - y) for x, y in zip(half[1:], expected, strict=True)) <= 1


@pytest.mark.parametrize('head', ['FCOS', 'MaskRCNN'])
def test_with_mirrored_views_a_mirrored_image_has_mirrored_predictions(head):
    model = detector(head, test={'flip': True}).eval()
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        own, other = (model([x])[0] for x in (image, image.flip(-1)))
    x0, y0, x1, y1 = other['boxes'].unbind(1)
    torch.testing.assert_close(own['scores'], other['scores'])
    torch.testing.assert_close(own['boxes'], torch.stack((96 - x1, y0, 96 - x0, y1), 1), rtol=1e-4, atol=1e-3)
    assert torch.equal(own['labels'], other['labels'])
    if head == 'MaskRCNN':
        assert own['masks'].any()
        assert (own['masks'] != other['masks'].flip(-1)).float().mean() < 1e-3


def test_one_view_is_no_augmentation_and_views_are_merged_by_nms_of_each_class():
    model = detector().eval()
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        once = model([image])[0]
        model.test = {**model.test, 'scales': (1.0, 1.0)}
        twice = model([image])[0]
    for key, value in once.items():
        torch.testing.assert_close(twice[key], value)
    view = {
        'boxes': torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]]),
        'scores': torch.tensor([0.9, 0.8]),
        'labels': torch.tensor([0, 1]),
    }
    other = {'boxes': view['boxes'][:1] + 1, 'scores': torch.tensor([0.85]), 'labels': torch.tensor([0])}
    assert merge_detections([view, other], 0.5, 100)['scores'].tolist() == pytest.approx([0.9, 0.8])
    assert merge_detections([view, other], 0.7, 2)['scores'].tolist() == pytest.approx([0.9, 0.85])


def test_a_mask_cut_as_the_loss_does_is_pasted_where_it_was():
    image = torch.zeros(1, 120, 150)
    rows, columns = torch.meshgrid(torch.arange(120.0), torch.arange(150.0), indexing='ij')
    image[0] = ((rows - 50.3) ** 2 / 35**2 + (columns - 77.8) ** 2 / 52**2 < 1).float()  # an ellipse
    inside = image[0].nonzero()
    (y0, x0), (y1, x1) = inside.min(0).values.tolist(), (inside.max(0).values + 1).tolist()
    boxes = torch.tensor([[x0, y0, x1, y1], [x0 - 3.3, y0 + 0.4, x1 + 7.9, y1 + 2.5]], dtype=torch.float32)
    masks = torchvision_roi_heads.project_masks_on_boxes(image, boxes - 0.5, torch.zeros(2), 28)
    for mask in paste_masks(masks, boxes, (120, 150)):
        overlap = (mask & (image[0] > 0)).sum() / (mask | (image[0] > 0)).sum()
        assert overlap > 0.98
        centre = mask.nonzero().float().mean(0)
        assert (centre - inside.float().mean(0)).abs().max() < 0.15
    outside = paste_masks(torch.ones(1, 28, 28), torch.tensor([[-5.0, 100, 20, 140]]), (120, 150))
    assert outside.sum() == 20 * 20
    assert outside[0, 100:, :20].all()
    assert paste_masks(torch.ones(0, 28, 28), torch.ones(0, 4), (12, 15)).shape == (0, 12, 15)


@pytest.mark.parametrize('size', [(41, 150), (200, 33)])
def test_a_mask_pasted_in_its_window_is_the_one_of_the_whole_image(size):
    corners = torch.rand(30, 2) * torch.tensor([size[1], size[0]]) * 1.4 - 20  # some begin or end beyond the image
    boxes = torch.cat([corners, corners + torch.rand(30, 2) ** 3 * 2 * torch.tensor([size[1], size[0]])], dim=1)
    boxes[0, 2:] = boxes[0, :2]  # no area
    boxes[1] += 1000  # outside
    boxes[2] = boxes[2].round()
    boxes[3, 0] = float('nan')
    probabilities = torch.rand(30, 28, 28)

    def weights(start, end, pixels):
        extent = (end - start).clamp(min=torch.finfo(torch.float32).tiny)
        position = (torch.arange(pixels) + 0.5 - start) / extent * 28 - 0.5
        return (1 - (position[:, None] - torch.arange(28)).abs()).clamp(min=0)

    for threshold in (0.5, 0.1):
        pasted = paste_masks(probabilities, boxes, size, threshold)
        for mask, own, (x0, y0, x1, y1) in zip(pasted, probabilities, boxes, strict=True):
            expected = weights(y0, y1, size[0]) @ own @ weights(x0, x1, size[1]).mT >= threshold
            assert torch.equal(mask, expected)


# What is refused


def test_settings_that_can_not_be_are_refused():
    with pytest.raises(ValueError, match=r'equal channels, got \[32, 64, 160, 256\]: give it a neck'):
        Detector({'name': 'van_b0'}, {'type': 'FCOS', 'num_classes': 2})
    with pytest.raises(ValueError, match=r'test takes resize, .* not size'):
        detector(test={'size': 3})
    for wrong, match in (
        ({'resize': (800, 600)}, 'short and the long'),
        ({'scales': ()}, 'scales'),
        ({'flip': 1}, 'flip'),
    ):
        with pytest.raises(ValueError, match=match):
            detector(test=wrong)
    info = levels([32], [16])
    for wrong, match in (
        ({'num_classes': 0}, 'num_classes must be a positive integer, got 0'),
        ({'box_head': '3fc'}, "box_head must be '2fc' or '4conv1fc', got '3fc'"),
        ({'norm': 'bn'}, "box_head='2fc' has none"),
        ({'box_head': '4conv1fc', 'norm': 'gn'}, "got 'gn'"),
        ({'box_loss': 'l2'}, "got 'l2'"),
        ({'roi_levels': 2}, 'roi_levels must be 1 to 1'),
    ):
        with pytest.raises(ValueError, match=match):
            MaskRCNN(info, **{'num_classes': 2, **wrong})
    with pytest.raises(RuntimeError, match='train'):
        detector().eval().loss(*batch())
    with pytest.raises(RuntimeError, match='eval'):
        detector().train().predict(batch()[0])


@pytest.mark.parametrize(
    ('part', 'value', 'match'),
    [
        ('boxes', [[10.0, 10, 10, 20]], r'scene 2 has a box without area .*10.0, 10.0, 10.0, 20.0'),
        ('boxes', [[10.0, float('nan'), 30, 20]], 'scene 2 has a box'),
        ('boxes', [[10.0, 0, float('inf'), 20]], 'scene 2 has a box'),
        ('boxes', [[10.0, 10, 20]], r'boxes of image scene 2 must have the shape \(1, 4\)'),
        ('labels', [CLASSES], 'scene 2 has label 3, but there are 3 classes'),
        ('labels', [-1], 'scene 2 has label -1'),
        ('masks', [[[1]]], r'masks of image scene 2 must have the shape \(1, 64, 96\)'),
        ('masks', None, 'scene 2 lacks masks'),
    ],
)
def test_broken_targets_are_refused_by_the_name_of_their_image(part, value, match):
    images, targets = batch()
    targets[1].pop(part)
    if value is not None:
        targets[1][part] = torch.tensor(value)
    with pytest.raises(ValueError, match=match):
        checked_targets(images, targets, CLASSES, has_masks=True)


# Learning


@pytest.mark.parametrize(
    ('head', 'backbone'),
    [
        ('FasterRCNN', 'test_resnet'),
        pytest.param('MaskRCNN', 'van_b0', marks=pytest.mark.slow),
        pytest.param('CascadeRCNN', 'test_resnet', marks=pytest.mark.slow),
        pytest.param('RetinaNet', 'test_resnet', marks=pytest.mark.slow),
        pytest.param('FCOS', 'test_resnet', marks=pytest.mark.slow),
    ],
)
def test_two_images_are_learned_by_heart(head, backbone):
    scenes = [
        scene(96, 128, [(8, 10, 48, 60), (70, 30, 120, 90)], seed=1),
        scene(96, 128, [(20, 24, 84, 72)], [2], seed=2),
    ]
    images, targets = [image for image, _ in scenes], [target for _, target in scenes]
    options = {} if head in ('RetinaNet', 'FCOS') else {'rpn': RPN, 'samples': 64}
    torch.manual_seed(0)
    model = Detector(
        {'name': backbone},
        {'type': head, 'num_classes': CLASSES, **options},
        {'type': 'FPN', 'out_channels': 32, 'extra_levels': 1},
        {'resize': None},
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range({'FasterRCNN': 60, 'RetinaNet': 150}.get(head, 80)):
        optimizer.zero_grad()
        sum(model.loss(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        predictions = model.eval()(images)
    for prediction, target in zip(predictions, targets, strict=True):
        count = len(target['boxes'])  # the surest are the objects
        overlaps, found = box_iou(torch.as_tensor(target['boxes']), prediction['boxes'][:count]).max(1)
        assert overlaps.min() > 0.7
        assert torch.equal(prediction['labels'][found], target['labels'])
        if 'masks' in prediction:
            masks, truth = prediction['masks'][found], target['masks'].bool()
            assert ((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))).min() > 0.7
