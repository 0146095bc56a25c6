import pytest

from shufflenet_jax.errors import InputError
from shufflenet_jax.files import real_path, written_aside


def test_a_file_and_a_folder_take_their_place_at_the_end(tmp_path):
    for target in (tmp_path / "file", tmp_path / "deep/er/file"):
        for text in ("first", "second"):
            with written_aside(target) as draft:
                draft.write_text(text)
                assert not target.exists() or target.read_text() == "first"
            assert target.read_text() == text
    for name in ("a", "b"):
        with written_aside(tmp_path / "folder", folder=True) as draft:
            draft.mkdir()
            (draft / name).touch()
        assert [path.name for path in (tmp_path / "folder").iterdir()] == [name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "file", "folder"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_there_stays_when_writing_fails(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("old")
    else:
        target.mkdir()
    with pytest.raises(RuntimeError), written_aside(target, folder=kind == "folder") as draft:
        draft.write_text("half")
        raise RuntimeError
    assert target.is_dir() if kind == "folder" else target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a folder"), written_aside(tmp_path / "folder"):
        pytest.fail("must be refused before anything is computed")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/inside cannot be written"), written_aside(tmp_path / "file/inside"):
        pass


def test_the_real_path_of_a_link_is_its_target_and_a_loop_of_links_raises_nothing(tmp_path):
    for link, target in {"link": "folder", "itself": "itself", "there": "back", "back": "there"}.items():
        (tmp_path / link).symlink_to(target)
    (tmp_path / "folder").mkdir()
    assert real_path(tmp_path / "link" / "missing") == tmp_path.resolve() / "folder/missing"
    for loop in ("itself", "there"):
        assert real_path(tmp_path / loop).parent == tmp_path.resolve()
