"""What is in a checkpoint, and whose it is: of other settings, of rubbish, or left by a kill, it is passed over."""

import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import fault_of, latest_checkpoint, save_checkpoint, seal, write_json


def writer(text: str):
    return lambda folder: (folder / "state.bin").write_text(text)


def test_what_a_kill_left_is_told_from_what_is_whole(tmp_path: Path) -> None:
    whole = save_checkpoint(tmp_path, 2, writer("two"))
    for name in ("partial-00000004", "step-00000003", "checkpoint-7", "other"):
        (tmp_path / name).mkdir()
    assert [checkpoint.is_sealed(path) for path in (whole, tmp_path / "step-00000003")] == [True, False]
    left = {path.name for path in checkpoint.half_written(tmp_path)}
    assert left == {"partial-00000004", "step-00000003", "checkpoint-7"}


def test_what_a_kill_left_does_not_enter_the_next(tmp_path: Path) -> None:
    (tmp_path / "partial-00000002").mkdir()
    (tmp_path / "partial-00000002" / "stale.bin").write_text("old")
    made = save_checkpoint(tmp_path, 2, writer("two"))
    assert sorted(path.name for path in made.iterdir()) == ["manifest.json", "state.bin"]


def test_what_cannot_be_removed_stops_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = os.unlink

    def refuses(path: str | Path, **options: int) -> None:
        if Path(path).suffix == ".bin":
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, **options)

    save_checkpoint(tmp_path, 1, writer("one"))
    (tmp_path / "partial-00000002").mkdir()
    (tmp_path / "partial-00000002" / "stale.bin").write_text("old")
    monkeypatch.setattr("os.unlink", refuses)
    made = save_checkpoint(tmp_path, 2, writer("two"), keep=1)
    assert latest_checkpoint(tmp_path) == made and (tmp_path / "step-00000001").exists()


def test_what_cannot_be_removed_hides_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: str | Path, **options: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def fills_the_disk(folder: Path) -> None:
        (folder / "state.bin").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.unlink", refuses)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 1, fills_the_disk)


def test_files_of_the_system_are_no_damage(tmp_path: Path) -> None:
    made = save_checkpoint(tmp_path, 2, writer("two"))
    for name in (".DS_Store", ".nfs00012"):
        (made / name).write_text("the system's own")
    assert fault_of(made) is None
    (made / ".hidden").write_text("somebody's")
    assert fault_of(made) == ".hidden is not in its manifest"


@pytest.mark.parametrize("manifest", ["[]", "{}", "123", '["state.bin"]', "null"])
def test_a_manifest_of_another_shape_is_damaged(tmp_path: Path, manifest: str) -> None:
    made = save_checkpoint(tmp_path, 2, writer("two"))
    (made / "manifest.json").write_text(manifest)
    assert fault_of(made) == "its manifest is damaged"


def test_the_step_is_the_last_number_of_the_name() -> None:
    assert [checkpoint.step_of(Path(name)) for name in ("step-00000012", "runs/my-run-7")] == [12, 7]


def test_a_checkpoint_of_other_settings_is_passed_over(tmp_path: Path) -> None:
    folder, said = tmp_path / "checkpoints", []
    folder.mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    identities = [{"stage": "ppo", "config": {"seed": seed, "batch_size": 8 * seed}} for seed in (1, 2)]
    made = []
    for step, identity in enumerate(identities, start=1):
        write_json(folder / "identity.json", identity)
        made.append(save_checkpoint(folder, step, writer("state")))
    names = ["identity.json", "manifest.json", "metrics.jsonl", "state.bin"]
    assert sorted(path.name for path in made[0].iterdir()) == names and fault_of(made[0]) is None
    assert checkpoint.read_object(made[0] / "identity.json") == identities[0]
    assert (made[0] / "metrics.jsonl").read_text() == "{}\n"
    assert latest_checkpoint(folder, said.append, identities[1]) == made[1] and not said
    assert latest_checkpoint(folder, said.append, identities[0]) == made[0]
    changed = "seed: 2 → 1; batch_size: 16 → 8"
    assert said.pop() == f"checkpoint {made[1]} is not used: it was written with other settings ({changed})"
    (folder / "identity.json").unlink()
    last = save_checkpoint(folder, 3, writer("state"))
    assert sorted(path.name for path in last.iterdir()) == ["manifest.json", "state.bin"]
    assert latest_checkpoint(folder, said.append, identities[1]) == made[1] and latest_checkpoint(folder) == last
    assert said == [f"checkpoint {last} is not used: it does not say with which settings it was written"]


