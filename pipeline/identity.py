"""What makes two parts of a run one: which settings may change between them, and which differ."""

from collections.abc import Mapping
from typing import Any

# The names of things, what is shown, what is kept, and memory for time: the model is the same to the bit.
FREE = {"output_dir", "run_dir", "preset", "logging_steps", "save_steps", "gradient_checkpointing", "fresh", "show"}
FREE |= {"report_to", "project", "run_name"}
FREE |= {"dry_run", "processes", "memory_gb"}  # of a run that does nothing
# The same but for rounding. In a Trainer stage the batch of a step is made of this field, and sums over parts of a
# batch differ: there it may not change.
FREE_IN = {"ppo": {"per_device_train_batch_size"}, "evaluate": {"eval_batch_size"}}


def may_change(field: str, stage: str) -> bool:
    """Whether the setting `field` of `stage` may be another when a run goes on, as it does not change the result."""
    return field in FREE or field in FREE_IN.get(stage, ())


def fixed(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The settings of `stage` that must stay as they are in all parts of a run."""
    return {name: value for name, value in settings.items() if not may_change(name, stage)}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: old → new` for each entry of two identities that differs, those of `config` under their own names.

    An input whose files changed is named without its sha256, which would tell a reader nothing.
    """
    said: list[str] = []
    for name in dict.fromkeys([*now, *then]):
        old, new = then.get(name, "not there"), now.get(name, "not there")
        if old == new:
            continue
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            said.append(f"{name}: {_shown(old)} → {_shown(new)}")
        elif name == "inputs":
            changed = (part for part in dict.fromkeys([*new, *old]) if old.get(part) != new.get(part))
            said += [f"{part}: other content" for part in changed]
        else:
            said += differences(old, new)
    return said


def is_within(path: str, folder: str) -> bool:
    """Whether a path, as it is spelled, is `folder` or lies in it."""
    return f"{path}/".startswith(f"{folder.rstrip('/')}/")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
