"""What a training step keeps for its backward pass, found by running it on tensors that have sizes and no values.

The model is the real class with the real surgery in it; only its storage is missing, so that a step of a 70B takes
seconds and no memory. Autograd's own hooks say what is saved; a storage counts once, and not where it is a parameter's
or a buffer's.

On the CPU the kernels are those that PyTorch picks there. A step on CUDA is run in the same way, with attention and
dropout replaced by the operators that PyTorch picks on a card: the rest saves the same tensors on both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch.autograd.graph import saved_tensors_hooks

from surgery.memory.dry import DryModel, Saved
from surgery.memory.live import LiveBytes
from surgery.memory.step import Step, explained, inputs_of, running
from surgery.memory.watch import KINDS, Watch
from surgery.repeated import FEW, echoing, few_layers


def saved_by(dry: DryModel, step: Step) -> Saved:
    """What a step keeps for backward. Raises: UnsupportedError where the model cannot be run without values."""
    watch = Watch(dry)
    with explained(dry), running(dry, step, watch), watch, saved_tensors_hooks(watch.keep, lambda tensor: tensor):
        loss = dry.model(**inputs_of(dry, step)).loss
        del loss
    return watch.saved()


# --- many layers from few


def saved_by_all(dry: DryModel, step: Step) -> Saved:
    """As `saved_by`; of stacks whose layers are alike two and three are run, and the rest follows.

    The first layer may differ from the others (its input may ask for no gradient), so it is no model for them. Beside a
    side network see `surgery.repeated.echoing`.
    """
    few = _saved_by_few(dry, step, dict.fromkeys(dry.alike, FEW))
    if dry.is_side:
        return few
    kinds = Counter(few.kinds)
    for block, length in dry.alike.items():
        more = _saved_by_few(dry, step, {**dict.fromkeys(dry.alike, FEW), block: FEW + 1})
        for kind in KINDS:
            kinds[kind] += (more.kinds[kind] - few.kinds[kind]) * (length - FEW)
    return Saved(dict(kinds))


def _saved_by_few(dry: DryModel, step: Step, lengths: Mapping[str, int]) -> Saved:
    """What a step keeps with lists of these lengths; what has been asked before is not run again."""
    asked = step, tuple(lengths.items())
    if asked not in dry.known:
        with _shortened(dry, lengths):
            dry.known[asked] = saved_by(dry, step)
    return dry.known[asked]


def _shortened(dry: DryModel, lengths: Mapping[str, int]) -> AbstractContextManager[None]:
    """Lists of these lengths; beside a side network, whose every step counts, whole lists of which few layers run."""
    return echoing(dry.model, list(lengths)) if dry.is_side else few_layers(dry.model, lengths)


def temporary(dry: DryModel, step: Step) -> int:
    """What lives at the peak of a step beside what is kept for backward, and beside gradients that are done.

    The loss's copies of the logits, a layer that checkpointing runs again, gradients on their way: from a few layers,
    as none of it grows with their number; what a side network needs may, and of that every step is run. Raises: as
    `saved_by`.
    """
    few = dict.fromkeys(dry.alike, FEW)
    kept = _saved_by_few(dry, step, few).total
    with _shortened(dry, few):
        live = LiveBytes(dry.model)
        with explained(dry), running(dry, step), live.watching():
            dry.model(**inputs_of(dry, step)).loss.backward()
        dry.model.zero_grad(set_to_none=True)
    return max(live.peak - kept, 0)
