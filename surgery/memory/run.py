"""What is to be run, on how many devices, and how these divide a run's tensors."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.combinations import facts
from surgery.combinations import require as require_together
from surgery.errors import RequestError, require_known
from surgery.memory.step import DTYPES

FULL, LORA = "full", "lora"
METHODS = ("paca", "read", LORA, FULL)


@dataclass(frozen=True)
class Sharding:
    """How a run's tensors are divided among its devices.

    weights, gradients, optimizer: each device holds its part. buckets: gradients are copied into buckets to be summed.
    master: the optimizer keeps an fp32 copy of what trains. gathers: a layer's weights are put together to run it.
    offloaded: the parts that `cpu_offload` keeps in the CPU's memory.
    """

    name: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    buckets: bool = False
    master: bool = False
    gathers: bool = False
    offloaded: tuple[str, ...] = ()


STATE = ("weights", "columns", "gradients", "optimizer")
SHARDINGS = {
    sharding.name: sharding
    for sharding in (
        Sharding("none"),
        Sharding("ddp", buckets=True),
        Sharding("fsdp2", weights=True, gradients=True, optimizer=True, gathers=True, offloaded=STATE),
        Sharding("zero2", gradients=True, optimizer=True, master=True, offloaded=("gradients", "optimizer")),
        Sharding("zero3", weights=True, gradients=True, optimizer=True, master=True, gathers=True, offloaded=STATE),
    )
}


@dataclass(frozen=True)
class Run:
    """What is to be run, on how many devices.

    batch: sequences of one forward on each device; target: tokens of an encoder-decoder's output, 0 for as many as of
    its input; dtype: of the weights, fp32, bf16, fp16 or empty for the checkpoint's own; precision: of the computation,
    as in a recipe; padded: rows differ in length; attention, cpu_offload: as in a recipe; lean: off, on, or auto for
    what can be lean, if anything, in a run of the size that gains by it.
    """

    batch: int = 8
    sequence: int = 1024
    target: int = 0
    padded: bool = False
    dtype: str = ""
    precision: str = "auto"
    device: str = "cpu"
    devices: int = 1
    sharding: str = ""
    checkpointing: bool = False
    attention: str = "auto"
    cpu_offload: bool = False
    lean: str = "off"

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "devices"):
            if getattr(self, name) < 1:
                raise RequestError(f"--{name}", str(getattr(self, name)), expected="at least 1")
        if self.target < 0:
            raise RequestError("--target-sequence", str(self.target), expected="at least 1")
        for option, found, known in (
            ("--dtype", self.dtype, ("", *DTYPES)),
            ("--precision", self.precision, ("auto", *DTYPES)),
            ("--device", self.device, ("cpu", "cuda")),
            ("--sharding", self.sharding, ("", *SHARDINGS)),
            ("--lean", self.lean, ("off", "on", "auto")),
        ):
            if found or "" not in known:
                require_known(option, found, [name for name in known if name])
        if not self.sharding:
            object.__setattr__(self, "sharding", "none" if self.devices == 1 else "ddp")
        if (self.sharding == "none") != (self.devices == 1):
            many = ", ".join(name for name in SHARDINGS if name != "none")
            expected = "more than one" if self.devices == 1 else f"one of {many}"
            found = f"{self.sharding} with {self.devices} device{'s' * (self.devices > 1)}"
            fix = "Say with --devices how many there are" if self.devices == 1 else ""
            raise RequestError("--sharding", found, expected=expected, fix=fix)
        offload = {"train.cpu_offload": self.cpu_offload}
        require_together(facts({"train.attention": self.attention, "train.device": self.device, **offload}))
        require_together(facts({"train.strategy": self.sharding, **offload}))  # whatever the device: it is only planned
