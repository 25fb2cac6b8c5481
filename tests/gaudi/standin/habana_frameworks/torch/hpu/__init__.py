"""`torch.hpu`: one device (and another by its number alone), whose memory figures are made up."""

import torch

from . import random
from .random import get_rng_state, get_rng_state_all, manual_seed, manual_seed_all, set_rng_state, set_rng_state_all

GIB = 1024**3
IN_USE, PEAK, LIMIT = GIB, 2 * GIB, 96 * GIB


def _lazy_init():
    pass


def _is_in_bad_fork():
    return False


def is_available():
    return True


def is_initialized():
    return True


def current_device():
    return 0


def device_count():
    return 2


def set_device(device):
    pass


def synchronize(device=None):
    pass


def get_amp_supported_dtype():
    return [torch.bfloat16]


def get_device_name(device=None):
    return "GAUDI2"


def memory_stats(device=None):
    return {"InUse": IN_USE, "MaxInUse": PEAK, "Limit": LIMIT}


def memory_allocated(device=None):
    return IN_USE


def max_memory_allocated(device=None):
    return PEAK


def reset_peak_memory_stats(device=None):
    pass


def enable_dynamic_shape():
    pass


def disable_dynamic_shape():
    pass


def is_autocast_hpu_enabled():
    return torch.is_autocast_enabled("hpu")


def get_autocast_hpu_dtype():
    return torch.get_autocast_dtype("hpu")
