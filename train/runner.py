"""mmengine's runner, with checkpoints that are plain, atomic and loaded in full, and DDP and FSDP2 on any device."""

import warnings
from pathlib import Path

import mmengine.runner
from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper

from zoo.backbones.checkpoints import CheckpointError, mismatches

from . import checkpoints, distributed
from .registry import FUNCTIONS

__all__ = ['Runner']


class Runner(mmengine.runner.Runner):
    """A runner of one model, one optimizer and a list of schedulers.

    The config's `strategy` is 'ddp' (the default) or 'fsdp2'; sync_bn=True synchronizes BatchNorm.
    """

    @staticmethod
    def build_dataloader(dataloader, seed=None, diff_rank_seed=False):
        """As mmengine's, which looks for the type of collate_fn in its own registry alone."""
        collate = dataloader.get('collate_fn') if isinstance(dataloader, dict) else None
        if isinstance(collate, dict) and isinstance(collate.get('type'), str):
            dataloader = {**dataloader, 'collate_fn': {**collate, 'type': FUNCTIONS.get(collate['type'])}}
        return mmengine.runner.Runner.build_dataloader(dataloader, seed, diff_rank_seed)

    def wrap_model(self, model_wrapper_cfg, model):
        """As mmengine's, but DDP is also for the CPU, and FSDP2 is there."""
        if not self.distributed or model_wrapper_cfg is not None or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        strategy = self.cfg.get('strategy', 'ddp')
        if strategy not in distributed.STRATEGIES:
            raise ValueError(f'strategy must be one of {", ".join(distributed.STRATEGIES)}, got {strategy!r}.')
        if self.cfg.get('sync_bn'):
            model = distributed.synchronize_batchnorm(model)
        if strategy == 'fsdp2':
            return distributed.shard(model)
        return distributed.DataParallel(model, self.cfg.get('find_unused_parameters', False))

    def _init_model_weights(self) -> None:
        """Nothing: tasks come initialized, and the first process's weights have been given to all."""

    def load_or_resume(self) -> None:
        """With resume, go on from the work folder's newest whole checkpoint, or begin if there is none.

        A restart by torchrun resumes what the same call of torchrun has begun.
        """
        if self._has_loaded:
            return
        latest, is_restart = distributed.on_first(self._find)
        self._resume = self._resume or is_restart
        if self._resume and self._load_from is None:
            if latest is not None:
                self.resume(latest)
        elif latest is not None:
            raise FileExistsError(f'{self.work_dir} has checkpoints of another run: resume it, or use another folder.')
        else:
            super().load_or_resume()
        distributed.on_first(self._leave_mark)

    def _find(self) -> tuple[str | None, bool]:
        checkpoints.clean(self.work_dir)
        latest = checkpoints.newest_whole(self.work_dir)
        mark = self._mark
        is_restart = distributed.restarts() > 0 and mark.exists() and mark.read_text() == distributed.launch_id()
        return latest and str(latest), is_restart

    def _leave_mark(self) -> None:
        """Note which call of torchrun trains here, so that its restarts don't go on with what isn't theirs."""
        if distributed.is_launched():
            self._mark.write_text(distributed.launch_id())

    @property
    def _mark(self) -> Path:
        return Path(self.work_dir, '.launch')

    def load_weights(self, state_dict: dict) -> None:
        """Take weights as a checkpoint of a run has them, or what it has left for use elsewhere.

        Raises:
            CheckpointError: they are not those of the model.
        """
        model, prefix = self._bare_model, self.exported
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict = {f'{prefix}{name}': value for name, value in state_dict.items()}
        problem = mismatches(state_dict, model.state_dict())
        if problem:
            raise CheckpointError(f'The weights do not fit the {type(model).__name__} of the config: {problem}.')
        model.load_state_dict(state_dict)
        self._has_loaded = True

    def load_checkpoint(self, filename, map_location='cpu', strict=True, **kwargs):
        """As mmengine's, but the checkpoint must have what the model has."""
        return super().load_checkpoint(filename, map_location, strict, **kwargs)

    def resume(self, filename, **_) -> None:
        """Go on from a checkpoint of this run: weights, optimizer, schedulers, seed, and what hooks keep in it.

        Raises:
            ValueError: it was trained on other data or with another batch, so that its position in the data is of
                no use.
        """
        if not Path(filename).exists():
            raise FileNotFoundError(f'Process {self.rank} has no {filename}: the work folder must be shared by all.')
        checkpoint = checkpoints.load(filename)
        meta = checkpoint['meta']
        self._check_position(meta)
        model = self._bare_model
        references = model.state_dict()
        for part in (value for key, value in checkpoint.items() if key.endswith('state_dict')):  # averages too
            part.update({name: distributed.shard_like(value, references.get(name)) for name, value in part.items()})
        parameters = [parameter for group in self.optim_wrapper.param_groups for parameter in group['params']]
        for index, state in checkpoint['optimizer']['state'].items():
            for name, value in state.items():
                state[name] = distributed.shard_like(value, parameters[index])
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model.load_state_dict(checkpoint['state_dict'])
        self.optim_wrapper.load_state_dict(checkpoint['optimizer'])
        for scheduler, state in zip(self.param_schedulers or (), checkpoint['param_schedulers'], strict=True):
            scheduler.load_state_dict(state)
        self.train_loop._iter, self.train_loop._epoch = meta['iter'], meta['epoch']
        self._seed = self.train_loop.dataloader.sampler.seed = meta['seed']
        self._has_loaded = True

    def _check_position(self, meta: dict) -> None:
        position = self._position
        for name, value in position.items():
            if meta['position'][name] != value:
                raise ValueError(
                    f'The checkpoint of iteration {meta["iter"]} is of a run with {name}: {meta["position"][name]}, '
                    f'this one has {value}. Resume with the same, or begin in another folder by load_from.'
                )
        if meta['processes'] != self.world_size and is_main_process():
            warnings.warn(
                f'{meta["processes"]} processes wrote the checkpoint, {self.world_size} resume it: each image is '
                'drawn as it would have been, but sums are rounded otherwise, and random depths differ.',
                stacklevel=2,
            )

    @property
    def _position(self) -> dict[str, int]:
        """What the count of iterations counts."""
        loader = self.train_loop.dataloader
        return {'images': len(loader.dataset), 'batch of all processes': loader.batch_size * self.world_size}

    @property
    def exported(self) -> str:
        """What the names of the weights begin with that the run leaves for use elsewhere."""
        return getattr(self._bare_model, 'exported', checkpoints.BACKBONE)

    @property
    def _bare_model(self):
        return self.model.module if is_model_wrapper(self.model) else self.model

    def save_checkpoint(self, out_dir, filename, meta=None, **_) -> None:
        """Write a checkpoint of everything that an exact resume needs; meta must hold the finished `iter` and `epoch`.

        Every process calls this, hooks' before_save_checkpoint too, and the first one writes. mmengine's history of
        scalars isn't in it: it can't be read back without running code from the file.

        Raises:
            CheckpointWriteError: the first process can't write, a RuntimeError with its words on the others.
        """
        checkpoint = {
            'meta': {
                **meta,
                'cfg': self.cfg.pretty_text,
                'seed': self.seed,
                'position': self._position,
                'processes': self.world_size,
                'dataset_meta': self.train_dataloader.dataset.metainfo,
            },
            'state_dict': self._bare_model.state_dict(),
            'optimizer': self.optim_wrapper.state_dict(),
            'param_schedulers': [scheduler.state_dict() for scheduler in self.param_schedulers or ()],
        }
        self.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        if self.cfg.get('strategy') == 'fsdp2':
            checkpoint = distributed.gather(checkpoint)
        distributed.on_first(checkpoints.save, checkpoint, Path(out_dir, filename))
