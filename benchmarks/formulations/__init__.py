"""Token mixers in the formulation of their authors' code, for the families whose attention is more than an operator.

A form is a subclass of the family's module that computes the same of the same weights, as its authors wrote it down:
windows permuted, scores and probabilities as tensors, neighborhoods unfolded. What surrounds the mixers stays the
zoo's, so that a measurement of both compares the mixers. A form is only as it is measured here: no form is exported,
scripted or trained with.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import convolutions, slots, spectra, tokens, windows

__all__ = ['FORMS', 'formulate']

TOLERANCE = 1e-4  # relative, of the norm, in float32
FORMS: dict[type[nn.Module], dict[type[nn.Module], type[nn.Module]]] = {
    **convolutions.FORMS,
    **slots.FORMS,
    **spectra.FORMS,
    **tokens.FORMS,
    **windows.FORMS,
}  # model -> module -> form


def formulate(model: nn.Module, images: Tensor) -> int:
    """Have a model's token mixers compute as their authors' code does, from now on; other models stay as they are.

    Args:
        model: of a family that has `FORMS`, or not.
        images: (batch, in_chans, height, width). Each form is compared with its module in a forward pass of these.

    Returns:
        How many modules have another form now: those of the family that the forward pass reached.

    Raises:
        RuntimeError: a form's result differs by more than `TOLERANCE`. All modules are then as they were.
    """
    forms = dict(_forms_of(model))
    agreeing = set()

    def compare(module, arguments, keywords, output):
        own = type(module)
        module.__class__ = forms[module]
        try:
            found = module.forward(*arguments, **keywords)
        finally:
            module.__class__ = own
        error = ((found - output).norm() / output.norm()).item()
        if not error <= TOLERANCE:
            raise RuntimeError(f'The formulation of {own.__name__} differs from the module by {error:.1e}.')
        agreeing.add(module)

    was_training = model.training
    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in forms]
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for module in agreeing:
        module.__class__ = forms[module]
    return len(agreeing)


def _forms_of(model: nn.Module) -> Iterable[tuple[nn.Module, type[nn.Module]]]:
    for family, forms in FORMS.items():
        if isinstance(model, family):
            yield from ((module, forms[type(module)]) for module in model.modules() if type(module) in forms)
