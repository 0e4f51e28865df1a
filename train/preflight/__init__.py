"""What a run will really do, read off its built objects and two batches, beside what its config and recipe say."""

import gc
import time

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from torch import distributed

from . import data, model, optimization  # noqa: F401 (which fill the table of checks)
from .checks import CHECKS
from .findings import Finding, PreflightError, Report
from .rehearsal import ON_CPU, NotChecked, Rehearsal, is_labelled, isolated

__all__ = ['DEPTHS', 'Finding', 'PreflightError', 'Report', 'check_names', 'preflight']

DEPTHS = ('quick', 'full')
ENDS = 'The run would end with this error.'


def check_names() -> list[str]:
    """Names of the checks, in the order of a report."""
    return ['rehearsal', *CHECKS]


def preflight(
    cfg: Config,
    depth: str = 'quick',
    strict: bool = False,
    silence: tuple[str, ...] | list[str] = (),
    world_size: int | None = None,
    seconds: float = 60.0,
    images: int | None = None,
) -> Report:
    """Rehearse the first iterations of a run, and compare what is seen with what its config and recipe say.

    The run's own runner, loop, hooks and data are built a second time, in a temporary folder, without workers,
    compilation and hooks that only write, and are thrown away. Random states are left as they were. With several
    processes all of them call this: the first one rehearses, as the first of them, and all get its report.

    Args:
        cfg: config of the run, as `load_config` gives it. Its `preflight` dict may hold depth, strict and silence,
            which are added to those given here.
        depth: 'quick', or 'full' with copies of the model that learn: accumulation and overfit.
        strict: whether a warning is an error.
        silence: names of checks to leave out.
        world_size: processes that the run is planned for; those there are if None.
        seconds: after which no check is begun.
        images: of each batch that the model sees; all on a GPU and 4 on the CPU if None.

    Raises:
        ValueError: an unknown depth, or a name to silence that no check has.
    """
    settings = dict(cfg.get('preflight') or {})
    silence = [*silence, *settings.get('silence', ())]
    strict = strict or settings.get('strict', False)
    if depth == 'quick':
        depth = settings.get('depth', depth)
    if depth not in DEPTHS:
        raise ValueError(f'depth must be one of {", ".join(DEPTHS)}, got {depth!r}.')
    unknown = sorted(set(silence) - set(check_names()))
    if unknown:
        raise ValueError(f'No check of preflight is named {", ".join(unknown)}. Checks: {", ".join(check_names())}.')
    size = get_world_size() if world_size is None else world_size
    report = Report(str(cfg.get('work_dir') or cfg.get('filename') or 'a config'), depth)
    if get_rank() == 0:
        try:
            with isolated():
                _fill(report, cfg, size, strict, silence, seconds, images)
        except Exception as error:  # the other processes wait for the report; a run must not end by a fault of ours
            cause = 'The preflight itself has failed: nothing is known of the run. Please report it.'
            report.findings.append(Finding('preflight', 'warning', 'runs', _name(error), cause))
    if get_world_size() > 1:
        box = [report]
        distributed.broadcast_object_list(box, src=0)
        report = box[0]
    return report


def _fill(report: Report, cfg: Config, world_size: int, strict: bool, silence, seconds, images) -> None:
    began = time.monotonic()
    on_gpu = torch.cuda.is_available()
    try:
        run = Rehearsal(cfg, world_size, began + seconds / 2, images or (None if on_gpu else ON_CPU))
    except ValueError as error:  # the processes don't divide the batch
        report.findings.append(Finding('rehearsal', 'error', 'runs', _name(error), ENDS))
        return
    run.is_full = report.depth == 'full'
    run.run()
    findings = []
    if 'rehearsal' not in silence:
        findings.append(_rehearsed(run))
    run.deadline = began + seconds
    for name, check in CHECKS.items():
        reason = None
        if name in silence:
            reason = 'silenced'
        elif check.depth == 'full' and report.depth != 'full':
            reason = 'of depth full'
        elif run.train_loader is None or (check.needs == 'start' and run.before is None):
            reason = 'the run does not start'
        elif check.of == 'labels' and run.batches and not is_labelled(run.batches[0]):
            reason = 'of images with labels'
        elif time.monotonic() > run.deadline:
            reason = 'no time left'
        if reason is None:
            try:
                found = check.look(run)
                findings.append(Finding(name, found.level, found.expected, found.found, found.cause))
                continue
            except NotChecked as not_checked:
                reason = str(not_checked)
            except Exception as error:
                reason = f'failed with {_name(error)}'
        report.not_checked[name] = reason
    report.findings = [_strictly(each) for each in findings] if strict else findings
    report.seconds = time.monotonic() - began
    del run
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _rehearsed(run: Rehearsal) -> Finding:
    if isinstance(run.failure, torch.OutOfMemoryError) and run.cfg.get('strategy') == 'fsdp2':
        cause = 'One process can not hold the model whole: what needs it was not checked.'
        return Finding('rehearsal', 'warning', 'runs', str(run.failure), cause)
    if run.failure is not None:
        return Finding('rehearsal', 'error', 'runs', _name(run.failure), ENDS)
    steps, updates = len(run.steps), sum(step.updated for step in run.steps)
    seen = sum(len(batch[0]) for batch in run.val_batches)
    found = f'{steps} iterations with {updates} optimizer steps, {seen} validation images, on {run.device.type}'
    if run.limit:
        found += f'; the model saw {run.limit} images of each batch'
    return Finding('rehearsal', 'ok', '', found)


def _name(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'


def _strictly(finding: Finding) -> Finding:
    if finding.level != 'warning':
        return finding
    return Finding(finding.name, 'error', finding.expected, finding.found, finding.cause)
