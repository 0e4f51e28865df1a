"""Detectors and segmentors through the whole of a run: preflight, training, resume, measures, pictures."""

import json

import pytest
import torch
from interruption import Interrupted

from zoo.backbones.checkpoints import CheckpointError
from zoo.train import checkpoints
from zoo.train.config import ConfigError, load_config
from zoo.train.dense.demo import REQUIRED
from zoo.train.measuring import measure
from zoo.train.run import train
from zoo.train.validation import validate

DETECTOR, SEGMENTOR = 'dense_demo/mask_rcnn_van_b0', 'dense_demo/upernet_van_b0'
BACKBONE = {'name': 'test_resnet', 'out_indices': (1, 2, 3, 4), '_delete_': True}


@pytest.fixture(scope='module')
def options(tmp_path_factory):
    """Options that make the demonstrations tiny."""
    root = str(tmp_path_factory.mktemp('scenes') / 'digits')
    scenes = {'root': root, 'train': 12, 'test': 5}
    return {
        'model.backbone': BACKBONE,
        'train_dataloader.dataset': scenes,
        'train_dataloader.dataset.transform': [{'type': 'RandomHorizontalFlip'}],
        'val_dataloader.dataset': scenes,
        'train_dataloader.batch_size': 2,
        'total_batch': 4,
        'val_dataloader.batch_size': 2,
        'train_cfg.max_epochs': 2,
        'train_cfg.val_interval': 1,
        'param_scheduler.warmup_steps': 2,
        'default_hooks.curve.interval': 1,
    }


@pytest.fixture(scope='module', params=[DETECTOR, SEGMENTOR])
def finished(request, options, tmp_path_factory):
    """A config, and what its run has left."""
    folder = tmp_path_factory.mktemp('run')
    return request.param, train(request.param, folder, cfg_options=options)


def test_a_run_leaves_losses_measures_and_pictures(finished):
    config, result = finished
    records = [json.loads(line) for line in result.curve.read_text().splitlines()]
    losses = [record for record in records if 'loss' in record]
    assert len(losses) == 12  # batches of two of 12 images, in two epochs
    parts = {'loss_objectness', 'loss_rpn_box_reg', 'loss_classifier', 'loss_box_reg', 'loss_mask'}
    assert {key for key in losses[0] if key.startswith('loss_')} == (
        parts if config == DETECTOR else {'loss_segmentation', 'loss_auxiliary'}
    )
    for record in losses:
        total = sum(value for key, value in record.items() if key.startswith('loss_'))
        assert record['loss'] == pytest.approx(total, rel=1e-5)
    assert REQUIRED[config][0] in result.metrics
    assert (result.work_dir / 'predictions.png').stat().st_size > 10_000
    assert REQUIRED[config][0] in result.report.read_text()


def test_the_preflight_has_compared_what_is_no_matter_of_labels(finished):
    _, result = finished
    report = json.loads((result.work_dir / 'preflight.json').read_text())
    found = {finding['name']: finding['level'] for finding in report['findings']}
    assert {'order', 'effective_batch', 'learning_rate', 'parameter_groups', 'weight_decay', 'gradients'} <= {*found}
    assert set(found.values()) == {'ok'}, report
    assert report['not_checked']['mixup'] == 'of images with labels'


@pytest.mark.parametrize('weights', ['weights', 'checkpoint'])
def test_measuring_gives_the_last_validation_again(finished, options, weights, tmp_path):
    config, result = finished
    found = measure(config, getattr(result, weights), tmp_path, options)
    assert {key: value for key, value in found.items() if value == value} == pytest.approx(result.metrics)
    written = json.loads((tmp_path / 'measures.json').read_text())
    assert written['checkpoint'] == str(getattr(result, weights))


def test_weights_of_another_model_are_refused(finished, options, tmp_path):
    config, result = finished
    other = {DETECTOR: SEGMENTOR, SEGMENTOR: DETECTOR}[config]
    with pytest.raises(CheckpointError, match='do not fit'):
        measure(other, result.weights, tmp_path, options)
    with pytest.raises(FileNotFoundError, match=r'absent\.pth'):
        measure(config, tmp_path / 'absent.pth', tmp_path, options)


