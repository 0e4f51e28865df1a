"""Registries of the scope `zoo`: a child of each of mmengine's that a run builds from, as mmengine asks for."""

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry

__all__ = [
    'DATASETS',
    'DATA_SAMPLERS',
    'EVALUATOR',
    'FUNCTIONS',
    'HOOKS',
    'LOG_PROCESSORS',
    'LOOPS',
    'METRICS',
    'MODELS',
    'MODEL_WRAPPERS',
    'OPTIMIZERS',
    'OPTIM_WRAPPERS',
    'OPTIM_WRAPPER_CONSTRUCTORS',
    'PARAM_SCHEDULERS',
    'TRANSFORMS',
    'VISBACKENDS',
    'VISUALIZERS',
]


def _child(name: str, *modules: str) -> Registry:
    """Registry under mmengine's of that name, filled by modules of this package when it is first built from."""
    parent = getattr(mmengine_registry, name)
    return Registry(parent.name, parent=parent, scope='zoo', locations=[f'zoo.train.{module}' for module in modules])


DATASETS = _child('DATASETS', 'data', 'dense.coco', 'dense.segmentation_data', 'digits', 'dense.scenes')
DATA_SAMPLERS = _child('DATA_SAMPLERS', 'samplers')
EVALUATOR = _child('EVALUATOR')
FUNCTIONS = _child('FUNCTIONS', 'dense.task', 'tasks')
HOOKS = _child('HOOKS', 'data', 'ema', 'hooks', 'records', 'dense.pictures')
LOG_PROCESSORS = _child('LOG_PROCESSORS')
LOOPS = _child('LOOPS', 'loops')
METRICS = _child('METRICS', 'evaluation', 'dense.coco_metric', 'dense.iou_metric')
MODELS = _child(
    'MODELS',
    'dense.cascade',
    'dense.detection_onestage',
    'dense.detection_rcnn',
    'dense.detectors',
    'dense.necks',
    'dense.segmentation_heads',
    'dense.segmentors',
    'tasks',
)
MODEL_WRAPPERS = _child('MODEL_WRAPPERS')
OPTIMIZERS = _child('OPTIMIZERS', 'optim')
OPTIM_WRAPPERS = _child('OPTIM_WRAPPERS', 'optim')
OPTIM_WRAPPER_CONSTRUCTORS = _child('OPTIM_WRAPPER_CONSTRUCTORS', 'optim')
PARAM_SCHEDULERS = _child('PARAM_SCHEDULERS', 'schedules')
TRANSFORMS = _child('TRANSFORMS', 'data', 'dense.transforms')
VISBACKENDS = _child('VISBACKENDS')
VISUALIZERS = _child('VISUALIZERS')
