"""`Kept`: made once, by one thread, read back, made anew where it is damaged, and never half."""

import threading
import time
from pathlib import Path

import pytest

from diffkv_jax.calibration.kept import HELD, Kept


class Note:
    """A text that is saved in a folder."""

    def __init__(self, text: str):
        self.text = text

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "text").write_text(self.text)


def read(folder: Path) -> Note:
    try:
        return Note((folder / "text").read_text())
    except OSError as error:
        raise ValueError("damaged") from error


class Maker:
    """Counts what it makes."""

    def __init__(self):
        self.made = 0

    def __call__(self) -> Note:
        self.made += 1
        time.sleep(0.05)
        return Note(f"note {self.made}")


def test_threads_wait_and_processes_read(tmp_path):
    kept, make, found = Kept[Note](), Maker(), []
    threads = [
        threading.Thread(target=lambda: found.append(kept.get(tmp_path / "a", read, make)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.made == 1 and len(found) == 4 and len({id(one) for one in found}) == 1
    assert Kept[Note]().get(tmp_path / "a", read, make).text == "note 1"
    assert make.made == 1 and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_damaged_is_made_anew_and_kept(tmp_path):
    make = Maker()
    (tmp_path / "a").mkdir()
    assert Kept[Note]().get(tmp_path / "a", read, make).text == "note 1"
    assert Kept[Note]().get(tmp_path / "a", read, make).text == "note 1"


def test_what_another_process_wrote_meanwhile_stays(tmp_path):
    def make():
        Note("other").save(tmp_path / "a")
        return Note("own")

    assert Kept[Note]().get(tmp_path / "a", read, make).text == "own"
    assert read(tmp_path / "a").text == "other" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("place", ["file/policies/a", "x" * 300 + "/a"])
def test_places_that_cannot_be_read_or_written(tmp_path, place):
    (tmp_path / "file").write_text("")
    kept, make = Kept[Note](), Maker()
    for _ in range(2):
        assert kept.get(tmp_path / place, read, make).text == "note 1"


def test_an_interrupt_leaves_nothing(tmp_path):
    class Interrupted(Note):
        def save(self, folder: Path) -> None:
            super().save(folder)
            raise KeyboardInterrupt

    def stop():
        raise KeyboardInterrupt

    kept, make = Kept[Note](), Maker()
    for wrong in (stop, lambda: Interrupted("half")):
        with pytest.raises(KeyboardInterrupt):
            kept.get(tmp_path / "a", read, wrong)
        assert not list(tmp_path.iterdir())
    assert kept.get(tmp_path / "a", read, make).text == "note 1"


def test_few_are_held(tmp_path):
    kept, make = Kept[Note](), Maker()
    for i in range(HELD + 1):
        kept.get(tmp_path / str(i), read, make)
    assert len(kept._held) == HELD
