import pytest
from PIL import Image

TINY = {
    'model.backbone': {'name': 'test_resnet', 'num_classes': 3, 'drop_path_rate': 0.2, '_delete_': True},
    'model.loss.label_smoothing': 0.0,
    'train_cfg.max_epochs': 2,
    'val_evaluator.k': (1, 2),
    'custom_hooks': [],
}
SIZE = 20  # images a class and part: of 7 a batch, 60 make 8 iterations an epoch


@pytest.fixture(scope='session')
def colours(tmp_path_factory):
    """An image folder whose classes differ in colour: train and test, 3 classes of 20 and 5 images."""
    root = tmp_path_factory.mktemp('colours')
    for split, count in (('train', SIZE), ('test', 5)):
        for label, channel in enumerate(('blue', 'green', 'red')):
            folder = root / split / channel
            folder.mkdir(parents=True)
            for number in range(count):
                colour = [5 * number] * 3
                colour[2 - label] = 255 - 3 * number
                Image.new('RGB', (19, 17), tuple(colour)).save(folder / f'{number}.png')
    return root


@pytest.fixture
def tiny(colours):
    """Options that make the digits' config train a tiny model on the colours."""

    def dataset(split, *augmentations):
        steps = [{'type': 'Resize', 'size': (65, 63)}, *augmentations, {'type': 'PILToTensor'}]
        return {
            'type': 'LabelledImages',
            'root': str(colours),
            'split': split,
            'transform': steps,
            '_delete_': True,
        }

    augmentations = {'type': 'RandomHorizontalFlip'}, {'type': 'RandomAffine', 'degrees': 30, 'translate': (0.2, 0.2)}
    return {
        **TINY,
        'train_dataloader.dataset': dataset('train', *augmentations),
        'train_dataloader.batch_size': 7,
        'val_dataloader.dataset': dataset('test'),
    }
