"""Nothing leaves the machine unless it is said twice; what would is listed."""

import pytest

from mmtard.cli.main import main
from mmtard.errors import UserError
from mmtard.export.push import push
from mmtard.folders import MANIFEST


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "exported"
    (folder / "transformers").mkdir(parents=True)
    for name, size in (("README.md", 10), ("open_clip_model.safetensors", 3 << 20), ("transformers/config.json", 2)):
        (folder / name).write_bytes(bytes(size))
    (folder / MANIFEST).touch()
    return folder


@pytest.fixture
def hub(monkeypatch):
    """What the Hub was asked for."""
    asked = []

    class Api:
        def create_repo(self, name, **settings):
            asked.append(("create", name, settings))
            return f"HUB/{name}"

        def upload_folder(self, **settings):
            asked.append(("upload", settings))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    return asked


def test_a_dry_run_lists_the_files_and_asks_the_hub_for_nothing(exported, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: pytest.fail("a dry run needs no token"))
    assert push(exported, "org/name") == [
        "would upload to org/name (made private if it is new):",
        "  README.md  0.0 MiB",
        "  open_clip_model.safetensors  3.0 MiB",
        "  transformers/config.json  0.0 MiB",
        "nothing was uploaded; add --yes to do it",
    ]
    assert hub == []


def test_yes_uploads_the_folder_to_a_private_repository(exported, hub):
    assert push(exported, "org/name", upload=True)[0] == "uploaded to HUB/org/name:"
    (create, upload) = hub
    assert create == ("create", "org/name", {"private": True, "exist_ok": True})
    assert (upload[1]["repo_id"], upload[1]["folder_path"]) == ("org/name", exported)
    assert upload[1]["ignore_patterns"] == [MANIFEST]


def test_without_a_token_it_says_how_to_get_one(exported, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the Hub is at hand; run `hf auth login` or set HF_TOKEN"):
        push(exported, "org/name", upload=True)
    assert hub == []


@pytest.mark.parametrize("name", ["name", "org/name/more", "../x", "org/na me", "-o/x", "org/a--b", ""])
def test_what_is_no_repository_is_refused(exported, name):
    with pytest.raises(UserError, match="is not the name of a repository; write it as org/name"):
        push(exported, name)


def test_a_hub_that_refuses_is_told_in_one_line(exported, hub, monkeypatch):
    from huggingface_hub import errors

    def refuse(*_, **__):
        raise errors.OfflineModeIsEnabled("403\nForbidden")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse, raising=False)
    with pytest.raises(UserError, match="^--push: org/name was not uploaded: 403 Forbidden; the export lies in"):
        push(exported, "org/name", upload=True)


def test_yes_alone_and_a_bad_name_are_told_before_the_work(tmp_path, capsys):
    assert main(["export", str(tmp_path / "gone"), str(tmp_path / "out"), "--yes"]) == 2
    assert "--yes: belongs to --push ORG/NAME" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "gone"), str(tmp_path / "out"), "--push", "name"]) == 2
    assert "--push: 'name' is not the name of a repository" in capsys.readouterr().err
