"""Replacing a folder: whenever the process ends, the old or the new one is complete. It has one job at a time."""

from pathlib import Path

import pytest
from user_errors import raises_user_error

from distilspeed.trainer.files import alone_in, bring_back_replaced, folder_written_whole


@pytest.fixture
def student(tmp_path: Path) -> Path:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "step").write_text("10")
    return tmp_path / "student"


def replace(student: Path) -> None:
    with folder_written_whole(student, replaces=True) as beside:
        (beside / "step").write_text("20")


def test_a_folder_is_replaced_and_no_other_folder_remains(student: Path) -> None:
    replace(student)
    assert (student / "step").read_text() == "20"
    assert [path.name for path in student.parent.iterdir()] == ["student"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_replaced_stays(
    student: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    renamed, rename = [], Path.rename

    def fail(path: Path, target: Path) -> Path:
        renamed.append(path.name)
        if len(renamed) == failing:
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space left"):
        replace(student)
    assert (student / "step").read_text() == "10"
    assert [path.name for path in student.parent.iterdir()] == ["student"]


@pytest.mark.parametrize(("killed_after", "expected"), [(1, "10"), (2, "20")])
def test_a_kill_after_either_rename_loses_no_folder(
    student: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, expected: str
) -> None:
    class Killed(BaseException):
        pass

    renamed, rename = [], Path.rename

    def die(path: Path, target: Path) -> Path:
        result = rename(path, target)
        renamed.append(path.name)
        if len(renamed) == killed_after:
            # A killed process does not clean up.
            monkeypatch.setattr("distilspeed.trainer.files.bring_back_replaced", lambda path: None)
            monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
            raise Killed
        return result

    with monkeypatch.context() as patched:
        monkeypatch = patched
        patched.setattr(Path, "rename", die)
        with pytest.raises(Killed):
            replace(student)
    bring_back_replaced(student)
    assert (student / "step").read_text() == expected
    assert not (student.parent / ".student.previous").exists()


def test_bring_back_replaced_does_nothing_if_nothing_was_replaced(student: Path) -> None:
    users_own = student.with_name("student.previous")
    users_own.mkdir()
    bring_back_replaced(student)
    assert users_own.exists()
    assert (student / "step").read_text() == "10"
    bring_back_replaced(student.with_name("absent"))
    assert not student.with_name("absent").exists()


def test_a_folder_is_used_by_one_job_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    with alone_in(folder), raises_user_error("locked", str(folder)), alone_in(folder):
        pass
    assert not any(tmp_path.iterdir())  # new folders that stay empty are removed
    with alone_in(folder):
        (folder / "file").touch()
    with alone_in(folder):
        pass
    assert (folder / "file").exists()


def test_a_folder_that_was_replaced_while_a_job_waited_for_it_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"

    def replace_folder(*_: object) -> None:
        folder.rename(tmp_path / "old")
        folder.mkdir()

    folder.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fcntl.flock", replace_folder)
        with raises_user_error("locked", str(folder)), alone_in(folder):
            pass


def test_a_folder_that_a_job_is_just_replacing_is_not_brought_back(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def rename_and_look(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        if path == student:
            with raises_user_error("locked", str(student)):
                bring_back_replaced(student)
        return renamed

    monkeypatch.setattr(Path, "rename", rename_and_look)
    with alone_in(student):
        replace(student)
    assert (student / "step").read_text() == "20"
