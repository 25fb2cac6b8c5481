"""The fused norm, and the fused clipping with its flaw: it gives every gradient the first parameter's dtype."""

import torch


class FusedRMSNorm:
    @staticmethod
    def apply(x, weight, epsilon):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


class FusedClipNorm:
    def __init__(self, parameters, max_norm):
        self.max_norm = max_norm

    def clip_norm(self, parameters):
        parameters = list(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.grad.to(parameters[0].dtype))
        return norm.reshape(1)
