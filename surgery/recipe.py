"""What a recipe may say: one whole run, section by section, each value checked.

It is read from its file by recipe_file.py; what may be changed in it, and how, is in recipe_variants.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from surgery.columns import FILE, STRATEGIES, takes_data
from surgery.combinations import Request, Said, facts, of_section
from surgery.data_spec import DataSpec
from surgery.errors import RecipeError
from surgery.lookup import METHODS
from surgery.lookup import load as lookup
from surgery.planning import make_spec
from surgery.survey import TaskSpec


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PacaSection(_Section):
    """What PaCA does; see `PacaSpec`."""

    rank: int = Field(16, ge=1, description="trained input columns of each layer")
    targets: list[str] = Field(
        ["all-linear"], description="names, globs, re: patterns, all-linear, all-conv or experts"
    )
    exclude: list[str] = Field([], description="patterns of layers to leave out")
    rank_pattern: dict[str, int] = Field({}, description="rank by pattern; the last match decides")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / rank while training")
    select: str = Field("random", description=f"{', '.join(STRATEGIES)} or {FILE}PATH")
    seed: int = Field(0, ge=0, description="decides the columns that are random, and rows to choose others by")
    quantize: str = Field("", description="hold the frozen base as nf4, nf4-double, fp4, fp4-double, int8, ..")
    rows: list[int | str] = Field([], description="tokens, or numbers, whose rows of the input embedding train")
    experts: str = Field("shared", description="columns of a mixture's experts: shared by all, or each its own")
    budget: int | str = Field("", description="so many values, or a part of the targets' such as 0.5%, for a rank")
    resample: str = Field("", description="every:500: draw other columns every so many steps")
    calibration_data: list[str] = Field([], description="to choose columns by; data.train where not given")
    calibration_columns: dict[str, str] = Field({}, description="role: column name; those of data where not given")
    calibration_rows: int = Field(64, ge=1, description="rows to choose columns by, drawn by the seed")
    calibration_length: int = Field(512, ge=2, description="tokens of each at most")


def _layers(value: object) -> object:
    """`3` and `[0, 3]` as the text that they stand for."""
    numbers = value if isinstance(value, list) else [value]
    is_numbers = bool(numbers) and all(type(number) is int for number in numbers)
    return ",".join(map(str, numbers)) if is_numbers else value


class ReadSection(_Section):
    """What READ does; see `ReadSpec`."""

    cell: str = Field("gru", description="gru, lstm or rnn")
    hidden: int = Field(256, ge=1, description="width of the side network")
    recurrent_layers: int = Field(1, ge=1, description="recurrent layers on each other")
    bidirectional: bool = Field(default=False, description="run over the layers both ways")
    initial: str = Field("zero", description="first state: zero or (projected) embedding")
    reduce: str = Field("last", description="last state over the layers, or their mean")
    output_norm: bool = Field(default=False, description="RMS norm of the correction")
    scale: float = Field(1.0, gt=0, description="factor of the correction")
    layers: Annotated[str, BeforeValidator(_layers)] = Field(
        "all", description="all, every:2, last:6 or numbers such as 0,3,5"
    )
    stacks: str = Field("both", description="encoder, decoder or both, of an encoder-decoder")
    joiner: str = Field("auto", description="attention, mean or none, from encoder to decoder")
    pooling: str = Field("own", description="first, mean or last state for a classifier; own: as its class picks it")
    seed: int = Field(0, ge=0, description="decides what the side network starts from")


class DataSection(_Section):
    """Which data and how they become batches; see `DataSpec`."""

    train: list[str] = Field([], description="files or hub ids")
    eval: list[str] = Field([], description="files or hub ids held out for evaluation")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="part of the training rows to hold out")
    format: str = Field("auto", description="messages, prompt-completion, alpaca, sharegpt, text, pair, ..")
    columns: dict[str, str] = Field({}, description="role: column name (or its number where there is no header)")
    max_length: int = Field(1024, ge=2, description="tokens")
    packing: bool = Field(default=True, description="join text and cut it to blocks of max_length")
    pack_examples: bool = Field(default=False, description="pack prompts with completions and conversations as well")
    max_rows: int | None = Field(None, ge=1, description="use only the first rows")
    horizontal_flip: bool = Field(default=False, description="images: half of them, drawn anew, left for right")
    seed: int = Field(0, ge=0, description="decides which rows eval_fraction holds out")

    def spec(self) -> DataSpec:
        """The data module's own record. Raises DataError."""
        return DataSpec(**{**self.model_dump(), "train": tuple(self.train), "eval": tuple(self.eval)})


