from __future__ import annotations

from pathlib import Path

import pytest

from prefect_mlprojects.exceptions import FetchError
from prefect_mlprojects.sources import WorkingCopy, absolute_uri, detect_source
from prefect_mlprojects.sources.git.source import GitSource
from prefect_mlprojects.sources.zip_archive import ZipSource
from prefect_mlprojects.types import StopSignal


def fetched(uri: str, base: Path | None = None) -> WorkingCopy:
    return detect_source(uri, base=base).fetch(StopSignal(), lambda line: None)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "sub" / "deep").mkdir(parents=True)
    return folder


def test_absolute_folder_runs_in_place(project: Path) -> None:
    copy = fetched(str(project))

    assert copy == WorkingCopy(directory=project, uri=str(project), kind="local", source_name=str(project))
    assert copy.commit is None
    assert not copy.temporary


@pytest.mark.parametrize("uri", ["project", "./project", "project/", "./sub/../project", "'project'", " project "])
def test_relative_folder_resolves_against_base(project: Path, uri: str) -> None:
    assert fetched(uri, base=project.parent).directory == project


def test_without_a_base_the_working_directory_counts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)

    assert fetched(".").directory == project
    assert fetched("sub").directory == project / "sub"


def test_tilde_expands_to_home_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project.parent))

    assert fetched("~/project").directory == project


def test_file_uri_is_percent_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "with space#and?more"
    folder.mkdir()

    assert fetched(folder.as_uri()).directory == folder
    assert fetched(f"file://localhost{tmp_path}").directory == tmp_path


def test_symbolic_link_is_not_resolved(project: Path) -> None:
    link = project.parent / "link"
    link.symlink_to(project)

    assert fetched(str(link)).directory == link


@pytest.mark.parametrize("subdirectory", ["sub", "sub/deep", "sub/deep/", "./sub", "/sub", "/sub/deep/"])
def test_subdirectory_fragment_selects_subfolder(project: Path, subdirectory: str) -> None:
    expected = project / subdirectory.strip("/")

    assert fetched(f"{project}#{subdirectory}").directory == expected
    assert fetched(f"{project.as_uri()}#{subdirectory}").directory == expected


def test_empty_subdirectory_selects_project_folder(project: Path) -> None:
    assert fetched(f"{project}#").directory == project


def test_folder_name_with_hash_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "c#sharp"
    (folder / "sub").mkdir(parents=True)

    assert fetched(str(folder)).directory == folder
    assert fetched(f"{folder}#sub").directory == folder / "sub"


def test_subdirectory_takes_precedence_over_hash_in_folder_name(project: Path) -> None:
    project.with_name("project#sub").mkdir()

    assert fetched(f"{project}#sub").directory == project / "sub"


@pytest.mark.parametrize("subdirectory", ["..", "../..", "sub/../..", "../project"])
def test_subdirectory_outside_project_is_rejected(project: Path, subdirectory: str) -> None:
    with pytest.raises(FetchError, match="leads out of the project"):
        detect_source(f"{project}#{subdirectory}")


def test_subdirectory_symlink_outside_project_is_rejected(project: Path) -> None:
    (project / "link").symlink_to("/")

    with pytest.raises(FetchError, match="leads out of the project"):
        detect_source(f"{project}#link")


def test_missing_subdirectory_error_suggests_closest_name(project: Path) -> None:
    with pytest.raises(FetchError, match=r"'sbu'.*does not exist.*Did you mean '.*/project/sub'\?"):
        detect_source(f"{project}#sbu")


def test_subdirectory_pointing_to_file_is_rejected(project: Path) -> None:
    (project / "main.py").touch()

    with pytest.raises(FetchError, match="is a file, not a folder"):
        detect_source(f"{project}#main.py")


def test_missing_folder_error_suggests_closest_sibling(project: Path) -> None:
    wrong = project.with_name("projcet")

    with pytest.raises(FetchError) as caught:
        detect_source(str(wrong))

    assert caught.value.uri == str(wrong)
    assert str(caught.value) == f"The project folder '{wrong}' does not exist. Did you mean '{project}'?"


def test_missing_parents_error_names_deepest_existing_folder(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=rf"only '{tmp_path}' exists"):
        detect_source(str(tmp_path / "a" / "b" / "c"))


def test_file_as_project_folder_is_rejected(project: Path) -> None:
    file = project / "MLproject"
    file.touch()

    with pytest.raises(FetchError, match=f"is a file, not a folder. Give the project's folder: '{project}'"):
        detect_source(str(file))


