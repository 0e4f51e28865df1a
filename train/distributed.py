"""Several processes: the group that torchrun asks for, what one of them does for all, DDP and FSDP2."""

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from mmengine.device import get_device
from mmengine.dist import get_rank, get_world_size
from mmengine.model import MMDistributedDataParallel
from timm.layers import convert_sync_batchnorm
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    'STRATEGIES',
    'BufferBroadcast',
    'DataParallel',
    'from_first',
    'gather',
    'is_launched',
    'launch_id',
    'on_first',
    'process_group',
    'restarts',
    'shard',
    'shard_like',
    'synchronize_batchnorm',
]

STRATEGIES = ('ddp', 'fsdp2')
UNUSED = 'did not receive grad'  # in DDP's error
# DDP's argument that sends BatchNorm's statistics with each forward pass; the newer name, where it has it.
SEND_BUFFERS = 'forward_sync_buffers'
if SEND_BUFFERS not in signature(DistributedDataParallel).parameters:
    SEND_BUFFERS = 'broadcast_buffers'


def is_launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, has started this process."""
    return 'LOCAL_RANK' in os.environ


def restarts() -> int:
    """How often torchrun has started the processes again (--max-restarts)."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) if is_launched() else 0


def launch_id() -> str:
    """What is the same after a restart by torchrun, and another for each call of torchrun."""
    run_id = os.environ.get('TORCHELASTIC_RUN_ID', 'none')
    return run_id if run_id != 'none' else f'{socket.gethostname()} {os.getppid()}'


@contextmanager
def process_group() -> Iterator[str]:
    """Join the process group that torchrun asks for, and leave it at the end; gives mmengine's word for the launcher.

    A group that exists is used and left alone. It is joined before mmengine's runner would, which asks CUDA for a
    device even if there is none. After an error it isn't left: that could wait for processes that no longer answer.
    """
    if not is_launched():
        yield 'none'
        return
    if distributed.is_initialized():
        yield 'pytorch'
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    store, rank, world_size = next(distributed.rendezvous('env://'))
    # torchrun keeps its store over a restart, in which the addresses of the processes before would be found.
    store = distributed.PrefixStore(f'start {restarts()} of {world_size}', store)
    backend = 'nccl' if torch.cuda.is_available() else 'gloo'
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield 'pytorch'
    except Exception:
        raise
    except BaseException:  # a stop that all processes have agreed on
        distributed.destroy_process_group()
        raise
    else:
        distributed.destroy_process_group()


def from_first(value):
    """The first process's value, on every process. It is pickled."""
    if get_world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_first(function: Callable, *arguments):
    """What the function gives on the first process, alone to call it; its error is an error on every process."""
    result = error = None
    if get_rank() == 0:
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
    result, failure = from_first((result, error and f'{type(error).__name__}: {error}'))
    if error is not None:
        raise error
    if failure is not None:
        raise RuntimeError(f'The first process has failed. {failure}')
    return result


class BufferBroadcast:
    """Keeps the persistent buffers of a model, such as BatchNorm's statistics, the same on all processes.

    Each process would keep statistics of its own images. A checkpoint has those of the first, so that they have to be
    everyone's: else a resumed run would validate with others.
    """

    def __init__(self, model: nn.Module):
        persistent = model.state_dict(keep_vars=True).keys() if get_world_size() > 1 else ()
        self.buffers = [buffer for name, buffer in model.named_buffers() if name in persistent]

    @torch.no_grad()
    def __call__(self) -> None:
        """Give every process the first one's, in one message for each dtype."""
        for dtype in dict.fromkeys(buffer.dtype for buffer in self.buffers):
            buffers = [buffer for buffer in self.buffers if buffer.dtype == dtype]
            message = torch.cat([buffer.reshape(-1) for buffer in buffers])
            distributed.broadcast(message, src=0)
            if get_rank() != 0:
                parts = message.split([buffer.numel() for buffer in buffers])
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.copy_(part.view_as(buffer))


class DataParallel(MMDistributedDataParallel):
    """DDP on any device, whose error names the parameters that took no part in the loss."""

    def __init__(self, module: nn.Module, find_unused_parameters: bool = False):
        device = get_device()
        level = distributed.get_debug_level()
        if level == distributed.DebugLevel.OFF:
            distributed.set_debug_level(distributed.DebugLevel.INFO)  # a DDP that is made now knows names
        super().__init__(
            module=module.to(device),
            device_ids=None if device == 'cpu' else [int(os.environ['LOCAL_RANK'])],
            **{SEND_BUFFERS: False},  # BufferBroadcast sends them
            find_unused_parameters=find_unused_parameters,
        )
        distributed.set_debug_level(level)

    def train_step(self, data, optim_wrapper):
        try:
            return super().train_step(data, optim_wrapper)
        except RuntimeError as error:
            named = re.search(rf'{UNUSED} for rank \d+: ([^\n]*)', str(error))
            if named is None:
                raise
            raise ValueError(
                f'Parameters that took no part in the loss: {named[1].strip()}. '
                'Freeze or remove them, or set find_unused_parameters=True in the config.'
            ) from error


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """The model with BatchNorm over the images of all processes, timm's layers with activations too.

    Raises:
        ValueError: there is no GPU, which PyTorch's SyncBatchNorm needs.
    """
    if not torch.cuda.is_available():
        raise ValueError('sync_bn needs GPUs: PyTorch has no SyncBatchNorm on the CPU. Remove it from the config.')
    return convert_sync_batchnorm(model)


def shard(model: nn.Module) -> nn.Module:
    """Split the parameters over all processes by FSDP2, in place: each block by itself, and the rest together.

    Blocks are what lists named `blocks` hold, of timm's and the zoo's models; a model without any is one unit.
    """
    device = get_device()
    model.to(device)
    for parameter in model.parameters():
        distributed.broadcast(parameter.data, src=0)  # DDP does so too
    mesh = distributed.device_mesh.init_device_mesh(torch.device(device).type, (get_world_size(),))
    for name, module in reversed(list(model.named_modules())):
        if name.rpartition('.')[2] == 'blocks' and isinstance(module, nn.Sequential | nn.ModuleList):
            for block in module:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gather(value):
    """A checkpoint's nested dicts and lists with whole tensors in the place of sharded ones; every process calls this.

    The whole ones are on the first process's CPU; on others, empty tensors are in their place.
    """
    if isinstance(value, dict):
        return type(value)((key, gather(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(gather(item) for item in value)
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if get_rank() == 0 else whole.new_empty(0)
    return value


def shard_like(value: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as the reference of its shape is, if that is."""
    is_sharded = isinstance(reference, DTensor) and not isinstance(value, DTensor)
    if not is_sharded or value.shape != reference.shape:
        return value
    whole = value.to(reference.device)
    return distribute_tensor(whole, reference.device_mesh, reference.placements, src_data_rank=None)
