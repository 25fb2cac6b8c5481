"""Gaudi, through optimum-habana: the only module that names it.

Importing the vendor's packages changes transformers for the whole process and for good, so nothing here imports them
before a run asks for the device, and `surgery train` gives such a run processes of its own.

What differs from transformers' own Trainer, and is put right here: the loss of a part of a batch is not divided by the
number of parts; every default that optimum-habana changes is set; the evaluation keeps its last, smaller batch; rows
beyond a sliding window, which optimum-habana's models pass over, are refused.

Off, for reasons: HPU graphs, which replay a forward without the Python in it that refreshes PaCA's columns; the fused
AdamW and the fused clipping of gradients, which give every parameter the first one's dtype.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from surgery.backends import Backend, shared_arguments
from surgery.errors import RequestError, SurgeryError, UnsupportedError
from surgery.ranks import FOLLOWED, RankError, launching, say_why

if TYPE_CHECKING:
    from surgery.recipe import TrainSection

LAZY_MODE = "PT_HPU_LAZY_MODE"
MODES = {"lazy": "1", "eager": "0", "compile": "0"}  # the variable's value, read once: when torch is first imported
PLUGIN, PACKAGE = "habana-torch-plugin", "optimum-habana"
# Validated by their makers: optimum-habana -> the Gaudi software (its plugin for torch), and the releases of torch.
FITTING: Mapping[str, tuple[str, tuple[str, ...]]] = {"1.20": ("1.23", ("2.9",)), "1.21": ("1.24", ("2.10", "2.11"))}
SUPPORT = "optimum-habana's support ended on 2026-10-31"
TRANSFORMERS = ">=4.55,<4.56"
PINNED = "pip install -c with a line `torch==` that names the version you have (README, Gaudi)"


@dataclass(frozen=True)
class Installation:
    """Versions of what a Gaudi needs, empty where something is not installed."""

    plugin: str
    package: str
    torch: str
    transformers: str

    @classmethod
    def here(cls) -> Installation:
        """What is installed, by its metadata: nothing is imported."""
        return cls(*map(_installed, (PLUGIN, PACKAGE, "torch", "transformers")))


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def shortcomings(found: Installation) -> list[UnsupportedError]:
    """What is missing, or does not fit together, the first cause first. Empty: training can start."""
    problems = []
    if not found.plugin:
        fix = "It comes with Intel's Gaudi software and from no package index; train with --device cpu or cuda"
        problems.append(_error(f"{PLUGIN} is not installed", "the Gaudi software and its plugin for torch", fix))
    if _series(found.package) not in FITTING:
        what = f"{PACKAGE} {found.package}" if found.package else f"{PACKAGE} is not installed"
        fix = f"Install {PACKAGE}==1.21.2 in an environment of its own: {PINNED}"
        problems.append(_error(what, f"{PACKAGE} {' or '.join(FITTING)}", fix))
    if found.plugin:
        problems += _torch_shortcomings(found)
    if found.plugin and not problems:
        problems += _pair_shortcomings(found)
    if found.package and not SpecifierSet(TRANSFORMERS).contains(found.transformers or "0", prereleases=True):
        what = f"transformers {found.transformers}" if found.transformers else "transformers is not installed"
        fix = f"pip install 'transformers{TRANSFORMERS}', in an environment of its own"
        problems.append(_error(what, f"transformers {TRANSFORMERS}", fix))
    return problems


def _error(found: str, expected: str, fix: str) -> UnsupportedError:
    return UnsupportedError("--device hpu", found, expected=expected, fix=fix)


def _torch_shortcomings(found: Installation) -> list[UnsupportedError]:
    """The vendor's builds have a local version such as `+hpu.1.24.0.695`; any other was put over them, as by pip."""
    software = _series(found.plugin)
    local = found.torch.partition("+")[2].replace("_", ".").replace("-", ".")
    if not local.startswith("hpu."):
        fix = f"pip has replaced it: install the Gaudi software's torch again, then everything else by {PINNED}"
        what = f"torch {found.torch}" if found.torch else "torch is not installed"
        return [_error(what, f"the build that came with {PLUGIN} {found.plugin}", fix)]
    if not local.startswith(f"hpu.{software}."):
        what, fix = f"torch {found.torch} beside {PLUGIN} {found.plugin}", "Install both from one Gaudi software"
        return [_error(what, f"a torch of the Gaudi software {software}", fix)]
    return []