@pytest.mark.parametrize("uri", ["", "  ", "''", "a\0b"])
def test_empty_or_invalid_path_is_rejected(uri: str) -> None:
    with pytest.raises(FetchError, match="Give a local folder"):
        detect_source(uri)


def test_overlong_folder_name_is_reported_as_missing() -> None:
    with pytest.raises(FetchError, match="does not exist"):
        detect_source("x" * 5000)


@pytest.mark.parametrize(
    ("uri", "url", "subdirectory"),
    [
        ("https://example.com/o/r", "https://example.com/o/r", ""),
        ("https://example.com/o/r.git#sub/deep", "https://example.com/o/r.git", "sub/deep"),
        ("HTTPS://example.com:8443/o/r", "https://example.com:8443/o/r", ""),
        ("git@example.com:o/r.git", "ssh://git@example.com/o/r.git", ""),
        ("git@example.com:~me/r.git", "ssh://git@example.com/~me/r.git", ""),
        ("example.com:o/r.git", "ssh://example.com/o/r.git", ""),
        ("example.com:/o/r.git", "ssh://example.com/o/r.git", ""),
        ("[::1]:o/r.git", "ssh://[::1]/o/r.git", ""),
        ("https://example.com/o/r.git#/sub/deep/", "https://example.com/o/r.git", "sub/deep"),
        ("ssh://git@example.com:2222/o/r#sub", "ssh://git@example.com:2222/o/r", "sub"),
        ("git+https://example.com/o/r", "https://example.com/o/r", ""),
        ("git+ssh://git@example.com/o/r", "ssh://git@example.com/o/r", ""),
        ("git://example.com/r", "git://example.com/r", ""),
        ("https://[::1]:8080/o/r", "https://[::1]:8080/o/r", ""),
        ("https://me:secret@example.com/o/r", "https://example.com/o/r", ""),
    ],
)
def test_remote_git_address_is_parsed(uri: str, url: str, subdirectory: str, tmp_path: Path) -> None:
    source = detect_source(uri, "v1", base=tmp_path)

    assert isinstance(source, GitSource)
    assert (source.url.url, source.subdirectory, source.version) == (url, subdirectory, "v1")
    # ssh://host/path is another folder than host:path, which is relative to the user's home there.
    assert source.url.address == (url if "://" in uri else uri)


@pytest.mark.parametrize("uri", ["s3://bucket/project.zip", "https://example.com/project.zip?x=1#sub"])
def test_remote_zip_archive_is_detected(uri: str, tmp_path: Path) -> None:
    source = detect_source(uri, base=tmp_path)

    assert isinstance(source, ZipSource)
    assert source.location == uri.partition("#")[0]
    with pytest.raises(FetchError, match="is a zip archive"):
        detect_source(uri, "v1", base=tmp_path)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("ext::sh -c touch% /dev/null", "can't be fetched. Give a local folder"),
        ("s3://bucket/project", "can't be fetched. Give a local folder"),
        ("git+ext://sh", "can't be fetched. Give a local folder"),
        ("project.zip", "zip archive '.*project.zip' does not exist"),
        ("backup:project.zip", "zip archive '.*backup:project.zip' does not exist"),
        ("/sub:1/project", "project folder '/sub:1/project' does not exist"),
        ("-oProxyCommand=x:o/r", "begins with '-'"),
        ("https://example.com", "names no repository"),
        ("ssh://-oProxyCommand=touch/o/r", "begins with '-'"),
        ("ssh://git@example.com/-upload", "begins with '-'"),
        ("-u@example.com:o/r", "begins with '-'"),
        ("https://example.com:port/o/r", "is no URL"),
    ],
)
def test_unsupported_uri_is_rejected_with_reason(uri: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=words) as caught:
        detect_source(uri, base=tmp_path)

    assert caught.value.uri == uri


@pytest.mark.parametrize("version", ["--upload-pack=touch", "-x", "a b", "a\nb"])
def test_invalid_version_is_rejected(version: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="is no version"):
        detect_source("https://example.com/o/r", version, base=tmp_path)


def test_uri_password_is_extracted_and_redacted() -> None:
    source = detect_source("https://me:hunter2@example.com/o/r")

    assert isinstance(source, GitSource)
    assert source.url.credentials is not None
    assert source.url.credentials.token == "hunter2"
    assert "hunter2" not in repr(source)
    assert "hunter2" not in source.uri


