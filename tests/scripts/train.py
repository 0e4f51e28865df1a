"""Trains as timm's train.py does, through the same functions of timm, and knows nothing of the zoo."""

import argparse
import json
import multiprocessing
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, load_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    ModelEmaV3,
    ParseKwargs,
    accuracy,
    init_distributed_device,
    is_primary,
    random_seed,
    reduce_tensor,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser(description='Training')
parser.add_argument('data_dir')
parser.add_argument('--model', default='resnet18')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
parser.add_argument('--num-classes', type=int)
parser.add_argument('--img-size', type=int)
parser.add_argument('--drop-path', type=float)
parser.add_argument('--batch-size', type=int, default=8)
parser.add_argument('--epochs', type=int, default=1)
parser.add_argument('--opt', default='adamw')
parser.add_argument('--lr', type=float, default=1e-3)
parser.add_argument('--weight-decay', type=float, default=0.05)
parser.add_argument('--momentum', type=float, default=0.9)
parser.add_argument('--layer-decay', type=float)
parser.add_argument('--model-ema', action='store_true')
parser.add_argument('--workers', type=int, default=0)
parser.add_argument('--start-method', default='fork')
parser.add_argument('--device', default='cpu')
parser.add_argument('--resume', default='')
parser.add_argument('--output', default='output')


def main():
    args = parser.parse_args()
    multiprocessing.set_start_method(args.start_method, force=True)
    device = init_distributed_device(args)
    random_seed(0, args.rank)

    model = create_model(
        args.model,
        num_classes=args.num_classes,
        drop_path_rate=args.drop_path,
        **args.model_kwargs,
    )
    if args.resume:
        load_checkpoint(model, args.resume, use_ema=args.model_ema)
    data_config = resolve_data_config(vars(args), model=model, verbose=is_primary(args))
    model.to(device)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    ema = ModelEmaV3(model, decay=0.9) if args.model_ema else None
    loaders = {}
    for split, is_training in (('train', True), ('test', False)):
        dataset = create_dataset('', root=args.data_dir, split=split, is_training=is_training)
        loaders[split] = create_loader(
            dataset,
            input_size=data_config['input_size'],
            batch_size=args.batch_size,
            is_training=is_training,
            interpolation=data_config['interpolation'],
            mean=data_config['mean'],
            std=data_config['std'],
            crop_pct=data_config['crop_pct'],
            num_workers=args.workers if is_training else 0,
            distributed=args.distributed,
            device=device,
        )
    updates = len(loaders['train'])
    scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=args.epochs, updates_per_epoch=updates)
    trained = DistributedDataParallel(model) if args.distributed else model
    saver = None
    if is_primary(args):
        Path(args.output).mkdir(parents=True, exist_ok=True)
        saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=args.output)
    for epoch in range(epochs):
        loss = train_one_epoch(epoch, trained, loaders['train'], optimizer, ema, args)
        top1 = validate(ema.module if ema else model, loaders['test'], args)
        if saver is not None:
            saver.save_checkpoint(epoch, metric=top1)
        scheduler.step(epoch + 1, top1)
    if is_primary(args):
        result = {'loss': loss, 'top1': top1, 'input_size': data_config['input_size'], 'ranks': args.world_size}
        Path(args.output, 'result.json').write_text(json.dumps(result))
    if args.distributed:
        torch.distributed.destroy_process_group()


def train_one_epoch(epoch, model, loader, optimizer, ema, args):
    model.train()
    if args.distributed:
        loader.sampler.set_epoch(epoch)
    losses = AverageMeter()
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update(model.module if args.distributed else model)
        losses.update(loss.item(), len(images))
    return losses.avg


@torch.no_grad()
def validate(model, loader, args):
    model.eval()
    right = AverageMeter()
    for images, labels in loader:
        (top1,) = accuracy(model(images), labels)
        right.update(reduce_tensor(top1, args.world_size).item() if args.distributed else top1.item(), len(images))
    return right.avg


if __name__ == '__main__':
    main()
