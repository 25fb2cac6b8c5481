"""READ in a model: every layer is read once, the backbone is left alone, and the corrected state is what we say."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import surgery
from surgery import ReadSpec
from surgery.errors import RequestError, UnsupportedError
from surgery.methods.read import side_of
from surgery.side.recurrence import SideStack
from surgery.side.settings import NAME
from tests.reading import (
    SPEC,
    WIDTH,
    Kept,
    attached,
    build_classifier,
    classifier_of,
    depth_of,
    dropout_of,
    keeping,
    logits_of,
    move,
    side_gradients,
    twins,
)
from tests.tiny import EOS, FAMILIES, PAD, build_model, sample_inputs

PAIRS = ("t5", "bart")
ORDERS = tuple(itertools.product(PAIRS, (("both", "attention"), ("both", "mean"), ("encoder", "attention"),
                                         ("encoder", "mean"), ("decoder", "none"))))  # fmt: skip


def loss_of(model: Any, inputs: dict[str, Tensor]) -> Any:
    """A number that depends on every logit."""
    return model(**inputs).logits.double().square().mean()


def classifier_inputs(family: str) -> dict[str, Tensor]:
    """A batch for a classifier: an encoder-decoder makes its decoder's tokens itself, and reads the last end token."""
    inputs = sample_inputs(family)
    inputs.pop("decoder_input_ids", None)
    if family in PAIRS:
        inputs["input_ids"][:, -1] = EOS
    return inputs


def padded_inputs(family: str, side: str = "right") -> dict[str, Tensor]:
    """Two sequences of which the second is five tokens shorter."""
    inputs = sample_inputs(family)
    places = slice(-5, None) if side == "right" else slice(None, 5)
    inputs["input_ids"][1, places] = PAD
    inputs["attention_mask"][1, places] = 0
    return inputs


# --- a fresh side network corrects nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_model_is_its_backbone(family: str) -> None:
    """Bit for bit, in eval and in train mode: no dropout is left in a backbone that does not train."""
    plain = build_model(family, overrides=dropout_of(family))
    ours, inputs = copy.deepcopy(plain), sample_inputs(family)
    surgery.attach(ours, SPEC)
    expected = logits_of(plain, inputs)
    assert torch.equal(logits_of(ours.eval(), inputs), expected)
    assert torch.equal(logits_of(ours.train(), inputs), expected)
    assert not torch.equal(logits_of(plain.train(), inputs), expected)
    assert not torch.equal(logits_of(move(ours), inputs), expected)


@pytest.mark.parametrize("family", [family for family in FAMILIES if classifier_of(family)])
def test_a_fresh_classifier_is_its_backbone(family: str) -> None:
    """The same for classes with another head, which trains whole beside the side network."""
    plain = build_classifier(family, overrides=dropout_of(family))
    ours, inputs = copy.deepcopy(plain), classifier_inputs(family)
    plan = surgery.attach(ours, SPEC)
    expected = logits_of(plain, inputs)
    assert torch.equal(logits_of(ours.eval(), inputs), expected)
    assert torch.equal(logits_of(ours.train(), inputs), expected)
    assert not torch.equal(logits_of(move(ours), inputs), expected)
    assert plan.whole


# --- what is read, and where the correction goes


@contextmanager
def watching_reads(patch: pytest.MonkeyPatch) -> Iterator[list[tuple[SideStack, str, Tensor]]]:
    """Each state handed to a side network: which stack's, whether to start from or as a step, and its values."""
    calls: list[tuple[SideStack, str, Tensor]] = []

    def watched(name: str) -> Any:
        real = SideStack.__dict__[name]

        def call(side: SideStack, x: Tensor, *rest: Any) -> Any:
            calls.append((side, name, x))
            return real(side, x, *rest)

        return call

    with patch.context() as patched:
        for name in ("read", "start"):
            patched.setattr(SideStack, name, watched(name))
        yield calls


def flat(output: Any) -> Tensor:
    """A layer's hidden state, with one row a token."""
    state: Tensor = output if isinstance(output, Tensor) else output[0]
    return state.detach().reshape(-1, state.shape[-1])


LAYERS = (("all", (0, 1, 2, 3, 4)), ("every:2", (0, 2, 4)), ("every:3", (1, 4)), ("last:1", (4,)), ("last:2", (3, 4)),
          ("0,1", (0, 1)), ("3, 1, 3", (1, 3)))  # fmt: skip


