"""The methods that a bench compares: what trains, how much, what backward keeps, how they merge, how they are named."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery.bench import energy, longest
from surgery.bench.energy import Meter
from surgery.bench.measure import deployed, forward_of, joules, saved_bytes, take_turns
from surgery.bench.methods import VARIANTS, Adapter, residual_layers, trained
from surgery.bench.scores import learn
from surgery.bench.sizes import count_values, nearest, settle
from surgery.bench.spec import parse_methods, read_spec, split_methods
from surgery.bench.subject import DTYPES, Contender, Feed, build, draw, enter, open_feed, open_subject, set_dropout
from surgery.errors import RequestError, SurgeryError, UnsupportedError
from surgery.memory.live import LiveBytes
from surgery.memory.predict import predict
from surgery.survey import TaskSpec, survey
from tests.benches import CLASSES, contender_of, little, subject_of, text_data
from tests.conftest import TinyModel

# A layer of the tiny Llama: q 32 x 32, k and v 16 x 32, o 32 x 32, gate and up 48 x 32, down 32 x 48; two layers.
OUT, IN = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32), 2 * (6 * 32 + 48)
COUNTS = {
    "paca:r=4": 4 * OUT,
    "read:hidden=8": 3 * 8 * (32 + 8) + 6 * 8 + 8 * 32 + 2 * 32,
    "lora:r=4": 4 * (OUT + IN),
    "dora:r=4": 4 * (OUT + IN) + OUT,
    "miss:r=4": 4 * OUT,
    "shira:r=2": 2 * (OUT + IN),
    "prompt:tokens=5": 5 * 32,
    "adapter:bottleneck=3": 4 * (2 * 3 * 32 + 3 + 32),
    "floor": 0,
}
NAMES = {
    "paca": ".paca_delta", "read": "side_network.", "lora": ".lora_", "dora": ".lora_", "miss": ".miss_",
    "shira": ".shira_", "prompt": "prompt_encoder.", "adapter": ".adapter.", "bitfit": ".bias",
}  # fmt: skip


# --- what trains


@pytest.mark.parametrize("method", COUNTS)
def test_each_method_trains_the_values_it_claims(method: str, tiny_model: TinyModel) -> None:
    """As many as by hand, under names that are the method's own."""
    counts = trained(contender_of(tiny_model("llama"), method).model)
    assert sum(counts.values()) == COUNTS[method]
    assert all(NAMES[method.partition(":")[0]] in name for name in counts)


def test_full_tuning_trains_every_value(tiny_model: TinyModel) -> None:
    """And BitFit each bias and no more."""
    model = contender_of(tiny_model("bert"), "full", **CLASSES).model
    assert trained(model) == {name: parameter.numel() for name, parameter in model.named_parameters()}
    biases = {name: n for name, n in trained(model).items() if name.endswith(".bias")}
    assert len(biases) == 19
    assert trained(contender_of(tiny_model("bert"), "bitfit", **CLASSES).model).items() >= biases.items()


@pytest.mark.parametrize("method", sorted(set(VARIANTS) - {"floor"}))
def test_a_head_trains_whole_with_every_method(method: str, tiny_model: TinyModel) -> None:
    """A classifier's head is among what trains, whole, in fp32; nothing else is that the method has not claimed."""
    contender = contender_of(tiny_model("bert"), f"{method}:r=2" if method == "shira" else method, **CLASSES)
    found = {name: p for name, p in contender.model.named_parameters() if p.requires_grad}
    heads = [name for name in found if name.split(".")[-2:] == ["classifier", "weight"] or "classifier" in name]
    assert sorted(found[name].numel() for name in heads if "classifier" in name) == [2, 64]
    new = set(contender.subject.shared().whole)
    rest = [name for name in found if name not in heads and not any(name.endswith(whole) for whole in new)]
    assert method == "full" or all(NAMES[method] in name for name in rest)
    assert rest


