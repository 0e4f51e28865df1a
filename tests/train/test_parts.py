import itertools

import numpy as np
import pytest
import timm
import torch
from mmengine.optim import OptimWrapper
from PIL import Image
from torch.nn import functional as F

from zoo.train import pictures
from zoo.train.evaluation import TopK, label_ranks
from zoo.train.optim import AutocastOptimWrapper, param_groups
from zoo.train.schedules import WarmupCosineLR
from zoo.train.tasks import ImageClassifier


def test_label_ranks_count_the_classes_before():
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [float('nan')] * 3, [0.0, float('inf'), 1.0]])
    assert label_ranks(logits, torch.tensor([2, 1, 0, 1])).tolist() == [1, 1, 3, 0]  # of equal ones the first


def test_top_k_is_that_counted_by_hand():
    torch.manual_seed(0)
    logits, labels = torch.randn(57, 11), torch.randint(11, (57,))
    metric = TopK(k=(1, 5))
    for part in torch.arange(57).split(10):
        metric.process((None, labels[part]), list(logits[part]))
    expected = {
        f'top{k}': 100 * (logits.topk(k).indices == labels[:, None]).any(1).float().mean().item() for k in (1, 5)
    }
    assert metric.evaluate(57) == pytest.approx(expected)


def test_the_classifier_normalizes_as_its_backbone_asks():
    task = ImageClassifier({'name': 'test_resnet', 'num_classes': 3}, {'type': 'cross_entropy'}).eval()
    images = torch.randint(256, (2, 3, 35, 33), dtype=torch.uint8)
    mean, std = (torch.tensor(task.backbone.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        torch.testing.assert_close(task(images), task.backbone((images / 255 - mean) / std))
    grey = ImageClassifier({'name': 'test_resnet', 'in_chans': 1}, {'type': 'cross_entropy'}, mean=[0.5], std=[0.25])
    assert grey.normalize(torch.full((1, 1, 2, 2), 255)).unique().item() == 2


@pytest.mark.parametrize(
    ('loss', 'expected'),
    [
        ({'type': 'cross_entropy', 'label_smoothing': 0.1}, lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1)),
        (
            {'type': 'binary_cross_entropy'},
            lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 3).float()),
        ),
    ],
)
def test_losses_are_pytorchs(loss, expected):
    task = ImageClassifier({'name': 'test_resnet', 'num_classes': 3}, loss).eval()
    images, labels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(task(images, labels, mode='loss')['loss'], expected(task(images), labels))


def test_an_initialization_by_the_runner_keeps_the_backbones_weights():
    task = ImageClassifier({'name': 'test_vit', 'num_classes': 3}, {'type': 'cross_entropy'})
    before = {key: value.clone() for key, value in task.state_dict().items()}
    task.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())


def test_param_groups_decay_matrices_only_and_by_layer():
    model = timm.create_model('test_vit', num_classes=3)
    for layer_decay in (None, 0.5):
        groups = param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
        settings = {id(p): group for group in groups for p in group['params']}
        assert len(settings) == len(list(model.parameters()))
        assert settings[id(model.pos_embed)]['weight_decay'] == 0
        assert settings[id(model.blocks[0].norm1.weight)]['weight_decay'] == 0
        assert settings[id(model.blocks[0].mlp.fc1.weight)]['weight_decay'] == 0.05
        assert settings[id(model.head.weight)]['lr'] == 1e-3
    depths = [settings[id(block.mlp.fc1.weight)]['lr'] for block in model.blocks]
    assert all(later == 2 * earlier for earlier, later in itertools.pairwise(depths))


def test_the_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    parameters = [{'params': [torch.nn.Parameter(torch.ones(1))], 'lr': lr} for lr in (1.0, 0.5)]
    wrapper = OptimWrapper(torch.optim.SGD(parameters, 1.0))
    schedule = WarmupCosineLR.build_iter_from_epoch(wrapper, warmup=2, end=6, epoch_length=5, start=0.1)
    rates = []
    for _ in range(30):
        rates.append([group['lr'] for group in wrapper.optimizer.param_groups])
        wrapper.step()
        schedule.step()
    assert [first for first, _ in rates[:11:5]] == pytest.approx([0.1, 0.55, 1.0])
    assert rates[20][0] == pytest.approx(0.5)  # half of the cosine
    assert 0 < rates[-1][0] < 0.01
    assert all(second == pytest.approx(first / 2) for first, second in rates)


def test_autocast_computes_in_bfloat16_on_the_cpu():
    model = torch.nn.Linear(3, 3)
    wrapper = AutocastOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with wrapper.optim_context(model):
        assert model(torch.ones(2, 3)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'float64'"):
        AutocastOptimWrapper(dtype='float64', optimizer=wrapper.optimizer)


def pixels(path):
    return np.asarray(Image.open(path).convert('RGB')).astype(int)


def has_colour(picture, colour):
    """Whether it has pixels of a colour as '#rrggbb'."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (abs(picture - rgb).max(axis=-1) < 3).any()


def test_the_curve_is_drawn_with_and_without_validations(tmp_path):
    steps = [{'iter': i, 'epoch': i / 10, 'loss': 1 / i, 'lr': 0.1} for i in range(1, 30)]
    for records in (steps, [*steps, {'iter': 10, 'epoch': 1.0, 'top1': 50.0}], steps[:0]):
        pictures.training_curve(records, tmp_path / 'curve.png')
        assert pixels(tmp_path / 'curve.png').std() > 0


@pytest.mark.parametrize('wrong', [0, 2])
def test_the_grid_marks_the_wrong_predictions(tmp_path, wrong):
    images = [Image.new('L', (8, 8), 20 * i) for i in range(7)]
    labels = [0, 1, 0, 1, 0, 1, 0]
    predictions = labels[:-wrong] + [1 - label for label in labels[-wrong:]] if wrong else labels
    path = tmp_path / 'grid.png'
    pictures.prediction_grid(images, labels, predictions, ['zero', 'one'], path, columns=2, rows=2)
    assert has_colour(pixels(path), pictures.RIGHT)
    assert has_colour(pixels(path), pictures.WRONG) == bool(wrong)


def test_routed_regions_of_biformer_are_drawn(tmp_path):
    arguments = {'dims': (32, 64, 64, 64), 'depths': (1, 2, 1, 1), 'n_win': 3, 'topks': (1, 2, 4, -2)}
    model = timm.create_model('biformer_tiny', num_classes=2, **arguments).eval()
    images = torch.rand(2, 3, 96, 96)
    routes = model.routes(images)
    assert [route['index'].shape for route in routes] == [(2, 9, 1), (2, 9, 2), (2, 9, 2), (2, 9, 4)]
    picture = Image.fromarray((images[1].permute(1, 2, 0) * 0).byte().numpy())
    pictures.routed_regions(picture, routes, (0.99, 1.0), tmp_path / 'routes.png', sample=1)
    assert has_colour(pixels(tmp_path / 'routes.png'), pictures.QUERY)
