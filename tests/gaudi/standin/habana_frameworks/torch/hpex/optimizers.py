"""The fused AdamW with its flaw: it gives every parameter the first one's dtype."""

import torch


class FusedAdamW(torch.optim.AdamW):
    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.copy_(parameter.to(parameters[0].dtype))
        return loss
