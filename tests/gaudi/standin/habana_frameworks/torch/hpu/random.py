"""Random numbers of the device come from the CPU's generator, so these seed and keep that one."""

import torch


def manual_seed(seed):
    pass  # whoever seeds the device has seeded the CPU


def manual_seed_all(seed):
    pass


def get_rng_state(device=None):
    return torch.get_rng_state()


def set_rng_state(state, device=None):
    torch.set_rng_state(state)


def get_rng_state_all():
    return [torch.get_rng_state()]


def set_rng_state_all(states):
    torch.set_rng_state(states[0])