@pytest.mark.parametrize(
    ("family", "layers", "expected"),
    (
        *((family, *entry) for family in ("llama", "t5") for entry in LAYERS),
        *((family, "every:2", (0, 2, 4)) for family in ("gpt2", "opt", "bert", "distilbert", "vit", "bart")),
    ),
    ids=str,
)
def test_the_layers_asked_for_are_read_once_each(
    family: str, layers: str, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, each with what a plain hook on that layer sees; the start is what enters the first layer."""
    ours, plain = twins(
        family, ReadSpec(hidden=WIDTH, layers=layers, initial="embedding"), overrides=depth_of(family, 5)
    )
    stacks, wanted = side_of(ours).descriptions, []
    for stack in stacks:
        assert stack.read == expected
        elements = list(plain.get_submodule(stack.layers))
        assert (stack.depth, len(elements)) == (5, 5)
        first = lambda _m, args, kwargs: wanted.append(("start", flat((*args, *kwargs.values()))))
        elements[0].register_forward_pre_hook(first, with_kwargs=True)
        for number in expected:
            elements[number].register_forward_hook(lambda _m, _a, output: wanted.append(("read", flat(output))))
    with watching_reads(monkeypatch) as calls:
        logits_of(ours, sample_inputs(family))
    logits_of(plain, sample_inputs(family))
    assert [kind for _, kind, _ in calls] == ["start", *["read"] * len(expected)] * len(stacks)
    assert [kind for kind, _ in wanted] == [kind for _, kind, _ in calls]
    assert all(torch.equal(mine, theirs) for (_, _, mine), (_, theirs) in zip(calls, wanted, strict=True))
    assert [id(side) for side, _, _ in calls] == [id(s) for s in side_of(ours).stacks.values()
                                                  for _ in range(len(expected) + 1)]  # fmt: skip


EXITS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
    "bert": "bert.encoder.layer.1",
    "distilbert": "distilbert.transformer.layer.1",
    "vit": "vit.layernorm",
}


def captured(model: nn.Module, name: str, *, first: bool = False) -> list[Tensor]:
    """What a module returns from now on, each time, after all hooks (or before them: `first`)."""
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _m, _a, output: seen.append(flat(output)), prepend=first)
    return seen


def entering(model: nn.Module, name: str) -> list[Tensor]:
    """The states that enter a module from now on, by place or by name."""
    seen: list[Tensor] = []
    watch = lambda _m, args, kwargs: seen.append(flat((*args, *kwargs.values())))
    model.get_submodule(name).register_forward_pre_hook(watch, with_kwargs=True)
    return seen


def correction_by_hand(model: nn.Module, states: list[Tensor]) -> Tensor:
    """A stack's correction from the states that enter it and leave its layers."""
    (side,) = side_of(model).stacks.values()
    assert isinstance(side, SideStack)
    with torch.no_grad():
        return side.correction(side([side.read(x, side.readers(), None) for x in states[1:]], side.start(states[0])))


@pytest.mark.parametrize("family", EXITS)
def test_the_last_hidden_state_is_corrected(family: str) -> None:
    """The exit's output is what it was, plus what the side network alone makes of the layers' outputs."""
    spec = ReadSpec(hidden=WIDTH, initial="embedding", scale=0.5, output_norm=True)
    model = attached(family, spec)
    (stack,) = side_of(model).descriptions
    assert stack.exit == EXITS[family]
    states = entering(model, f"{stack.layers}.0")
    outputs = [captured(model, f"{stack.layers}.{number}", first=True) for number in range(2)]
    before, after = (captured(model, stack.exit, first=first) for first in (True, False))
    logits_of(model, sample_inputs(family))
    expected = before[0] + correction_by_hand(model, [*states, *(output[0] for output in outputs)])
    assert torch.equal(after[0], expected)
    assert not torch.allclose(after[0], before[0])


# --- the backbone gets no gradient and keeps nothing


def watch_phases(model: nn.Module, kept: Kept, patch: pytest.MonkeyPatch) -> list[Tensor]:
    """Label what is kept: `side` by the side network's own code, `head` after the last exit, else `backbone`.

    Returns the outputs of the layers that are read, filled as the model runs.
    """
    outputs: list[Tensor] = []
    kept.label = "backbone"

    def inside(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            before, kept.label = kept.label, "side"
            try:
                return real(*arguments)
            finally:
                kept.label = before

        return call

    for name in ("readers", "read", "start", "forward", "correction"):
        patch.setattr(SideStack, name, inside(SideStack.__dict__[name]))
    for stack in side_of(model).descriptions:
        for number in stack.read:
            layer = model.get_submodule(f"{stack.layers}.{number}")
            layer.register_forward_hook(lambda _m, _a, output: outputs.append(flat(output)), prepend=True)
    last = model.get_submodule(side_of(model).descriptions[-1].exit)
    last.register_forward_hook(lambda *_: setattr(kept, "label", "head"))
    return outputs


@pytest.mark.parametrize("embeddings", (False, True), ids=("frozen inputs", "inputs want gradients"))
@pytest.mark.parametrize("family", ("llama", "gpt2", "bert", "distilbert", "vit", "t5", "bart"))
def test_nothing_of_the_backbone_is_kept(family: str, embeddings: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward keeps the outputs of the layers that are read and the side network's own tensors, and no more."""
    spec = ReadSpec(hidden=WIDTH, layers="last:2", initial="embedding" if family == "llama" else "zero")
    model = attached(family, spec, overrides=depth_of(family, 3)).train()
    if embeddings and family != "vit":
        model.enable_input_require_grads()
    reached: list[Tensor] = []

    def watch(_module: nn.Module, _args: Any, embedded: Any) -> None:
        if embedded.requires_grad:
            embedded.register_hook(reached.append)

    if family != "vit":
        model.get_input_embeddings().register_forward_hook(watch)
    with keeping() as kept:
        outputs = watch_phases(model, kept, monkeypatch)
        loss = loss_of(model, sample_inputs(family))
    mine = {p.data_ptr() for p in model.get_submodule(NAME).parameters()}
    assert [tuple(t.shape) for label, t in kept.alive() if label == "backbone"] == []
    of_side = [t for label, t in kept.alive() if label == "side" and t.data_ptr() not in mine]
    states = {t.untyped_storage().data_ptr() for t in of_side if t.shape[-1] == 32}
    read = {x.untyped_storage().data_ptr() for x in outputs}
    assert len(read) == 2 * len(side_of(model).descriptions)
    assert read <= states
    assert len(states - read) == (spec.initial == "embedding")  # the start reads what enters the first layer
    tokens = max(len(x) for x in outputs)
    assert all(t.numel() <= tokens * 3 * WIDTH for t in of_side if t.shape[-1] != 32)
    if family not in PAIRS:
        assert all(t.shape[-1] % WIDTH == 0 or t.shape[-1] == 1 for t in of_side if t.shape[-1] != 32)
    loss.backward()
    side_gradients(model)
    frozen = {name: p for name, p in model.named_parameters() if not name.startswith((NAME, "classifier"))}
    assert not [name for name, p in frozen.items() if p.requires_grad or p.grad is not None]
    assert reached == []


@pytest.mark.parametrize(("family", "field"), (("llama", "intermediate_size"), ("bert", "intermediate_size"),
                                               ("t5", "d_ff"), ("bart", "encoder_ffn_dim")))  # fmt: skip
def test_memory_does_not_depend_on_the_mlp(family: str, field: str) -> None:
    """Ten times the width of its feed-forward layers keeps not a byte more for backward."""
    sizes = []
    for width in (48, 480):
        model = attached(family, overrides={field: width})
        with keeping() as kept:
            loss = loss_of(model, sample_inputs(family))
        assert loss.requires_grad
        sizes.append(kept.bytes_besides(model))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("family", ("llama", "bert", "t5", "bart"))
def test_nothing_of_a_forward_stays(family: str) -> None:
    """Once its loss is gone so is all that was kept for it: nothing waits for a backward that never comes."""
    model = attached(family).train()
    with keeping() as kept:
        loss = loss_of(model, sample_inputs(family))
    assert kept.alive()
    del loss
    gc.collect()
    assert kept.alive() == []


@pytest.mark.parametrize("reentrant", (True, False))
@pytest.mark.parametrize("family", ("llama", "bart"))
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    """There is nothing to checkpoint in a backbone without gradients: the same loss, the same gradients."""
    results = []
    for checkpointing in (False, True):
        model = attached(family).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.config.use_cache = False
            model.enable_input_require_grads()
        loss = loss_of(model, sample_inputs(family))
        loss.backward()
        results.append((loss.detach(), side_gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


# --- encoder-decoders


def pair_spec(order: tuple[str, str], **more: Any) -> ReadSpec:
    """A spec for two stacks."""
    return ReadSpec(hidden=WIDTH, stacks=order[0], joiner=order[1], **more)


@pytest.mark.parametrize(
    ("stacks", "expected"),
    (
        ("both", {"encoder": (1, 3), "decoder": (1, 3)}),
        ("encoder", {"encoder": (1, 3), "decoder": (3,)}),
        ("decoder", {"decoder": (1, 3)}),
    ),
)
@pytest.mark.parametrize("family", PAIRS)
def test_the_stacks_asked_for_are_read(family: str, stacks: str, expected: dict[str, tuple[int, ...]]) -> None:
    """Where the encoder alone is read, the decoder's last layer asks for its states."""
    model = attached(family, ReadSpec(hidden=WIDTH, stacks=stacks, layers="every:2"), overrides=depth_of(family, 4))
    assert {stack.name: stack.read for stack in side_of(model).descriptions} == expected


@pytest.mark.parametrize(("family", "order"), ORDERS, ids=str)
def test_every_side_parameter_learns_by_the_second_step(family: str, order: tuple[str, str]) -> None:
    """From a fresh network: within two optimizer steps each parameter has had a gradient other than zero."""
    model = build_model(family).train()
    surgery.attach(model, pair_spec(order, initial="embedding", bidirectional=True, recurrent_layers=2))
    parameters = dict(model.get_submodule(NAME).named_parameters())
    optimizer, learned = torch.optim.AdamW(parameters.values(), lr=0.05), set()
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, sample_inputs(family, seed=step)).backward()
        learned |= {name for name, p in parameters.items() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    assert learned == set(parameters)
    joins = any(".joiner." in name for name in parameters)
    assert joins == (order[1] != "none")
    assert any(name.startswith("stacks.encoder.") for name in parameters) == (order[0] != "decoder")


@pytest.mark.parametrize(("family", "order"), ORDERS, ids=str)
def test_the_decoder_sees_the_plain_encoder(family: str, order: tuple[str, str]) -> None:
    """After training steps too, bit for bit: no correction enters the backbone."""
    plain = build_model(family)
    ours = copy.deepcopy(plain).train()
    surgery.attach(ours, pair_spec(order))
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.05)
    inputs, seen = padded_inputs(family), []
    for _ in range(2):
        loss_of(ours, inputs).backward()
        optimizer.step()
    given = lambda _m, _a, kwargs: seen.append(kwargs["encoder_hidden_states"])
    for model in (ours, plain):
        model.get_decoder().register_forward_pre_hook(given, with_kwargs=True)
    assert not torch.equal(logits_of(ours, inputs), logits_of(plain, inputs))
    assert torch.equal(*seen)


@pytest.mark.parametrize(("family", "order"), [entry for entry in ORDERS if entry[1][1] != "none"], ids=str)
def test_padding_of_the_encoder_reaches_no_logit(family: str, order: tuple[str, str]) -> None:
    """A shorter sequence beside a longer one gives what it gives alone."""
    model, both = attached(family, pair_spec(order, initial="embedding")), padded_inputs(family)
    alone = {"input_ids": both["input_ids"][1:, :-5], "attention_mask": both["attention_mask"][1:, :-5]}
    alone["decoder_input_ids"] = both["decoder_input_ids"][1:]
    torch.testing.assert_close(logits_of(model, both)[1:], logits_of(model, alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", (1, 3))
@pytest.mark.parametrize(("family", "order"), ORDERS, ids=str)
def test_an_encoder_decoder_generates_with_its_cache(family: str, order: tuple[str, str], beams: int) -> None:
    """Greedy and beam search over a padded batch: tokens and scores are those of a generation without a cache."""
    model, inputs = attached(family, pair_spec(order)), padded_inputs(family)
    del inputs["decoder_input_ids"]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False,
                "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    cached, uncached = (model.generate(**inputs, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for pair in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", PAIRS)
def test_foreign_encoder_outputs_are_refused(family: str) -> None:
    """Those of this model's own encoder are taken; another's, given by name or by place, and other rows are not."""
    model, plain = twins(family)
    inputs, other = sample_inputs(family), sample_inputs(family, seed=1)
    rest = {name: inputs[name] for name in ("attention_mask", "decoder_input_ids")}
    with torch.no_grad():
        foreign = plain.get_encoder()(other["input_ids"])
        refused = r"encoder_outputs: no side states for \([23], \d+, 32\), expected .*Run that encoder"
        with pytest.raises(RuntimeError, match=refused):
            model(encoder_outputs=foreign, **rest)
        own = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        expected = model(encoder_outputs=own, **rest).logits
        with pytest.raises(RuntimeError, match=refused):
            model(encoder_outputs=foreign, **rest)
        with pytest.raises(RuntimeError, match=refused):
            model.get_decoder()(rest["decoder_input_ids"], None, foreign.last_hidden_state)
        three = {name: tensor[[0, 1, 0]] for name, tensor in rest.items()}
        with pytest.raises(RuntimeError, match=refused):
            model(encoder_outputs=plain.get_encoder()(other["input_ids"][[0, 1, 0]]), **three)
    assert torch.equal(expected, logits_of(model, inputs))


@pytest.mark.parametrize("order", (("both", "attention"), ("both", "mean"), ("encoder", "attention")), ids=str)
@pytest.mark.parametrize("family", PAIRS)
def test_each_beam_asks_its_own_sequence(family: str, order: tuple[str, str]) -> None:
    """Encoder outputs repeated for three beams give each sequence's beams what the sequence gets."""
    model, inputs = attached(family, pair_spec(order)), padded_inputs(family)
    mask, tokens = inputs["attention_mask"], inputs["decoder_input_ids"]
    with torch.no_grad():
        outputs = model.get_encoder()(inputs["input_ids"], attention_mask=mask)
        outputs.last_hidden_state = outputs.last_hidden_state.repeat_interleave(3, dim=0)
        rest = {"attention_mask": mask.repeat_interleave(3, 0), "decoder_input_ids": tokens.repeat_interleave(3, 0)}
        beams = model(encoder_outputs=outputs, **rest).logits
    torch.testing.assert_close(beams, logits_of(model, inputs).repeat_interleave(3, dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PAIRS)
def test_an_encoding_serves_any_decoder_call_while_it_lives(family: str) -> None:
    """Several are held at once; each may be decoded again, in another thread, in part or in another order."""
    model, two = attached(family), [padded_inputs(family, side) for side in ("right", "left")]
    expected = [logits_of(model, inputs) for inputs in two]

    @torch.no_grad()
    def decode(number: int, rows: list[int]) -> Tensor:
        rest = {name: two[number][name][rows] for name in ("attention_mask", "decoder_input_ids")}
        states = encoded[number].last_hidden_state
        logits: Tensor = model(encoder_outputs=(states if rows == [0, 1] else states[rows],), **rest).logits
        return logits

    with torch.no_grad():
        encoded = [model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"]) for inputs in two]
    with ThreadPoolExecutor(1) as other:
        for number in (0, 1, 0):
            assert torch.equal(decode(number, [0, 1]), expected[number])
            assert torch.equal(other.submit(decode, number, [0, 1]).result(), expected[number])
            for rows in ([1], [1, 0], [0, 1, 1]):
                torch.testing.assert_close(decode(number, rows), expected[number][rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", PAIRS)
def test_gradients_reach_a_shared_encoding(family: str) -> None:
    """Two decoder calls on one encoding, backward through each: the gradients of two whole forwards."""
    model, inputs = attached(family, dtype=torch.float64).train(), padded_inputs(family)
    rest = {name: inputs[name] for name in ("attention_mask", "decoder_input_ids")}
    later = {**rest, "decoder_input_ids": rest["decoder_input_ids"].flip(0)}
    for each in (rest, later):
        loss_of(model, {**inputs, **each}).backward()
    expected = {name: gradient.clone() for name, gradient in side_gradients(model).items()}
    model.zero_grad()
    encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for each in (rest, later):
        loss_of(model, {"encoder_outputs": encoded, **each}).backward(retain_graph=each is rest)
    for name, gradient in side_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("enabled", (True, False), ids=("with gradients", "without"))
@pytest.mark.parametrize("family", PAIRS)
def test_side_states_live_as_long_as_their_encoding(family: str, enabled: bool) -> None:
    """Neither a forward nor a generation leaves them; those of an encoding that is held go when it goes."""
    model, inputs = attached(family), padded_inputs(family)
    states: list[weakref.ref[Tensor]] = []
    encoder = model.get_submodule(side_of(model).descriptions[0].exit)
    encoder.register_forward_hook(lambda _m, _a, output: states.append(weakref.ref(output)))
    memories = side_of(model)._memories
    with torch.set_grad_enabled(enabled):
        loss_of(model, inputs)
        model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2, num_beams=2)
        assert [state() for state in states] == [None, None]
        assert len(memories._left) == 0
        encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        model(encoder_outputs=encoded, decoder_input_ids=inputs["decoder_input_ids"])
    assert len(memories._left) == 1
    del encoded
    assert states[-1]() is None
    assert len(memories._left) == 0


def test_repeated_rows_are_the_latest_encoding_s() -> None:
    """The encoder is frozen, its side network is not: of two equal outputs the later one's side states are right."""
    model, inputs = attached("t5"), padded_inputs("t5")
    encode = lambda: model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with torch.no_grad():
        before = encode()
        move(model, seed=1)
        after = encode()
        assert torch.equal(before[0], after[0])
        rest = {name: inputs[name][[1]] for name in ("attention_mask", "decoder_input_ids")}
        logits = model(encoder_outputs=(after[0][[1]],), **rest).logits
    torch.testing.assert_close(logits, logits_of(model, inputs)[[1]], rtol=1e-5, atol=1e-5)


def test_a_copy_holds_no_encoding() -> None:
    """A model that has run its encoder with gradients is copied and pickled, and refuses the original's encoding."""
    model, inputs = attached("t5"), sample_inputs("t5")
    encoded = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  our own bytes
        with pytest.raises(RuntimeError, match="no side states"):
            twin(encoder_outputs=encoded, decoder_input_ids=inputs["decoder_input_ids"])
        assert torch.equal(logits_of(twin, inputs), logits_of(model, inputs))


@pytest.mark.parametrize("family", PAIRS)
def test_a_mask_may_be_given_by_place(family: str) -> None:
    """The encoder called with its mask as the second argument leaves what it leaves with the mask by name."""
    model, inputs = attached(family), padded_inputs(family)
    rest = {name: inputs[name] for name in ("attention_mask", "decoder_input_ids")}
    with torch.no_grad():
        outputs = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"])
        result = model(encoder_outputs=outputs, **rest).logits
    assert torch.equal(result, logits_of(model, inputs))


def test_without_a_joiner_any_encoder_outputs_will_do() -> None:
    """Where the decoder alone is read nothing has to come from the encoder's run."""
    model, plain = twins("t5", pair_spec(("decoder", "none")))
    inputs = sample_inputs("t5")
    with torch.no_grad():
        foreign = plain.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        rest = {name: inputs[name] for name in ("attention_mask", "decoder_input_ids")}
        result = model(encoder_outputs=foreign, **rest).logits
    assert torch.equal(result, logits_of(model, inputs))


# --- decoders generate


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma2"))
def test_a_decoder_generates_with_its_cache(family: str) -> None:
    """Cached equals uncached, past a sliding window too; a left-padded row gives what it gives alone."""
    spec = ReadSpec(hidden=WIDTH, initial="embedding", bidirectional=True)
    model, inputs = attached(family, spec), padded_inputs(family, "left")
    alone = {name: tensor[1:, 5:] for name, tensor in inputs.items()}
    settings = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "output_logits": True,
                "return_dict_in_generate": True}  # fmt: skip
    cached, uncached = (model.generate(**inputs, use_cache=cache, **settings) for cache in (True, False))
    single = model.generate(**alone, **settings)
    assert cached.sequences.shape[1] > 16
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.equal(cached.sequences[1:, 5:], single.sequences)
    for step in range(14):
        torch.testing.assert_close(cached.logits[step], uncached.logits[step], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cached.logits[step][1:], single.logits[step], rtol=1e-4, atol=1e-5)


# --- padding


@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize("family", ("llama", "gpt2", "bert", "distilbert"))
def test_padding_gets_no_correction_and_is_not_computed(
    family: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exit's output is the backbone's own there, and the side network sees as many rows as there are tokens."""
    spec = ReadSpec(hidden=WIDTH, initial="embedding", bidirectional=True)
    model, inputs = attached(family, spec), padded_inputs(family, side)
    (stack,) = side_of(model).descriptions
    before, after = (captured(model, stack.exit, first=first) for first in (True, False))
    rows, is_token = [], inputs["attention_mask"] == 1
    for name in ("read", "start"):
        real = getattr(SideStack, name)
        monkeypatch.setattr(SideStack, name, lambda s, x, *rest, real=real: rows.append(len(x)) or real(s, x, *rest))
    logits_of(model, inputs)
    assert rows == [int(is_token.sum())] * 3
    moved = (before[0] != after[0]).any(-1)
    assert torch.equal(moved, is_token.flatten())


@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize("family", ("llama", "bert", "t5", "bart"))
def test_fixed_shapes_give_the_same(family: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph, and on devices that want fixed shapes, padding is computed and its correction dropped."""
    spec = ReadSpec(hidden=WIDTH, initial="embedding", **({"joiner": "mean"} if family == "bart" else {}))
    model, inputs = attached(family, spec, dtype=torch.float64), padded_inputs(family, side)
    if family == "bart":
        inputs["decoder_attention_mask"] = inputs["attention_mask"][:, : inputs["decoder_input_ids"].shape[1]]
    results = []
    for is_fixed in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda is_fixed=is_fixed: is_fixed)
        model.zero_grad()
        logits = model(**inputs).logits
        logits.square().mean().backward()
        results.append((logits.detach(), {n: g.clone() for n, g in side_gradients(model).items()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


# --- training


@pytest.mark.parametrize("family", ("llama", "bert", "t5"))
def test_two_half_batches_are_one_batch(family: str) -> None:
    """In double precision accumulated gradients are the whole batch's."""
    model, inputs = attached(family, dtype=torch.float64), sample_inputs(family, batch=4)
    loss_of(model, inputs).backward()
    whole = {name: gradient.clone() for name, gradient in side_gradients(model).items()}
    assert {gradient.dtype for gradient in whole.values()} == {torch.float64}
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (loss_of(model, {name: tensor[half] for name, tensor in inputs.items()}) / 2).backward()
    for name, gradient in side_gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("family", ("llama", "bert", "t5"))
def test_a_whole_model_s_side_gradients_are_numerical_ones(family: str) -> None:
    """A step along the gradient changes the loss by what the gradient says, in double precision."""
    spec = ReadSpec(hidden=WIDTH, initial="embedding", bidirectional=True, output_norm=True)
    model, inputs = attached(family, spec, dtype=torch.float64), sample_inputs(family)
    loss_of(model, inputs).backward()
    gradients, step = side_gradients(model), 1e-5
    square = sum(float(gradient.square().sum()) for gradient in gradients.values())
    losses = []
    for factor in (step, -2 * step):
        with torch.no_grad():
            for name, gradient in gradients.items():
                model.get_parameter(f"{NAME}.{name}").add_(gradient, alpha=factor)
            losses.append(float(loss_of(model, inputs)))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(square, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # by dynamo itself,
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # and this too
@pytest.mark.parametrize(
    ("family", "backend", "cell"),
    (
        ("llama", "eager", "gru"),
        pytest.param("gpt2", "aot_eager", "gru", marks=pytest.mark.slow),
        pytest.param("bert", "aot_eager", "lstm", marks=pytest.mark.slow),
        pytest.param("bart", "aot_eager", "rnn", marks=pytest.mark.slow),
    ),
)
def test_a_compiled_backbone_is_the_same(family: str, backend: str, cell: str) -> None:
    """torch.compile of the backbone, hooks and all: logits, gradients, and logits again after a step."""
    torch.compiler.reset()
    ours = attached(family, ReadSpec(hidden=WIDTH, cell=cell, initial="embedding")).train()
    compiled, inputs = copy.deepcopy(ours), padded_inputs(family)
    if family == "llama":
        compiled.model = torch.compile(compiled.model, backend=backend)
    else:
        compiled.base_model.compile(backend=backend)
    results = []
    for model in (ours, compiled):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss_of(model, inputs).backward()
        gradients = {name: gradient.clone() for name, gradient in side_gradients(model).items()}
        optimizer.step()
        results.append((gradients, logits_of(model, inputs)))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)
    for name, gradient in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ("bfloat16", "float16", "autocast"))
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_the_side_network_computes_in_fp32(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a 16-bit backbone and under autocast: its tensors, gates and gradients are fp32, logits the backbone's."""
    dtype = torch.float32 if mode == "autocast" else getattr(torch, mode)
    model, plain = twins(family, dtype=dtype)
    assert {p.dtype for p in model.get_submodule(NAME).parameters()} == {torch.float32}
    kinds: list[Tensor] = []
    forward, correct = SideStack.forward, SideStack.correction

    def recorded(side: SideStack, steps: list[list[Tensor]], start: Tensor) -> Tensor:
        kinds.extend((start, *itertools.chain(*steps)))
        return forward(side, steps, start)

    def recorded_correction(side: SideStack, state: Tensor) -> Tensor:
        kinds.extend((state, result := correct(side, state)))
        return result

    monkeypatch.setattr(SideStack, "forward", recorded)
    monkeypatch.setattr(SideStack, "correction", recorded_correction)
    states = [captured(model, f"{side_of(model).descriptions[0].layers}.{number}") for number in range(2)]
    after, before = (captured(m, side_of(model).descriptions[0].exit) for m in (model, plain))
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        logits = model(**sample_inputs(family)).logits
        assert logits.dtype == plain(**sample_inputs(family)).logits.dtype
    assert {tensor.dtype for tensor in kinds} == {torch.float32}
    assert len(kinds) == 5  # the start, the gates of two layers, the last state, the correction
    expected = correction_by_hand(model, [states[0][0], *(run[0] for run in states)])
    assert torch.equal(after[0], before[0] + expected.to(before[0].dtype))
    logits.double().square().mean().backward()
    assert {gradient.dtype for gradient in side_gradients(model).values()} == {torch.float32}


# --- threads


@pytest.mark.parametrize("family", ("llama", "bert", "t5", "bart"))
def test_threads_do_not_share_a_forward(family: str) -> None:
    """Two batches of different lengths, each in a thread, in step at every layer: each gets what it gets alone."""
    model = attached(family)
    batches = [sample_inputs(family, tokens=tokens) for tokens in (7, 11)]
    expected = [logits_of(model, inputs) for inputs in batches]
    meeting = threading.Barrier(2, timeout=20)

    def meet(*_: object) -> None:
        meeting.wait()

    for stack in side_of(model).descriptions:
        for layer in model.get_submodule(stack.layers).children():
            layer.register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda inputs: logits_of(model, inputs), batches))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


# --- classifiers: which state they see


def pooled_by_hand(state: Tensor, mask: Tensor, how: str) -> Tensor:
    """One state for each sequence, row by row."""
    rows = [row[kept == 1] for row, kept in zip(state, mask, strict=True)]
    pick: Any = {"first": lambda row: row[0], "last": lambda row: row[-1], "mean": lambda row: row.mean(0)}[how]
    return torch.stack([pick(row) for row in rows])


def head_by_hand(family: str, model: Any, pooled: Tensor) -> Tensor:
    """The logits that a classifier's own head makes of a pooled state."""
    if family == "distilbert":
        pooled = model.pre_classifier(pooled).relu()
    if family == "roberta":
        pooled = pooled.unsqueeze(1)
    logits: Tensor = (model.score if family in ("llama", "gpt2") else model.classifier)(pooled)
    return logits


@pytest.mark.parametrize("padding", ("right", "left", "none"))
@pytest.mark.parametrize("how", ("first", "mean", "last"))
@pytest.mark.parametrize("family", ("bert", "roberta", "distilbert", "llama", "gpt2"))
def test_a_classifier_sees_the_pooled_corrected_state(family: str, how: str, padding: str) -> None:
    """Its head gets the first or last token that is no padding, or the mean of those, whatever its class would pick."""
    models = []
    for pooling in ("own", how):
        model = build_classifier(family)
        surgery.attach(model, ReadSpec(hidden=WIDTH, pooling=pooling))
        models.append(move(model))
    inputs = padded_inputs(family, padding) if padding != "none" else sample_inputs(family)
    with torch.no_grad():
        state = models[0].base_model(**inputs).last_hidden_state
        expected = head_by_hand(family, models[0], pooled_by_hand(state, inputs["attention_mask"], how))
        if padding == "none":
            del inputs["attention_mask"]
        torch.testing.assert_close(models[1](**inputs).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ("first", "mean", "last"))
def test_an_image_classifier_pools_its_patches(how: str) -> None:
    """Without a mask every place counts, the class token among them."""
    models = []
    for pooling in ("own", how):
        model = build_classifier("vit")
        surgery.attach(model, ReadSpec(hidden=WIDTH, pooling=pooling))
        models.append(move(model))
    inputs = sample_inputs("vit")
    with torch.no_grad():
        state = models[0].base_model(**inputs).last_hidden_state
        expected = models[0].classifier(pooled_by_hand(state, torch.ones(state.shape[:2]), how))
    torch.testing.assert_close(logits_of(models[1], inputs), expected, rtol=1e-5, atol=1e-6)


def test_pooling_is_for_classifiers_of_one_stack() -> None:
    """A language model, a tagger and an encoder-decoder refuse it, by name, and stay as they were."""
    config: Any = build_model("bert").config
    tagger: Any = getattr(transformers, "BertForTokenClassification")(config)  # noqa: B009  it has no types
    for model in (build_model("llama"), tagger, build_classifier("t5"), build_model("bert")):
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises(RequestError, match=r"--pooling: 'mean' for .*own"):
            surgery.attach(model, ReadSpec(hidden=WIDTH, pooling="mean"))
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


# --- opening and closing in memory


def hooks_of(model: nn.Module) -> int:
    """How many hooks a model's modules have."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
             "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")  # fmt: skip
    return sum(len(module.__dict__[kind]) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("family", ("llama", "bert", "t5", "bart", "vit"))
def test_detaching_gives_the_backbone_back(family: str) -> None:
    """merge=False: no hook, no attribute, no tensor is left; a merge is unsupported and changes nothing."""
    ours, plain = twins(family)
    inputs, moved = sample_inputs(family), logits_of(ours, sample_inputs(family))
    with pytest.raises(UnsupportedError, match=r"a READ adapter .*merge=False.*remote-code"):
        surgery.detach(ours, merge=True)
    assert torch.equal(logits_of(ours, inputs), moved)
    assert surgery.detach(ours, merge=False) is ours
    assert hooks_of(ours) == hooks_of(plain)
    assert [sorted(vars(module)) for module in ours.modules()] == [sorted(vars(module)) for module in plain.modules()]
    assert all(p.requires_grad for p in ours.parameters())
    assert ours.state_dict().keys() == plain.state_dict().keys()
    if family != "vit":  # its head is trained whole, and given back
        assert torch.equal(logits_of(ours, inputs), logits_of(plain, inputs))
    surgery.attach(ours, SPEC)
    assert torch.equal(logits_of(ours, inputs), logits_of(plain, inputs))


@pytest.mark.parametrize("family", ("llama", "t5"))
def test_a_copy_lives_on_its_own(family: str) -> None:
    """A deep copy reads its own layers and trains without moving the original; each can be detached alone."""
    ours, plain = twins(family)
    inputs = sample_inputs(family)
    before = logits_of(ours, inputs)
    twin = copy.deepcopy(ours)
    assert torch.equal(logits_of(twin, inputs), before)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.05)
    loss_of(twin, inputs).backward()
    assert all(p.grad is None for p in ours.parameters())
    optimizer.step()
    assert torch.equal(logits_of(ours, inputs), before)
    assert not torch.equal(logits_of(twin, inputs), before)
    surgery.detach(ours, merge=False)
    assert torch.equal(logits_of(ours, inputs), logits_of(plain, inputs))
    moved = logits_of(twin, inputs)
    with torch.no_grad():
        twin.get_submodule(NAME).get_parameter(f"stacks.{side_of(twin).descriptions[-1].name}.norm").mul_(2.0)
    assert not torch.equal(logits_of(twin, inputs), moved)


@pytest.mark.parametrize("enabled", (True, False), ids=("with gradients", "without"))
@pytest.mark.parametrize(
    ("family", "where"),
    (("llama", "model.layers.1"), ("bert", "bert.encoder.layer.0"), ("t5", "decoder.block.1"),
     ("bart", "model.encoder.layers.1")),
)  # fmt: skip
def test_a_forward_that_fails_leaves_nothing_behind(family: str, where: str, enabled: bool) -> None:
    """Gradients are as enabled as they were, and the next forward, of another shape, is right."""
    model, whole = twins(family)[0], sample_inputs(family, tokens=11)
    inputs, expected = sample_inputs(family), logits_of(twins(family)[0], sample_inputs(family))

    def fail(*_: Any) -> None:
        raise KeyError("once")

    handle = model.get_submodule(where).register_forward_hook(fail)
    with torch.set_grad_enabled(enabled):
        with pytest.raises(KeyError, match="once"):
            model(**whole)
        assert torch.is_grad_enabled() == enabled
        assert not torch.is_autocast_enabled("cpu")
        handle.remove()
        assert torch.equal(model(**inputs).logits.detach(), expected)


def test_a_layer_that_was_not_run_is_noticed() -> None:
    """A forward that leaves layers out is no forward of the model that was planned: it fails, and says which."""
    model = attached("llama")
    layers = model.model.layers
    handle = layers[1].register_forward_hook(lambda *_: None)
    hooks = layers[1]._forward_hooks
    hooks.pop(next(key for key in hooks if key != handle.id))
    with pytest.raises(RuntimeError, match=r"model\.layers: 1 layers were seen, expected 2\. Run each layer once"):
        model(**sample_inputs("llama"))