@pytest.mark.parametrize('config', [DETECTOR, SEGMENTOR])
def test_a_resumed_run_ends_in_the_same_bits(config, options, tmp_path):
    options = {**options, 'default_hooks.checkpoint.interval_iters': 4, 'train_cfg.val_interval': 2}
    whole = train(config, tmp_path / 'whole', cfg_options=options, preflight=False)
    stopped = {**options, 'custom_hooks': [{'type': 'StopAt', 'iteration': 7}]}
    with pytest.raises(Interrupted):
        train(config, tmp_path / 'parts', cfg_options=stopped, preflight=False)
    resumed = train(config, tmp_path / 'parts', resume=True, cfg_options=options)
    states = [checkpoints.load(result.checkpoint)['state_dict'] for result in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert resumed.metrics == whole.metrics


def test_a_run_can_be_counted_in_optimizer_steps(options, tmp_path):
    steps = {'type': 'TrainLoop', 'max_steps': 4, 'val_interval': 2, '_delete_': True}
    options = {**options, 'train_cfg': steps, 'train_dataloader.batch_size': 2}
    options = {key: value for key, value in options.items() if not key.startswith('train_cfg.')}
    result = train(SEGMENTOR, tmp_path, cfg_options=options, preflight=False)
    records = [json.loads(line) for line in result.curve.read_text().splitlines()]
    assert [record['iter'] for record in records if 'mIoU' in record] == [4, 8]  # two batches a step
    assert checkpoints.latest(tmp_path).name == 'iter_8.pth'


@pytest.mark.parametrize(
    ('config', 'planted', 'says'),
    [
        (DETECTOR, {'model.head.type': 'MaskRCN'}, r'model\.head\.type: there is no head'),
        (DETECTOR, {'model.neck.out_chanels': 3}, r'model\.neck\.out_chanels: FPN does not take it'),
        (DETECTOR, {'model.neck': None}, r'model: .*neck'),
        (DETECTOR, {'model.backbone.name': 'van_b9'}, r'model\.backbone\.name: there is no model'),
        (DETECTOR, {'model.backbone.dept': 3}, r'model\.backbone\.dept: van_b0 does not take it'),
        (DETECTOR, {'model.test.resize': (3, 2)}, r'test\.resize'),
        (DETECTOR, {'train_dataloader.collate_fn': None}, r"collate_fn=dict\(type='collate'\)"),
        (DETECTOR, {'optim_wrapper.paramwise_cfg': {'no_decay': ('rpb',)}}, r"optim_wrapper\.paramwise_cfg: .*'rpb'"),
        (SEGMENTOR, {'model.auxiliary.0.chanels': 3}, r'model\.auxiliary\.0\.chanels: FCNHead does not take it'),
        (SEGMENTOR, {'model.test': {'mode': 'slid'}}, r"mode must be 'whole' or 'slide'"),
        (
            SEGMENTOR,
            {'train_dataloader.dataset.transform': [{'type': 'RandomChoice', 'transforms': [[{'type': 'Flop'}]]}]},
            r'transform\.0\.transforms\.0\.0\.type: there is no transform',
        ),
        (SEGMENTOR, {'val_evaluator.type': 'MeanIou'}, r'val_evaluator\.type: .*MeanIoU'),
    ],
)
def test_a_planted_problem_is_named_by_its_key(config, planted, says):
    with pytest.raises(ConfigError, match=says):
        validate(load_config(config, planted), data=False, world_size=1)


def test_folders_and_files_that_are_not_there_are_named_before_anything_is_read():
    with pytest.raises(ConfigError) as error:
        validate(load_config('coco/nat/mask_rcnn_nat_mini'), world_size=8)
    for part in ('train', 'val'):
        assert f'{part}_dataloader.dataset.root: there is no folder data/coco/{part}2017' in str(error.value)
        annotations = f'data/coco/annotations/instances_{part}2017.json'
        assert f'{part}_dataloader.dataset.annotations: there is no file {annotations}' in str(error.value)


def test_the_demonstrations_configs_are_valid():
    for config in REQUIRED:
        validate(load_config(config), data=False, world_size=1)
