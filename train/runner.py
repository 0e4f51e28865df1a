"""mmengine's runner, with checkpoints that are plain, atomic and loaded in full, and DDP on the CPU too."""

import os
from pathlib import Path

import mmengine.runner
from mmengine.device import get_device
from mmengine.dist import master_only
from mmengine.model import MMDistributedDataParallel, is_model_wrapper

from . import checkpoints

__all__ = ['Runner']


class Runner(mmengine.runner.Runner):
    """A runner of one model, one optimizer and a list of schedulers."""

    def wrap_model(self, model_wrapper_cfg, model):
        """As mmengine's, but DDP is also for the CPU, which takes no device_ids."""
        if not self.distributed or model_wrapper_cfg is not None or is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)
        device = get_device()
        return MMDistributedDataParallel(
            module=model.to(device),
            device_ids=None if device == 'cpu' else [int(os.environ['LOCAL_RANK'])],
            find_unused_parameters=self.cfg.get('find_unused_parameters', False),
        )

    def load_or_resume(self) -> None:
        """With resume, go on from the work folder's latest checkpoint, or begin if there is none."""
        latest = checkpoints.latest(self.work_dir)
        if self._resume and self._load_from is None:
            if latest is not None:
                self.resume(str(latest))
            return
        if latest is not None:
            raise FileExistsError(f'{self.work_dir} has checkpoints of another run: resume it, or use another folder.')
        super().load_or_resume()

    def load_checkpoint(self, filename, map_location='cpu', strict=True, **kwargs):
        """As mmengine's, but the checkpoint must have what the model has."""
        return super().load_checkpoint(filename, map_location, strict, **kwargs)

    @master_only
    def save_checkpoint(self, out_dir, filename, meta=None, **_) -> None:
        """Write a checkpoint of everything that an exact resume needs; meta must hold the finished `iter` and `epoch`.

        mmengine's history of scalars isn't in it: it can't be read back without running code from the file.
        """
        model = self.model.module if is_model_wrapper(self.model) else self.model
        checkpoint = {
            'meta': {
                **meta,
                'cfg': self.cfg.pretty_text,
                'seed': self.seed,
                'dataset_meta': self.train_dataloader.dataset.metainfo,
            },
            'state_dict': model.state_dict(),
            'optimizer': self.optim_wrapper.state_dict(),
            'param_schedulers': [scheduler.state_dict() for scheduler in self.param_schedulers or ()],
            'message_hub': {'log_scalars': {}, 'runtime_info': {}, 'resumed_keys': {}},
        }
        self.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        checkpoints.save(checkpoint, Path(out_dir, filename))