def test_objects_are_read_or_there_are_none(tmp_path: Path) -> None:
    contents = {
        "object": b'{"a": "\xc3\xbc"}',
        "list": b"[1]",
        "number": b"123",
        "cut": b'{"a"',
        "latin-1": b'{"\xfc": 1}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = {name: checkpoint.read_object(tmp_path / name) for name in [*contents, "missing"]}
    assert found.pop("object") == {"a": "ü"} and set(found.values()) == {None}


TRAINER: dict[str, object] = {
    "trainer_state.json": {"global_step": 3, "log_history": []},
    "optimizer.pt": {"state": {}, "param_groups": []},
    "scheduler.pt": {"last_epoch": 3},
    "rng_state_0.pth": {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()},
}


def trainer_folder(folder: Path, contents: dict[str, object]) -> Path:
    """A sealed checkpoint as transformers' Trainer writes it."""
    folder.mkdir()
    for name, content in contents.items():
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content))
        else:
            torch.save(content, folder / name)
    seal(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        ({"trainer_state.json": {"global_step": 3}}, "trainer_state.json lacks global_step, log_history"),
        ({"optimizer.pt": {"state": {}}}, "optimizer.pt lacks param_groups, state"),
        ({"scheduler.pt": {}}, "scheduler.pt lacks last_epoch"),
        ({"scheduler.pt": [1]}, "scheduler.pt lacks last_epoch"),
        ({"rng_state_0.pth": {"python": 1, "cpu": 2}}, "rng_state_0.pth lacks cpu, numpy, python"),
        ({"rng_state_0.pth": None, "rng_state.pth": {"cpu": 2}}, "rng_state.pth lacks cpu, numpy, python"),
        ({"optimizer.pt": None}, "its optimizer is missing"),
        ({"scheduler.pt": None}, "its scheduler is missing"),
        ({"rng_state_0.pth": None}, "its rng_state is missing"),
        ({"optimizer.pt": None, "scheduler.pt": None, "global_step3.bin": 1}, None),
        ({name: None for name in TRAINER} | {"other.bin": 1}, None),
        ({"notes.json": [1], "more.pt": 1}, None),
    ],
)
def test_what_the_trainer_cannot_do_without(tmp_path: Path, changes: dict, sentence: str | None) -> None:
    contents = {name: content for name, content in (TRAINER | changes).items() if content is not None}
    assert fault_of(trainer_folder(tmp_path / "checkpoint-3", contents)) == sentence


class Bomb:
    """What unpickles by making a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["state.pt", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever the environment says: torch takes this word of it where the caller says nothing."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    def write(folder: Path) -> None:
        torch.save({"state": Bomb(tmp_path / "harm")}, folder / name)

    assert fault_of(save_checkpoint(tmp_path, 1, write)) == f"{name} cannot be read"
    assert not (tmp_path / "harm").exists()


def test_json_is_utf8_whatever_the_system_reads_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = save_checkpoint(tmp_path, 1, lambda folder: write_json(folder / "notes.json", {"ü": 1}))
    monkeypatch.setattr("io.text_encoding", lambda encoding, level=2: encoding or "ascii")
    assert fault_of(made) is None and checkpoint.read_object(made / "notes.json") == {"ü": 1}


@pytest.mark.parametrize("names", [("disk", None), ("disk", "elsewhere")])
def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple) -> None:
    def fails(number: int) -> None:
        raise OSError(errno.ENOSPC, *names)

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="disk") as caught:
        write_json(tmp_path / "a.json", {})
    assert caught.value.filename == (names[1] or str(tmp_path / "a.json"))
    assert not list(tmp_path.iterdir())