def test_nothing_of_the_floor_trains(tiny_model: TinyModel) -> None:
    """Yet a gradient flows through all of it, also where several modules look the same words up."""
    for family, given in (("llama", {}), ("bert", CLASSES), ("t5", {})):
        contender = contender_of(tiny_model(family), "floor", **given)
        assert trained(contender.model) == {}
        batch = draw(contender.subject, 0)
        assert contender.loss(batch).requires_grad
        contender.step(batch)


@pytest.mark.parametrize(("family", "given"), (("llama", {}), ("bert", CLASSES)))
def test_all_are_put_on_the_same_layers(family: str, given: Any, tiny_model: TinyModel) -> None:
    """Those that the targets mean, for the package's own methods and for PEFT's."""
    seen = {}
    for method, mark in (
        ("paca", ".paca_delta"),
        ("lora", ".lora_A"),
        ("miss", ".miss_block"),
        ("shira:r=1", ".shira_"),
    ):
        model = contender_of(
            tiny_model(family),
            method,
            targets=["re:.*layers?\\.[01]\\..*"],
            exclude=["*v_proj", "*value"][family == "bert" :][:1],
            **given,
        ).model
        names = [name.partition(mark)[0] for name in trained(model) if mark in name]
        seen[method] = sorted(name.removeprefix("base_model.model.") for name in names)
    assert seen["paca"] == seen["lora"] == seen["miss"] == seen["shira:r=1"]
    assert len(seen["paca"]) == {"llama": 12, "bert": 10}[family]


def test_dropout_is_none_or_the_same_for_all(tiny_model: TinyModel) -> None:
    """The model's own is off unless asked for; then adapters have it too."""
    for rate in (0.0, 0.25):
        for method in ("lora", "paca", "full"):
            model = contender_of(tiny_model("bert"), method, dropout=rate, **CLASSES).model
            rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
            assert set(rates) == {rate}
    model = contender_of(tiny_model("opt"), "full", dropout=0.25).model
    assert {module.dropout for module in model.modules() if "dropout" in vars(module)} == {0.25}
    set_dropout(model, 0.0)
    assert {module.dropout for module in model.modules() if "dropout" in vars(module)} == {0.0}


