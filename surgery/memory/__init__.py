"""How much memory a training run needs on each device, predicted from config.json: no weight is read, none allocated.

Counted are weights, what trains and its originals, gradients, AdamW's moments, what the forward pass keeps for the
backward pass, and what else lives at the step's peak (`surgery.memory.saved` runs one to see). Not counted are what
operators free before they return, kernels' workspace, what an allocator cannot use, and the device's own context.
"""
