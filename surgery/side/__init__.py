# SPDX-License-Identifier: Apache-2.0
# checkpoint-surgery 0.1.0
"""READ's side network: a recurrence over the layers of a frozen stack, and one correction of its last hidden state.

Step i of the recurrence reads the output of layer i. Nothing of the backbone is recorded by autograd: its weights are
frozen and what enters its first layer is detached; backward keeps each layer's output and, of a step, the gates. Depth
costs no parameters.

It needs torch and nothing else: `surgery export --format remote-code` writes its modules, as they stand, into one file
beside the weights, with a class of the model's after them.

Shape suffixes: b sequences, t tokens, n = b * t or, where padding is left out, fewer, d width of the backbone, h width
of the side network, g gates of a step (3 h for a GRU, 4 h for an LSTM, h for a plain RNN), s tokens of the encoder.

Source: READ, arXiv 2305.15348, section 3; the order of a step's gates is torch.nn.GRU's and torch.nn.LSTM's.
"""