@pytest.mark.parametrize(
    ("uri", "patterns", "trusted"),
    [
        ("https://example.com/acme/r", "https://example.com/acme/*", True),
        ("https://EXAMPLE.com/acme/r", "https://example.com/acme/*", True),
        ("https://me:secret@example.com/acme/r", "https://example.com/acme/*", True),
        ("https://example.com/acme/../evil/r", "https://example.com/acme/*", False),
        ("https://example.com/acme/%2e%2e/evil/r", "https://example.com/acme/*", False),
        ("https://example.com/acme/%252e%252e/evil/r", "https://example.com/acme/*", False),
        ("https://example.com.evil.org/acme/r", "https://example.com/acme/*", False),
        ("https://example.com@evil.org/acme/r", "https://example.com/acme/*", False),
        ("git@example.com:acme/r", "https://example.com/acme/* ssh://example.com/acme/*", True),
        ("https://example.com/acme/r.zip", "s3://*", False),
        ("PROJECT", "https://*", False),
        ("PROJECT", "PROJECT", True),
        ("file://PROJECT", "PROJECT/*", False),
    ],
)
def test_trusted_sources_setting_rejects_other_sources(
    uri: str, patterns: str, trusted: bool, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, patterns = uri.replace("PROJECT", str(project)), patterns.replace("PROJECT", str(project))
    monkeypatch.setenv("PREFECT_MLPROJECTS_TRUSTED_SOURCES", patterns)

    if trusted:
        detect_source(uri)
    else:
        with pytest.raises(FetchError, match="may not run here"):
            detect_source(uri)


def test_local_folder_takes_precedence_over_git_address(tmp_path: Path) -> None:
    folder = tmp_path / "host:project"
    (folder / "sub").mkdir(parents=True)

    assert fetched("host:project", base=tmp_path).directory == folder
    assert fetched("host:project#sub", base=tmp_path).directory == folder / "sub"


def test_subdirectory_leading_slash_is_relative_to_project(project: Path) -> None:
    with pytest.raises(FetchError, match=r"'etc'.*does not exist"):
        detect_source(f"{project}#/etc")


def test_file_uri_with_remote_host_is_rejected() -> None:
    with pytest.raises(FetchError, match="names another machine"):
        detect_source("file://elsewhere/project")


def test_version_of_local_folder_is_rejected(project: Path) -> None:
    with pytest.raises(FetchError, match=r"A version \('v1'\) can only be asked of a git project"):
        detect_source(str(project), "v1")
    assert detect_source(str(project), "").kind == "local"


def test_deleted_working_directory_raises_fetch_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    with pytest.raises(FetchError, match="working directory does not exist any more"):
        detect_source(".")


def test_folder_deleted_before_fetch_raises_fetch_error(project: Path) -> None:
    source = detect_source(f"{project}#sub/deep")
    (project / "sub" / "deep").rmdir()

    with pytest.raises(FetchError, match="does not exist"):
        source.fetch(StopSignal(), lambda line: None)


def test_fetch_after_stop_request_raises_fetch_error(project: Path) -> None:
    stop = StopSignal()
    stop.request("enough")

    with pytest.raises(FetchError, match="was stopped"):
        detect_source(str(project)).fetch(stop, lambda line: None)


def test_removing_a_local_working_copy_leaves_the_folder(project: Path) -> None:
    source = detect_source(str(project))
    copy = source.fetch(StopSignal(), lambda line: None)

    source.remove(copy)
    source.remove(copy)

    assert [path.name for path in project.iterdir()] == ["sub"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (".", "{here}"),
        ("project", "{here}/project"),
        ("'project'", "{here}/project"),
        ("project#sub/folder", "{here}/project#sub/folder"),
        ("project#only-in-a-version", "{here}/project#only-in-a-version"),
        ("with#sign", "{here}/with#sign"),
        ("archive.zip", "{here}/archive.zip"),
        ("./project/../project", "{here}/project"),
        ("missing", "missing"),
        ("https://github.com/o/r#sub", "https://github.com/o/r#sub"),
        ("git@github.com:o/r.git", "git@github.com:o/r.git"),
        ("block://name", "block://name"),
        ("file:///p#sub", "file:///p#sub"),
    ],
)
def test_absolute_uri_of_local_project_keeps_its_meaning(
    given: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "sub" / "folder").mkdir(parents=True)
    (tmp_path / "with#sign").mkdir()
    (tmp_path / "archive.zip").touch()
    monkeypatch.chdir(tmp_path)

    assert absolute_uri(given) == stored.format(here=tmp_path)
