"""Checkpoints are complete and verified, or passed over."""

import errno
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.checkpoint import (
    by_step,
    fault_of,
    latest_checkpoint,
    prune,
    save_checkpoint,
    seal,
    set_aside,
    write_json,
    write_jsonl,
)


def writer(text: str):
    return lambda folder: (folder / "state.bin").write_text(text)


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, writer(str(step)), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert (latest_checkpoint(tmp_path) / "state.bin").read_text() == "10"


def test_two_are_kept_where_nothing_else_is_said_and_folders_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    made = [save_checkpoint(folder, step, writer(str(step))) for step in (9, 10, 11)]
    assert made[-1] == folder / "step-00000011" and sorted(folder.iterdir()) == made[1:]
    assert save_checkpoint(folder, 11, writer("again")) == made[-1], "a step's checkpoint is written anew"
    assert (made[-1] / "state.bin").read_text() == "again" and sorted(folder.iterdir()) == made[1:]


def test_sums_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert checkpoint.sha256_of(tmp_path / "abc") == expected


def test_files_are_utf8_whatever_the_system_writes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("io.text_encoding", lambda encoding, level=2: encoding or "latin-1")
    write_json(tmp_path / "a.json", {"ü": ["漢"]})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "ü": [\n    "漢"\n  ]\n}\n'.encode()
    write_jsonl(tmp_path / "b.jsonl", [{"ü": 1}, "漢"])
    assert (tmp_path / "b.jsonl").read_bytes() == '{"ü": 1}\n"漢"\n'.encode()
    assert fault_of(save_checkpoint(tmp_path, 1, lambda folder: (folder / "漢.bin").write_bytes(b"x"))) is None


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "it was cut off while it was written"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "its manifest is damaged"),
        (lambda folder: (folder / "deep" / "part.bin").unlink(), "deep/part.bin is missing"),
        (lambda folder: (folder / "deep" / "part.bin").write_text("other"), "deep/part.bin is damaged"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, damage, sentence: str) -> None:
    def write(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "part.bin").write_text("part")

    made, said = save_checkpoint(tmp_path, 3, write), []
    damage(made)
    assert fault_of(made) == sentence and latest_checkpoint(tmp_path, said.append) is None
    assert said == [f"checkpoint {made} is not used: {sentence}"]


def test_a_new_checkpoint_outlives_damaged_ones_of_later_steps(tmp_path: Path) -> None:
    """A run whose checkpoints are all damaged begins anew, and what it writes then must stay."""
    for step in (4, 5):
        save_checkpoint(tmp_path, step, writer("old"))
    for damaged in list(tmp_path.iterdir()):
        (damaged / "state.bin").write_text("torn")
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, writer(str(step)), keep=2)
        assert latest_checkpoint(tmp_path).name == f"step-{step:08d}"
    there = sorted(p.name for p in tmp_path.iterdir())
    assert there[:2] == ["step-00000002", "step-00000003"]
    assert all(name.startswith("unused-1-step-") for name in there[2:]) and len(there) > 2, "set aside, not removed"


DAMAGES = ["flip a byte", "cut", "lose a file", "add a file", "lose the manifest", "spoil the manifest"]
DAMAGES += ["a list for a manifest", "an empty manifest", "a manifest of one file", "a folder for a file"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 1, writer("one"))
    newest = save_checkpoint(tmp_path, 2, writer("two"))
    state, manifest = newest / "state.bin", newest / "manifest.json"
    {
        "flip a byte": lambda: state.write_text("twp"),
        "cut": lambda: state.write_text("tw"),
        "lose a file": state.unlink,
        "add a file": lambda: (newest / "more.bin").write_text("more"),
        "a list for a manifest": lambda: manifest.write_text("[]"),
        "an empty manifest": lambda: manifest.write_text("{}"),
        "a manifest of one file": lambda: (newest / "other.bin").write_text(manifest.read_text()),
        "a folder for a file": lambda: (state.unlink(), state.mkdir()),
        "lose the manifest": manifest.unlink,
        "spoil the manifest": lambda: manifest.write_text("{"),
    }[damage]()
    said: list[str] = []
    assert latest_checkpoint(tmp_path, said.append).name == "step-00000001"
    assert len(said) == 1 and "step-00000002" in said[0]


