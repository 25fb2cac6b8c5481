"""What PEFT calls things in an adapter folder: files, keys and fields that are its own, and no one else's.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors`. A tensor's key is `base_model.model.`,
the module's dotted path in the task's class, and the parameter's name; what is trained whole stands under its own name.

PaCA (PEFT 0.22): `<module>.paca_delta` (out, r), added to the columns after multiplying by paca_alpha / r, and
`<module>.paca_indices` (r,) int64; r and paca_alpha hold for all layers. Source: PEFT, src/peft/tuners/paca and
src/peft/utils/save_and_load.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.plan import SurgeryPlan

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")
PREFIX = "base_model.model."
PACA = "PACA"
DELTA, INDICES = ".paca_delta", ".paca_indices"
ALL_LINEAR = "all-linear"
TASK_TYPES: Mapping[str, str] = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
TASKS: Mapping[str, str] = {"FEATURE_EXTRACTION": "features"} | {
    theirs: ours for ours, theirs in TASK_TYPES.items() if ours != "regression"
}
OWN_HEADS = ("classifier", "score")  # PEFT's classes for classification take these whole, whatever the config says

PEFT_PACA = "peft-paca"  # our name for the format, and for the kind of such a folder's record

# The fields of a PaCA configuration that we give a meaning, and those that have none once columns are trained.
PACA_FIELDS = ("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "paca_alpha", "target_modules",
               "exclude_modules", "layers_to_transform", "layers_pattern", "random_seed",
               "modules_to_save")  # fmt: skip
LIMITS = ("exclude_modules", "layers_to_transform", "layers_pattern")  # with these target_modules means fewer
WITHOUT_EFFECT = ("auto_mapping", "peft_version", "inference_mode", "init_weights", "runtime_config")


def task_type(plan: SurgeryPlan) -> str | None:
    """PEFT's word for the task; none where its class would build another model than the plan's."""
    if plan.task == "features" and plan.architecture.endswith("Model"):
        return "FEATURE_EXTRACTION"
    return TASK_TYPES.get(plan.task)


def saved_modules(plan: SurgeryPlan) -> list[str]:
    """The modules that hold the tensors trained whole, as PEFT is to replace them."""
    owners = [target.parameter.rpartition(".")[0] for target in plan.whole]
    return sorted({owner.split(".")[0] if owner.split(".")[0] in OWN_HEADS else owner for owner in owners})