@pytest.mark.parametrize(
    ("family", "places"),
    (
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
        ("bert", ("attention.output.dense", "output.dense")),
        ("t5", ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo")),
    ),
)
def test_adapters_stand_behind_attention_and_mlp(family: str, places: tuple[str, ...], tiny_model: TinyModel) -> None:
    """Found by watching a forward, whatever the modules are called."""
    seen = survey(tiny_model(family), TaskSpec())
    found = residual_layers(seen.model, seen.heads)
    assert all(name.endswith(places) for name in found)
    assert len(found) == {"t5": 2 * 2 + 2 * 3}.get(family, 4)


def test_an_adapter_changes_nothing_at_first() -> None:
    """Its second layer starts at zero."""
    adapter, x = Adapter(6, 2, like=torch.zeros(1)), torch.randn(3, 6)
    assert torch.equal(adapter(x), x)
    assert Adapter(6, 2, like=torch.zeros(1, dtype=torch.bfloat16)).down.weight.dtype == torch.float32


@pytest.mark.parametrize(("family", "method"), (("gemma2", "adapter"), ("llama", "bitfit")))
def test_a_method_that_has_no_place_is_refused(family: str, method: str, tiny_model: TinyModel) -> None:
    """With the reason, before anything is measured."""
    with pytest.raises(UnsupportedError, match=rf"--methods: {method}, and .*Leave {method} out"):
        subject_of(tiny_model(family), method)


@pytest.mark.parametrize("method", ("paca", "lora", "dora", "miss", "shira:r=2", "bitfit", "full"))
def test_a_merged_model_is_plain_and_computes_the_same(method: str, tiny_model: TinyModel) -> None:
    """After some steps, with the class and the parameters' names of the plain model."""
    subject, (entry,) = subject_of(tiny_model("bert"), method, **CLASSES)
    base = build(subject)
    contender = enter(subject, entry, base, rate=1e-2)
    batch = draw(subject, 0)
    for _ in range(3):
        contender.step(batch)
    model = contender.model.eval()
    trained_logits = forward_of(subject, model)(batch).logits  # type: ignore[attr-defined]
    assert entry.variant.merge is not None
    merged = entry.variant.merge(model).eval()
    assert type(merged) is type(base)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    torch.testing.assert_close(forward_of(subject, merged)(batch).logits, trained_logits, atol=2e-5, rtol=1e-4)  # type: ignore[attr-defined]
    plain = forward_of(subject, deployed(subject, entry, base))(batch).logits  # type: ignore[attr-defined]
    assert not torch.allclose(plain, trained_logits, atol=1e-4)


# --- what backward keeps


def kept_by(contender: Contender) -> int:
    """The bytes that a step keeps for backward."""
    return saved_bytes(contender.model, lambda: contender.loss(draw(contender.subject, 0)))


def test_bytes_saved_are_in_order(tiny_model: TinyModel) -> None:
    """The floor keeps least, PaCA hardly more, LoRA more; without gradients READ keeps less than the floor.

    (Of a model of few layers PaCA may keep less than the floor: its first layer asks for no gradient.)
    """
    deep = tiny_model("llama", overrides={"num_hidden_layers": 6})
    kept = {}
    for method in ("floor", "paca:r=4", "lora:r=4", "read:hidden=8", "full", "shira:r=2"):
        contender = contender_of(deep, method, sequence=64)
        kept[method.partition(":")[0]] = kept_by(contender)
    assert kept["floor"] <= kept["paca"] <= kept["lora"]
    assert kept["read"] < kept["floor"] < kept["full"]
    assert kept["shira"] > kept["paca"]


def test_checkpointing_keeps_less(tiny_model: TinyModel) -> None:
    """For this package's methods and for PEFT's alike."""
    for method in ("paca", "lora", "full"):
        kept = [
            kept_by(c)
            for c in (contender_of(tiny_model("llama"), method, checkpointing=on, sequence=64) for on in (False, True))
        ]
        assert kept[1] < 0.7 * kept[0], method


# --- the longest sequence


@pytest.mark.parametrize("limit", (0, 1, 7, 8, 9, 63, 64, 65, 100, 1000))
@pytest.mark.parametrize("granule", (1, 8))
def test_bisection_is_a_linear_search(limit: int, granule: int) -> None:
    """It finds the largest multiple that fits, up to the end, without asking beyond it."""
    asked: list[int] = []
    found = longest.bisect(lambda n: (asked.append(n), n <= limit)[1], start=16, end=100, granule=granule)
    assert found == max((n for n in range(granule, 101, granule) if n <= limit), default=0)
    assert max(asked) <= 100
    assert len(asked) <= 12


@pytest.mark.parametrize("method", ("paca", "lora", "adapter"))
def test_the_longest_sequence_is_that_of_a_linear_search(method: str, tiny_model: TinyModel) -> None:
    """Predicted lengths: every length is tried, and the search finds the last that fits."""
    subject, (entry,) = subject_of(tiny_model("llama"), method, sequence=8)
    run = longest.prediction_run(subject)
    dry = longest._memory_subject(subject, entry, run)
    sizes = [predict(dry, type(run)(**{**vars(run), "sequence": n})).total for n in range(40, 72)]
    limit = sizes[13] + 1
    by_hand = 40 + max(n for n, size in enumerate(sizes) if size <= limit)
    assert longest.predicted(subject, entry, limit) == by_hand


@pytest.mark.slow
def test_bisection_over_real_steps(tiny_model: TinyModel) -> None:
    """The bytes that a step's operators hold at once are measured, at every length and by bisection."""
    subject, (entry,) = subject_of(tiny_model("llama"), "paca")
    contender = enter(subject, entry, build(subject))

    def size(tokens: int) -> int:
        spec = subject.spec.model_copy(update={"batch": 1, "sequence": tokens})
        live = LiveBytes(contender.model)
        with live.watching():
            contender.loss(draw(type(subject)(**{**vars(subject), "spec": spec}), 0)).backward()
        contender.model.zero_grad(set_to_none=True)
        return live.peak

    sizes = {tokens: size(tokens) for tokens in range(2, 24)}
    limit = sizes[15]
    found = longest.bisect(lambda n: sizes[n] <= limit, start=4, end=23)
    assert found == max(n for n, held in sizes.items() if held <= limit) == 15


@pytest.mark.parametrize(
    "method", ("floor", "paca", "read", "lora", "dora", "miss", "prompt", "adapter", "bitfit", "full")
)
def test_what_is_predicted(method: str, tiny_model: TinyModel) -> None:
    """Every method but SHiRA; prompt tuning's own positions are not the sequence's."""
    subject, (entry,) = subject_of(tiny_model("bert"), method, **CLASSES)
    assert longest.predicted(subject, entry, 1 << 30) == 128 - 4 * (method == "prompt")
    assert longest.predicted(subject, entry, 1 << 14) == 0


@pytest.mark.parametrize(("fit_bytes", "is_noted"), ((1 << 30, True), (1 << 14, False)))
def test_a_length_that_positions_bound_is_said_to_be_so(fit_bytes: int, is_noted: bool, tiny_model: TinyModel) -> None:
    """128 tokens in 1 GB are the model's end, not the memory's."""
    from surgery.bench.results import Row

    subject, (entry,) = subject_of(tiny_model("bert"), "paca", **CLASSES, fit_bytes=fit_bytes)
    row = Row(method=entry.name)
    longest.measure_longest(subject, entry, None, row)
    assert any("positions" in note for note in row.notes) is is_noted


def test_what_is_not_predicted_says_so(tiny_model: TinyModel) -> None:
    """SHiRA draws from weights."""
    from surgery.bench.results import Row

    subject, (entry,) = subject_of(tiny_model("llama"), "shira:r=2", fit_bytes=1 << 20)
    row = Row(method=entry.name)
    longest.measure_longest(subject, entry, None, row)
    assert (row.longest_tokens, row.longest_by) == (None, "")
    assert row.notes == ["the longest sequence is not predicted: shira draws its entries from real weights"]


# --- sizes


@pytest.mark.parametrize(("target", "expected"), ((0, 1), (10, 1), (14, 1), (16, 2), (95, 9), (96, 10), (1000, 40)))
def test_the_size_nearest_to_a_number_of_values(target: int, expected: int) -> None:
    """Where ten values belong to each, and more than 40 are refused."""

    def count(size: int) -> int:
        if size > 40:
            raise RequestError("x", "too large")
        return 10 * size

    assert nearest(count, target) == expected


def test_equal_values(tiny_model: TinyModel) -> None:
    """Each sized method comes as near to PaCA's values as its size allows; the difference is said."""
    spec = little(tiny_model("bert"), "paca", "lora", "read", "adapter", "prompt", "bitfit", equal="values", **CLASSES)
    subject = open_subject(spec)
    settled = settle(subject, parse_methods(spec.methods))
    counts = {entry.variant.name: count_values(subject, entry) for entry, _ in settled}
    notes = {entry.variant.name: text for entry, text in settled}
    assert counts["paca"] == 4 * 2 * (4 * 32 + 48 + 32)  # a masked language model has no pooler: that is new
    for name in ("lora", "read", "adapter", "prompt"):
        assert abs(counts[name] / counts["paca"] - 1) < 0.25, (name, counts)
        assert f"{counts[name]:,} values without heads" in notes[name][0]
        assert f"{counts[name] / counts['paca'] - 1:+.1%}" in notes[name][0]
    assert notes["bitfit"] == ["bitfit has no size to choose"]
    for name, entry in ((e.variant.name, e) for e, _ in settled if e.variant.name != "bitfit"):
        near = [
            count_values(subject, type(entry)(name, entry.variant, {entry.variant.size: s})) for s in _around(entry)
        ]
        assert min(abs(n - counts["paca"]) for n in near) >= abs(counts[name] - counts["paca"])


def _around(entry: Any) -> list[int]:
    size = entry.settings[entry.variant.size]
    return [n for n in (size - 1, size + 1) if n > 0]


def test_values_of_one_method(tiny_model: TinyModel) -> None:
    """`lora:values=paca:r=8` has about as many values as that; a number may stand there too."""
    subject, (lora, number) = subject_of(tiny_model("llama"), "lora:values=paca:r=8", "lora:values=3700")
    assert lora.settings["r"] == round(8 * OUT / (OUT + IN))
    assert number.settings["r"] == 4
    assert subject.spec.equal == "rank"


# --- names


def test_methods_with_settings_are_split() -> None:
    """A comma separates methods, unless a setting follows it."""
    texts = ["paca,read:cell=lstm,hidden=64,lora:values=paca:r=16", "full , floor"]
    assert split_methods(texts) == ["paca", "read:cell=lstm,hidden=64", "lora:values=paca:r=16", "full", "floor"]
    entries = parse_methods(["read:cell=lstm,hidden=64", "paca:r=4,alpha=2.5"])
    assert [dict(entry.settings) for entry in entries] == [{"cell": "lstm", "hidden": 64}, {"r": 4, "alpha": 2.5}]


@pytest.mark.parametrize(
    ("methods", "message"),
    (
        ("lorra", r"--methods: unknown name 'lorra', expected one of .* The closest is 'lora'"),
        ("paca,paca", "paca stands twice"),
        ("", "no method"),
        ("paca:rank=4", "the setting 'rank=4', expected one of r, alpha"),
        ("full:r=4", "the setting 'r=4', expected one of quantize"),
        ("paca:r=0", "r=0, expected a whole number from 1 on"),
        ("paca:r=x", "r=x, expected a whole number"),
        ("lora:r=4,values=paca", "r and values, expected one of the two"),
        ("lora:values=full", "values=full, expected a number, or a method that has a size"),
        ("lora:values=", "the setting 'values='"),
        ("read:cell=gro", "cell.*'gro'.* The closest is 'gru'"),
        ("paca:r=33", "33 for model"),
        ("lora:values=nothing", "unknown name 'nothing'"),
    ),
)
def test_a_method_that_cannot_be_meant(methods: str, message: str, tiny_model: TinyModel) -> None:
    """Is an error that names it, and what it could have been."""
    with pytest.raises(RequestError, match=message):
        subject_of(tiny_model("llama"), methods)


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is named with the command that installs it; methods without it go on."""
    monkeypatch.setitem(sys.modules, "peft", None)
    parse_methods(["paca", "read", "full", "bitfit", "adapter", "floor"])
    with pytest.raises(UnsupportedError, match=r"peft.* expected the extra lora.*checkpoint-surgery\[lora\]") as raised:
        parse_methods(["paca", "dora"])
    assert raised.value.exit_code == 5


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"equal": "size"}, "equal: 'size'"),
        ({"rounds": 1}, "rounds: 1, expected a number greater than or equal to 2"),
        ({"tune": "1e-3,1e-4"}, "--tune: given without --data"),
        ({"rates": ("1e-3",)}, "--lr: given without --data"),
        ({"data": ("a",), "rates": ("1e-3",), "tune": "1e-3,1e-4"}, "--tune: given with --lr"),
        ({"data": ("a",), "tune": "1e-3"}, "1 learning rate, expected two or more"),
        ({"data": ("a",), "rates": ("lora=1e-3",)}, "--lr: unknown name 'lora'"),
        ({"data": ("a",), "rates": ("paca=x",)}, "--lr: 'x', expected a number"),
        ({"data": ("a",), "rates": ("0",)}, "a learning rate of 0 or less"),
        ({"eval_data": ("a",)}, "given without --data"),
        ({"fit": "80 apples"}, "--fit: .*80 apples.*expected a size"),
        ({"data": ("a",), "task": "causal-lm", "metric": "accuracy"}, "--metric: unknown name 'accuracy'"),
        ({"dropout": 1.0}, "dropout: 1.0"),
    ),
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    """Or that another makes idle, are refused."""
    with pytest.raises(RequestError, match=message):
        read_spec("model", {"methods": ("paca",), **options})


def test_settings_are_those_of_the_data() -> None:
    """Of a recipe; the length is an option."""
    spec = read_spec("model", {"data": ("a",), "sequence": 64}, ("data.columns={text: a}", "max_rows=5"))
    assert spec.data is not None
    assert (spec.data.columns, spec.data.max_rows, spec.data.max_length) == ({"text": "a"}, 5, 64)
    for text, message in (
        ("train.max_steps=5", "settings of train"),
        ("max_length=5", "--sequence"),
        ("data.colums={}", "unknown key"),
    ):
        with pytest.raises(RequestError, match=message):
            read_spec("model", {"data": ("a",)}, (text,))


def test_a_file_of_settings(tmp_path: Path) -> None:
    """Its keys are a specification's; paths that exist beside it are meant; options overrule it."""
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "bench.yaml").write_text(
        "model: somewhere\nmethods: [paca, 'lora:r=4']\nrank: 8\ndata: {train: [train.txt]}\n", encoding="utf-8"
    )
    spec = read_spec(str(tmp_path / "bench.yaml"), {"rank": 2})
    assert (spec.model, spec.rank, spec.methods) == ("somewhere", 2, ["paca", "lora:r=4"])
    assert spec.data is not None
    assert spec.data.train == [str(tmp_path / "train.txt")]
    (tmp_path / "bench.yaml").write_text("model: x\nmethod: [paca]\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"unknown key 'method'.*The closest is 'methods'"):
        read_spec(str(tmp_path / "bench.yaml"), {})


# --- time and energy


def test_all_take_turns_on_the_same_batches() -> None:
    """Every round has each method once on one batch, in an order that changes; warm-up is not counted."""
    calls: list[tuple[str, int]] = []
    functions = {name: lambda batch, n=name: calls.append((n, batch)) for name in "abc"}
    seconds = take_turns(functions, range(12), warmup=2)  # type: ignore[arg-type]
    rounds = [calls[3 * n : 3 * n + 3] for n in range(12)]
    assert all(sorted(name for name, _ in one) == ["a", "b", "c"] for one in rounds)
    assert all({batch for _, batch in one} == {n} for n, one in enumerate(rounds))
    assert len({"".join(name for name, _ in one) for one in rounds}) > 1
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 10)