def test_a_kill_while_writing_leaves_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writer("one"))

    def dies(folder: Path) -> None:
        (folder / "state.bin").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, dies)
    assert latest_checkpoint(tmp_path).name == "step-00000001"
    save_checkpoint(tmp_path, 2, writer("two"))  # the remains are in nobody's way
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_sealed_trainer_folders_count_and_unsealed_ones_do_not(tmp_path: Path) -> None:
    for step in (5, 7):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.bin").write_text("x")
    seal(tmp_path / "checkpoint-5")
    assert fault_of(tmp_path / "checkpoint-5") is None
    assert latest_checkpoint(tmp_path, lambda _: None).name == "checkpoint-5"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_files_are_never_half_written(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert '"a": 1' in file.read_text()
    write_jsonl(tmp_path / "rows.jsonl", [{"a": "\u2028"}])
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "rows.jsonl", [{"b": 1}, object()])
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": "\u2028"}\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "rows.jsonl"], "nothing is left beside them"


@pytest.mark.parametrize(
    "name", ["state.pt", "optimizer.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"]
)
def test_rubbish_is_passed_over_though_its_sums_fit(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, 1, writer("one"))
    newest = save_checkpoint(tmp_path, 2, lambda folder: (folder / name).write_bytes(b"rubbish"))
    said: list[str] = []
    assert latest_checkpoint(tmp_path, said.append).name == "step-00000001"
    assert said == [f"checkpoint {newest} is not used: {name} cannot be read"], "and nobody is told to open it unsafely"


def test_a_file_or_an_odd_name_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000009").write_text("mine")
    odd = ["step-²", "step-last", "checkpoint-", "checkpoint-old-3", "checkpoint-3-old", "step-1-2-3"]
    for name in odd:
        (tmp_path / name).mkdir()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, writer("one"), keep=1)
    assert latest_checkpoint(tmp_path).name == "step-00000002" and len(by_step(tmp_path)) == 1
    assert (tmp_path / "step-00000009").read_text() == "mine" and all((tmp_path / name).exists() for name in odd)


def test_the_newest_has_the_highest_number_whatever_its_length(tmp_path: Path) -> None:
    names = ["checkpoint-9", "checkpoint-100", "checkpoint-10", "step-00000050"]
    for name in names:
        (tmp_path / name).mkdir()
    assert [path.name for path in by_step(tmp_path)] == [names[1], names[3], names[2], names[0]]


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, writer("one"))

    def fills(folder: Path) -> None:
        (folder / "state.bin").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, fills)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_unreadable_files_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = save_checkpoint(tmp_path, 2, writer("two"))

    def refuses(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "sha256_of", refuses)
    assert fault_of(newest) == f"{newest}/state.bin cannot be read (Permission denied)"


def test_checkpoints_are_set_aside_under_the_next_free_number(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "step-00000001").mkdir()
        set_aside(tmp_path / "step-00000001")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"unused-{n}-step-00000001" for n in (1, 2, 3)]


def test_two_checkpoints_up_to_the_step_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"step-0000000{step}").mkdir()
    prune(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (2, 3, 4)]


def test_a_folder_beside_is_moved_over_what_was_there(tmp_path: Path) -> None:
    folder, beside = tmp_path / "stage", tmp_path / "stage" / "model.partial"
    for place, names in ((folder, ("config.json", "adapter/old", "kept")), (beside, ("config.json", "adapter/new"))):
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(place.name)
    checkpoint.move_into(beside, folder)
    files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json": "model.partial", "adapter/new": "model.partial", "kept": "stage"}
    assert not beside.exists()