def _switch(value: object) -> object:
    """YAML reads a bare `on` as true."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _several(value: object) -> object:
    """One name stands for a list of it."""
    return [value] if isinstance(value, str) else value


class TrainSection(_Section):
    """How to train. Steps are optimizer steps."""

    learning_rate: float = Field(1e-3, gt=0)
    max_steps: int | None = Field(None, ge=1, description="overrules epochs")
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1, description="examples of one forward, on each device")
    gradient_accumulation: int = Field(1, ge=1, description="forwards before each optimizer step")
    eval_batch_size: int | None = Field(None, ge=1, description="batch_size where not given")
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="part of the steps, in place of warmup_steps")
    weight_decay: float = Field(0.0, ge=0, description="pulls the columns towards the pretrained ones")
    max_grad_norm: float = Field(1.0, gt=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    seed: int = Field(0, ge=0, description="order of the data and dropout")
    device: Literal["auto", "cpu", "cuda", "hpu"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on hpu and on CUDA, or fp16 where that has none"
    )
    tf32: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="products of fp32 in TF32; auto: beside 16 bits only"
    )
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = Field(
        "auto", description="auto: flash where flash-attn, model and 16 bits allow, uncompiled; else the model's own"
    )
    compile: bool = Field(default=False, description="torch.compile the model")
    liger: bool = Field(default=False, description="Liger's Triton kernels, on CUDA")
    lean: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="norms, gated MLPs and the loss keep the least for backward; auto: on the CPU, uncompiled"
    )
    gradient_checkpointing: bool = False
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1, description="evaluate every so many steps; at the end in any case")
    eval_on_start: bool = Field(default=True, description="evaluate the untrained model first")
    save_steps: int | None = Field(None, ge=1, description="checkpoint every so many steps; default a tenth")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept")
    early_stopping_patience: int | None = Field(None, ge=1, description="evaluations without improvement")
    metric_for_best: str = Field("loss", description="what early stopping looks at: loss, accuracy, f1, ..")
    cache_features: str | None = Field(None, description="READ: folder for the backbone's states of the training set")
    cache_bytes: str | None = Field(None, description="READ: what the states may take, for example 20GB")
    threads: int | None = Field(None, ge=1, description="torch's threads on the CPU")
    hpu_mode: Literal["lazy", "eager", "compile"] = Field("lazy", description="Gaudi: how operators reach the device")
    hpu_warmup_steps: int = Field(3, ge=0, description="Gaudi: first steps, which compile, left out of the throughput")
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = Field("ddp", description="how several processes share work")
    cpu_offload: bool = Field(default=False, description="fsdp2, zero2, zero3: keep shards in the CPU's memory")
    report_to: Annotated[list[Literal["tensorboard", "trackio"]], BeforeValidator(_several)] = Field(
        [], description="log to these as well, on this machine"
    )


class ExportSection(_Section):
    """What to write in the end."""

    out: str | None = Field(None, description="folder; the adapter's name with -merged if not given")
    format: str = "safetensors"
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    max_shard_size: str | None = Field(None, description="for example 5GB; the base's own files if not given")
    merge_base: Literal["original", "dequantized"] | None = Field(
        None, description="of a quantized base: what the columns are written into; original if not given"
    )
    verify: bool = True


class Recipe(_Section):
    """A whole run. Relative paths are relative to the recipe's folder."""

    model: str = Field(description="folder or hub id; tiny:llama, tiny:t5 or tiny:vit: a random one, made in code")
    adapter: str | None = Field(None, description="folder; the model's name with -paca if not given")
    method: str = "paca"
    task: str = Field("", description="what the checkpoint's own architecture does, if not given")
    labels: list[str] = Field([], description="class names; read from the data if not given")
    paca: PacaSection = PacaSection()
    read: ReadSection = ReadSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    variants: dict[str, dict[str, Any]] = Field({}, description="changes by name, of which variant=NAME makes one")
    smoke: dict[str, Any] = Field({}, description="changes that smoke=true makes: a tiny model, a few rows")

    def spec(self) -> Any:
        """The method's own record. Raises: RequestError; RecipeError for settings of a method that is not chosen."""
        lookup(METHODS, self.method, "method")
        sections: dict[str, BaseModel] = {"paca": self.paca, "read": self.read}
        for name, section in sections.items():
            if name != self.method and section.model_fields_set:
                found = f"settings of {name} ({', '.join(sorted(section.model_fields_set))}), and method {self.method}"
                raise RecipeError("recipe", found, expected=f"the settings of {self.method}", fix=f"Set method: {name}")
        settings = sections[self.method].model_dump()
        if self.method == "paca" and takes_data(self.paca.select) and not self.paca.calibration_data:
            settings |= {"calibration_data": self.data.train, "calibration_columns": self.data.columns}
        return make_spec(self.method, settings, "")

    def task_spec(self) -> TaskSpec:
        """The task as the surgery takes it. Raises RequestError."""
        return TaskSpec(self.task, tuple(self.labels))


def asked_of(recipe: Recipe) -> Request:
    """What a recipe asks for, as the table of combinations has it."""
    parts = {**of_section("train", recipe.train), **of_section("export", recipe.export)}
    whole = facts({"method": recipe.method, "task": recipe.task, "export.format": recipe.export.format})
    if recipe.method != "paca":
        return {**parts, **whole}
    columns = of_section("paca", recipe.paca)
    rank = Said(recipe.paca.rank, "rank" in recipe.paca.model_fields_set)
    return {**parts, **whole, **columns, "paca.rank": rank, **facts({"held": recipe.paca.quantize})}