def test_what_is_not_the_step_is_not_timed() -> None:
    """Making batches takes as long as it likes."""

    def batches() -> Any:
        for _ in range(4):
            time.sleep(0.05)
            yield {}

    assert max(take_turns({"a": lambda _batch: None}, batches(), warmup=1)["a"]) < 0.02


def test_a_planted_slow_down_is_seen() -> None:
    """Ten per cent more time is 10 +- 3 %."""
    from surgery.bench.results import ratios

    functions = {"plain": lambda _batch: time.sleep(0.02), "slow": lambda _batch: time.sleep(0.022)}
    seconds = take_turns(functions, [{}] * 25, warmup=2)
    assert ratios(seconds["slow"], seconds["plain"])[0] == pytest.approx(1.10, abs=0.03)


@pytest.mark.long
def test_a_planted_slow_down_of_a_method_is_seen(tiny_model: TinyModel) -> None:
    """One of two equal methods works a tenth longer than its step took: the ratio of the two says so."""
    from surgery.bench.results import ratios

    wide = tiny_model("llama", overrides={"hidden_size": 256, "intermediate_size": 512})
    subject, (entry,) = subject_of(wide, "paca", batch=4, sequence=64)
    plain, slow = (enter(subject, entry, build(subject)) for _ in range(2))

    def slower(batch: Any) -> None:
        started = time.perf_counter()
        slow.step(batch)
        end = time.perf_counter() + 0.1 * (time.perf_counter() - started)
        while time.perf_counter() < end:
            pass

    batches = Feed(subject, None).batches(0, 105)
    seconds = take_turns({"plain": plain.step, "slow": slower}, batches, warmup=5)
    assert ratios(seconds["slow"], seconds["plain"])[0] == pytest.approx(1.10, abs=0.03)


