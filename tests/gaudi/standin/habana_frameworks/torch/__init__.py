"""Importing it gives torch the device `hpu`."""

import torch

from . import core, device, hpu

if not hasattr(torch, "hpu"):
    device.install(hpu)