def _pair_shortcomings(found: Installation) -> list[UnsupportedError]:
    """What the makers of optimum-habana did not validate together."""
    software, torches = FITTING[_series(found.package)]
    if _series(found.plugin) != software:
        other = next((name for name, (fitting, _) in FITTING.items() if fitting == _series(found.plugin)), "")
        fix = f"Install {PACKAGE} {other}" if other else f"Install the Gaudi software {software}"
        what = f"{PLUGIN} {found.plugin} with {PACKAGE} {found.package}"
        return [_error(what, f"{PLUGIN} {software}", fix)]
    if _series(found.torch) not in torches:
        what, fix = f"torch {found.torch} with {PACKAGE} {found.package}", "Install the Gaudi software that fits"
        return [_error(what, f"torch {' or '.join(torches)}", fix)]
    return []


def _series(version: str) -> str:
    """`1.24` of `1.24.0.695`; empty for what is no version."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return ""
    return f"{parsed.major}.{parsed.minor}"


# --- the device


def choose_device(wanted: str) -> str:
    """`hpu`, where versions fit, a mode was set in time and there is a device. Raises: UnsupportedError."""
    problems = shortcomings(Installation.here())
    if problems:
        raise problems[0]
    if LAZY_MODE not in os.environ:
        raise _unset("lazy")
    with contextlib.redirect_stdout(sys.stderr):  # both packages print remarks when they are imported
        import habana_frameworks.torch.distributed.hccl  # noqa: F401  gives torch.distributed that backend
        import habana_frameworks.torch.hpu as device
    if not device.is_available():
        found = f"{PLUGIN} is installed, but sees no device"
        raise _error(found, "a Gaudi", "Look at hl-smi: the driver may be missing, or every card in use")
    return wanted


def prepare() -> None:
    """Make transformers' classes the vendor's, for good. Plans are made before: some of these cannot be traced."""
    with contextlib.redirect_stdout(sys.stderr):
        from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

        from surgery.compat import forget_replaced_classes

        adapt_transformers_to_gaudi()
    forget_replaced_classes()


def environment(section: TrainSection) -> dict[str, str]:
    """The variables that have to be set before torch is imported, and are not. Raises: UnsupportedError."""
    problems = shortcomings(Installation.here())
    if problems:
        raise problems[0]
    if LAZY_MODE not in os.environ:
        return {LAZY_MODE: MODES[section.hpu_mode]}
    require_mode(section.hpu_mode)
    return {}


def require_mode(mode: str) -> None:
    """The environment holds the mode that is asked for. Raises: UnsupportedError."""
    found, wanted = os.environ.get(LAZY_MODE), MODES[mode]
    if found == wanted:
        return
    if found is None:
        raise _unset(mode)
    fitting = "lazy" if found == MODES["lazy"] else "eager or compile"
    raise UnsupportedError(
        "train.hpu_mode",
        f"{mode} with {LAZY_MODE}={found} in the environment",
        expected=f"{LAZY_MODE}={wanted}",
        fix=f"Unset it, or train with hpu_mode={fitting}",
    )


def _unset(mode: str) -> UnsupportedError:
    fix = f"Set {LAZY_MODE}={MODES[mode]} before Python starts; `surgery train` and `surgery run` do it themselves"
    return UnsupportedError(LAZY_MODE, "not set", expected=f"{MODES[mode]} for hpu_mode={mode}", fix=fix)


def peak_memory_bytes(_device: str) -> int:
    """The peak of the device's allocator."""
    import habana_frameworks.torch.hpu as device

    return int(device.max_memory_allocated())


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m surgery.train *arguments`, one process a card. Returns the exit code.

    DistributedRunner puts a shell's line together and prints it: arguments are quoted, and standard output stays ours.
    The error that a process ended with first is said once, here. Raises: RequestError, UnsupportedError.
    """
    if "--" in arguments:
        found = f"{shlex.join(arguments[arguments.index('--') + 1 :])!r} after `--`"
        fix = "For another launcher start `python -m surgery.train` with it"
        raise UnsupportedError("train", found, expected="none on hpu, where DistributedRunner launches", fix=fix)
    problems = shortcomings(Installation.here())
    if problems:
        raise problems[0]
    _require_cards(processes)
    from optimum.habana.distributed import DistributedRunner

    with launching(processes) as folder:
        page = folder / "launcher.txt"
        with contextlib.redirect_stdout(sys.stderr), _waiting():
            runner = DistributedRunner(command_list=[_command(arguments, processes, page)], world_size=processes)
            code = runner.run()
        if not code:
            return 0
        if page.is_file() and not any(folder.glob("*.json")):
            sys.stderr.write(page.read_text(encoding="utf-8", errors="replace"))  # no process of ours has said why
        error = SurgeryError("train", f"the launcher ended with exit code {code}", fix="Go on with --resume auto")
        return say_why(folder, RankError(0, 0.0, error.exit_code, str(error), FOLLOWED))


def _require_cards(processes: int) -> None:
    """Each process has a card. Raises: RequestError."""
    with contextlib.redirect_stdout(sys.stderr):
        import habana_frameworks.torch.hpu as device
    cards = device.device_count()
    if processes > cards:
        raise RequestError("--nproc", str(processes), expected=f"at most {cards}, as this machine has {cards} Gaudis")


def _command(arguments: Sequence[str], processes: int, page: Path) -> str:
    """The end of DistributedRunner's line, which begins with Python and, of several processes, with torchrun.

    Torchrun's own standard error, a page about a child that failed, goes into a file; its children find ours as their
    standard input.
    """
    own = ["-m", "surgery.train", *arguments]
    if processes == 1:
        return shlex.join(own)
    child = ["--no-python", "bash", "-c", 'exec "$@" 2>&0 </dev/null', "rank", sys.executable, "-u", *own]
    return f"{shlex.join(child)} 0>&2 2>{shlex.quote(str(page))}"


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """SIGTERM goes on to what is launched meanwhile, which ends its step and saves; Ctrl-C gets there by itself.

    Nothing is logged: DistributedRunner warns of a single device, and repeats its line when a process fails.
    """

    def hand_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
            for child in psutil.Process().children():
                for launched in child.children() if child.name() == "bash" else [child]:  # the shell may stay between
                    launched.send_signal(number)

    def wait(_number: int, _frame: FrameType | None) -> None:
        """Go on waiting for the end."""

    earlier = {number: signal.signal(number, how) for number, how in ((signal.SIGTERM, hand_on), (signal.SIGINT, wait))}
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in earlier.items():
            signal.signal(number, handler)


# --- training


def trainer_class() -> Any:
    """GaudiTrainer with what its loss and its evaluation need."""
    from optimum.habana import GaudiConfig, GaudiTrainer

    class Trainer(GaudiTrainer):  # type: ignore[misc]
        def __init__(self, model: Any, args: Any, **rest: Any) -> None:
            config = GaudiConfig(
                use_torch_autocast=False,  # `bf16` of the arguments decides
                use_fused_adam=False,
                use_fused_clip_norm=False,
                use_dynamic_shapes=False,
            )
            _require_window(model, rest["train_dataset"])
            super().__init__(model=model, args=args, gaudi_config=config, **rest)
            self.model_accepts_loss_kwargs = True  # so that a batch's items are counted; no model is given the number

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,  # noqa: FBT001, FBT002  transformers' signature
            num_items_in_batch: Any = None,
        ) -> Any:
            labels = inputs.get("labels")
            result = super().compute_loss(model, inputs, return_outputs)
            if not model.training:
                return result
            share = self._share(labels, num_items_in_batch)
            return (result[0] * share, result[1]) if return_outputs else result * share

        def _share(self, labels: Any, items: Any) -> Any:
            """What a part's mean loss counts for in its batch, which GaudiTrainer leaves at one."""
            if items is None:
                return 1 / self.current_gradient_accumulation_steps
            share = labels[:, 1:].ne(-100).sum() / items  # transformers counts the first token, which none predicts
            return share * self.accelerator.num_processes if self.args.average_tokens_across_devices else share

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
            try:
                return super().get_eval_dataloader(eval_dataset)
            finally:
                self.args.dataloader_drop_last = drops

    return Trainer


def _require_window(model: Any, rows: Any) -> None:
    """No row is longer than a sliding window, which optimum-habana's models pass over. Raises: UnsupportedError."""
    window = model.config.to_dict().get("sliding_window")
    if not window or not type(model).__module__.startswith("optimum."):
        return
    import pyarrow.compute

    longest = pyarrow.compute.max(pyarrow.compute.list_value_length(rows.data.column("input_ids"))).as_py()
    if longest > window:
        found = (
            f"rows of {longest} tokens for {type(model).__name__}, whose attention passes over the window of {window}"
        )
        fix = f"Set data.max_length={window}, or train on another device"
        raise UnsupportedError("data.max_length", found, expected=f"at most {window} on hpu", fix=fix)


def training_arguments(
    section: TrainSection, *, folder: Path, device: str, autocast: str, steps: int, has_eval: bool
) -> Any:
    """GaudiTrainingArguments with everything that matters set: several of its defaults are not transformers'.

    `autocast`: fp32 (none) or bf16. `steps`: of the whole run.
    Raises: UnsupportedError.
    """
    require_mode(section.hpu_mode)
    from optimum.habana import GaudiTrainingArguments

    arguments = GaudiTrainingArguments(
        use_habana=True,
        use_cpu=False,
        gaudi_config_name=None,
        use_lazy_mode=section.hpu_mode == "lazy",
        torch_compile=section.hpu_mode == "compile",
        torch_compile_backend="hpu_backend" if section.hpu_mode == "compile" else None,
        compile_dynamic=False if section.hpu_mode == "compile" else None,
        use_hpu_graphs_for_training=False,
        use_hpu_graphs_for_inference=False,
        pipelining_fwd_bwd=False,  # it divides the loss itself, and only then
        throughput_warmup_steps=min(section.hpu_warmup_steps, steps - 1),
        adjust_throughput=False,
        non_blocking_data_copy=False,
        distribution_strategy="ddp",
        ddp_broadcast_buffers=False,  # the column indices are equal on every rank, and constant
        ddp_bucket_cap_mb=230,
        attn_implementation="eager",
        optim="adamw_torch",
        bf16=autocast == "bf16",
        half_precision_backend="hpu_amp",
        save_safetensors=True,
        gradient_checkpointing=section.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if section.gradient_checkpointing else None,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
        **shared_arguments(section, folder=folder, steps=steps, has_eval=has_eval),
    )
    if arguments.device.type != device:  # optimum-habana itself trains wherever accelerate finds a device
        raise _error(f"training would run on {arguments.device}", "a Gaudi", "See `surgery doctor`")
    arguments.accelerator_config.even_batches = True  # no rank may run out of batches to evaluate before the others
    return arguments


BACKEND = Backend(
    "gaudi",
    ("hpu",),
    choose_device,
    trainer_class,
    training_arguments,
    peak_memory_bytes,
    launch,
    environment,
    prepare,
    static_shapes=True,
    spends_process=True,
)