def test_energy_is_read_from_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joules between two readings, over the steps between them; a counter that began anew is put right."""
    monkeypatch.setattr("surgery.bench.measure.ENERGY_SECONDS", 0.02)
    steps: list[int] = []
    meter = Meter("test", lambda: 5.0 * len(steps))
    assert joules(lambda _batch: steps.append(1), {}, meter, device="cpu") == pytest.approx(5.0)
    assert Meter("x", lambda: 0.0, wraps_at=100.0).used(90.0, 15.0) == 25.0


def test_rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages' counters are summed, not those of their parts; where there is none, or it may not be read: why."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.open_meter("cpu") == "this CPU offers no RAPL counter"
    for name, value in (("intel-rapl:0", 3_000_000), ("intel-rapl:1", 4_000_000), ("intel-rapl:0:0", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("50000000\n")
    meter = energy.open_meter("cpu")
    assert isinstance(meter, Meter)
    assert (meter.name, meter.read(), meter.wraps_at) == ("rapl", 7.0, 100.0)
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("none")
    assert str(energy.open_meter("cpu")).startswith("the RAPL counters cannot be read")


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counter has millijoules; without it, or without the package, the reason is said."""
    import pynvml

    class Properties:
        uuid = "abc"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _number: Properties())
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: {"GPU-abc": 2500}[handle])
    meter = energy.open_meter("cuda")
    assert isinstance(meter, Meter)
    assert (meter.name, meter.read()) == ("nvml", 2.5)

    def refuse(_handle: Any) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    assert "NVML has no energy counter for this device" in str(energy.open_meter("cuda"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "checkpoint-surgery[energy]" in str(energy.open_meter("cuda"))


# --- learning


@pytest.mark.parametrize("method", sorted(set(VARIANTS) - {"floor", "bitfit"}))
def test_each_falls_in_loss_on_a_real_model(method: str, shared_data: Path, tmp_path: Path) -> None:
    """stories260K on Shakespeare, a few steps: the loss of the last is below that of the first."""
    text = tmp_path / "text.txt"
    text.write_text((shared_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000])
    data = {"train": [str(text)], "eval": [str(text)], "max_length": 64}
    rate = {"full": 2e-3, "prompt": 1e-1, "shira": 1e-2}.get(method, 1e-2)
    subject, (entry,) = subject_of(
        shared_data / "models" / "stories260K", method, data=data, learning_rates={"*": rate}, batch=4, sequence=64
    )
    feed = open_feed(subject)
    learnt = learn(subject, entry, feed, build(subject), rate=rate, seed=0, steps=16)
    assert sum(learnt.losses[-4:]) / 4 < sum(learnt.losses[:4]) / 4 - 0.1
    assert learnt.scores["loss"] < learnt.losses[0]
    assert 0 < learnt.scores["token_accuracy"] < 1
    assert all(map(math.isfinite, learnt.losses))


def test_bitfit_falls_in_loss(tiny_model: TinyModel, tmp_path: Path) -> None:
    """On a model that has biases."""
    data = text_data(tmp_path)
    subject, (entry,) = subject_of(tiny_model("gpt2"), "bitfit", data=data, learning_rates={"*": 1e-2})
    learnt = learn(subject, entry, open_feed(subject), build(subject), rate=3e-2, seed=0, steps=12)
    assert learnt.losses[-1] < learnt.losses[0] - 0.1


def test_a_model_without_weights_is_drawn(tiny_model: TinyModel, tmp_path: Path) -> None:
    """config.json alone is enough for costs; the dtype is the one asked for."""
    (tmp_path / "config.json").write_text((tiny_model("llama") / "config.json").read_text())
    subject, (entry,) = subject_of(tmp_path, "paca", dtype="bf16")
    assert not subject.has_weights
    contender = enter(subject, entry, build(subject))
    assert contender.model.dtype == DTYPES["bf16"]
    assert torch.isfinite(contender.step(draw(subject, 0)))
    assert json.loads(json.dumps(subject.spec.plain()))["dtype"] == "bf16"


def test_too_long_a_sequence(tiny_model: TinyModel) -> None:
    """Is refused before it is run."""
    subject, _ = subject_of(tiny_model("bert"), "paca", sequence=129, **CLASSES)
    with pytest.raises(SurgeryError, match="--sequence: 129 tokens, expected at most 128"):
        open_feed(subject)
