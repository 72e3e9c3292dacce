from __future__ import annotations

from pathlib import Path

import pytest

from prefect_mlprojects.environments.python.files import RequirementEntry
from prefect_mlprojects.environments.python.requirements import (
    Installer,
    LocalPackage,
    RequirementSet,
    expand_requirements,
)
from prefect_mlprojects.exceptions import Problem
from prefect_mlprojects.spec.project import NoEnvironment, Project


def expand(
    directory: Path,
    *lines: str,
    source: str = "python_env.yaml",
    installer: Installer = "pip",
    temporary: bool = False,
) -> RequirementSet | tuple[Problem, ...]:
    entries = [RequirementEntry(line, number) for number, line in enumerate(lines, start=2)]
    project = Project(directory, None, "demo", {}, NoEnvironment(), temporary=temporary)
    return expand_requirements(entries, directory / source, project, installer)


def good(
    project: Path,
    *lines: str,
    source: str = "python_env.yaml",
    installer: Installer = "pip",
    temporary: bool = False,
) -> RequirementSet:
    result = expand(project, *lines, source=source, installer=installer, temporary=temporary)
    assert isinstance(result, RequirementSet), [str(problem) for problem in result]
    return result


def bad(project: Path, *lines: str, installer: Installer = "pip") -> list[str]:
    result = expand(project, *lines, installer=installer)
    assert isinstance(result, tuple)
    return [str(problem) for problem in result]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_files_are_included_in_place(tmp_path: Path) -> None:
    write(tmp_path / "requirements.txt", "six==1.16\n-r deps/more.txt  # more\n-c limits.txt\n")
    write(tmp_path / "deps/more.txt", "attrs\n-r last.txt\n")
    write(tmp_path / "deps/last.txt", "h11\n")
    write(tmp_path / "limits.txt", "attrs<26\n")
    result = good(tmp_path, "-r requirements.txt", "iniconfig")
    assert result.lines == ["six==1.16", "attrs", "h11", "iniconfig"]
    assert result.constraints == ["attrs<26"]
    assert result.count == 4
    assert result.file_text((), "limits.txt") == "six==1.16\nattrs\nh11\niniconfig\n-c limits.txt\n"


@pytest.mark.parametrize("line", ["-rr.txt", "-r r.txt", "-r  'r.txt'", "--requirement r.txt", "--requirement=r.txt"])
def test_requirement_option_in_every_spelling_is_parsed(tmp_path: Path, line: str) -> None:
    write(tmp_path / "r.txt", "six\n")
    assert good(tmp_path, line).lines == ["six"]


def test_requirements_file_in_project_precedes_environment_folder(tmp_path: Path) -> None:
    write(tmp_path / "envs/requirements.txt", "six\n")
    assert good(tmp_path, "-r requirements.txt", source="envs/python_env.yaml").lines == ["six"]
    write(tmp_path / "requirements.txt", "attrs\n")
    assert good(tmp_path, "-r requirements.txt", source="envs/python_env.yaml").lines == ["attrs"]


def test_equivalent_requirements_files_share_cache_key(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "Scikit_Learn ==1.5.2 # why\n\n# nothing\nsix \\\n  >=1\n")
    write(tmp_path / "b.txt", "scikit-learn==1.5.2\r\nsix>=1\n")
    assert good(tmp_path, "-r a.txt").key_inputs == good(tmp_path, "-r b.txt").key_inputs


@pytest.mark.parametrize(
    "changed", ["six==1.17\n", "six==1.16\nattrs\n", "six==1.16 ; python_version > '3'\n", "--pre\nsix==1.16\n", ""]
)
def test_changed_requirements_file_changes_cache_key(tmp_path: Path, changed: str) -> None:
    write(tmp_path / "r.txt", "six==1.16\n")
    before = good(tmp_path, "-r r.txt")
    write(tmp_path / "r.txt", changed)
    after = good(tmp_path, "-r r.txt")
    assert before.key_inputs != after.key_inputs
    assert before.text_inputs != after.text_inputs


def test_constraint_and_requirement_have_different_cache_keys(tmp_path: Path) -> None:
    write(tmp_path / "r.txt", "six\n")
    assert good(tmp_path, "-r r.txt").key_inputs != good(tmp_path, "-c r.txt").key_inputs
    assert good(tmp_path, "-c r.txt").count == 0


def test_where_a_file_ends_counts(tmp_path: Path) -> None:
    write(tmp_path / "short.txt", "six\n")
    write(tmp_path / "long.txt", "six\nattrs\n")
    assert good(tmp_path, "-c short.txt", "attrs").key_inputs != good(tmp_path, "-c long.txt").key_inputs


def test_lines_that_only_the_installer_understands_pass(tmp_path: Path) -> None:
    lines = [
        "-i https://example.org/simple",
        "--no-such-option-of-today 3",
        "--no-binary :all:",
        "--pre",
        "-r https://example.org/requirements.txt",
        "demo @ https://example.org/demo-1.0.zip",
        "git+https://example.org/demo.git@main#egg=demo",
        "-e git+https://example.org/demo.git#egg=demo",
        "six==1.16.0 --hash=sha256:1e61c37477a1626458e36f7b1d82aa5c9b094fa4802892072e49de9c60c4c926",
        "secret==${VERSION_OF_SECRET}",
        "uvicorn[standard]>=0.30; python_version >= '3.10'",
    ]
    assert good(tmp_path, *lines).lines == lines


@pytest.mark.parametrize(
    ("lines", "expected", "variables"),
    [
        (["--pre", "six"], ["six"], {"UV_PRERELEASE": "allow"}),
        (
            ["--trusted-host a", "--trusted-host=b:8080", "six"],
            ["six"],
            {"UV_INSECURE_HOST": "a b:8080"},
        ),
        (["--require-hashes", "six"], ["six"], {"UV_REQUIRE_HASHES": "1"}),
        (["six==1 --hash=sha256:aa  --hash=sha256:bb", "h11"], None, {"UV_REQUIRE_HASHES": "1"}),
        (
            ["--no-binary=six,h11", "--only-binary :all:"],
            ["--no-binary six", "--no-binary h11", "--only-binary :all:"],
            {},
        ),
        (["--no-index --pypi-url https://a"], ["-i https://a", "--no-index"], {}),
        (
            ["--extra-index-url https://a", "--index-url=https://b", "--extra-index-url https://c"],
            ["-i https://b", "--extra-index-url https://c"],
            {"UV_INDEX_STRATEGY": "unsafe-best-match"},
        ),
        (["-i https://a", "--no-binary six", "-i https://b"], ["--no-binary six", "-i https://b"], {}),
        (["--use-feature=fast-deps", "six"], ["six"], {}),
        (["-e git+https://example.org/demo.git#egg=demo"], ["git+https://example.org/demo.git#egg=demo"], {}),
        (["-fhttps://example.org/links"], ["-f https://example.org/links"], {}),
    ],
)
def test_options_get_uvs_form(
    tmp_path: Path, lines: list[str], expected: list[str] | None, variables: dict[str, str]
) -> None:
    result = good(tmp_path, *lines, installer="uv")
    assert result.lines == (lines if expected is None else expected)
    assert result.variables == variables
    assert all(f"{name}={value}" in result.key_inputs for name, value in variables.items())


@pytest.mark.parametrize(
    "line",
    [
        "--prefer-binary",
        "--all-releases :all:",
        "--only-final six",
        "--no-such-option",
        "--no-index=1",
        "--index-url 'https://example.org",
        "six --config-settings=a=b",
        "six==1.16 --no-binary :all:",
        "six==1.16 --hash=sha256:aa --global-option=build",
    ],
)
def test_option_unsupported_by_uv_suggests_virtualenv(tmp_path: Path, line: str) -> None:
    (problem,) = bad(tmp_path, line, installer="uv")
    assert problem.startswith(f"{tmp_path}/python_env.yaml:2: ")
    assert "--env-manager virtualenv" in problem
    assert good(tmp_path, line).lines == [line]


def test_local_packages_are_relative_to_the_project(tmp_path: Path) -> None:
    write(
        tmp_path / "pkg/pyproject.toml",
        '[build-system]\nrequires = []\n[project]\nversion = "1"\nname = "my-pkg"\n[tool]\nname="x"\n',
    )
    write(tmp_path / "nested/requirements.txt", "./pkg\n")
    result = good(
        tmp_path, "-r nested/requirements.txt", "-e ./pkg", "./pkg[extra]", "my-pkg @ file:pkg", "my-pkg @ ./pkg"
    )
    package = tmp_path / "pkg"
    assert result.local_packages == [
        LocalPackage(package, editable=False),
        LocalPackage(package, editable=True),
        LocalPackage(package, editable=False),
        LocalPackage(package, editable=False),
        LocalPackage(package, editable=False),
    ]
    assert result.local_packages[0].name == "my-pkg"
    assert LocalPackage(tmp_path / "nested", editable=False).name is None


def test_code_of_a_copied_package_counts_and_of_an_editable_one_does_not(tmp_path: Path) -> None:
    write(tmp_path / "pkg/pyproject.toml", "[project]\nname = 'pkg'\n")
    code = write(tmp_path / "pkg/src/pkg.py", "X = 1\n")
    copied, editable = good(tmp_path, "./pkg"), good(tmp_path, "-e ./pkg")
    code.write_text("X = 2\n")
    assert good(tmp_path, "./pkg").key_inputs != copied.key_inputs
    assert good(tmp_path, "./pkg").text_inputs == copied.text_inputs
    assert good(tmp_path, "-e ./pkg").key_inputs == editable.key_inputs
    write(tmp_path / "pkg/pyproject.toml", "[project]\nname = 'pkg'\ndependencies = ['six']\n")
    assert good(tmp_path, "-e ./pkg").key_inputs != editable.key_inputs


def test_only_editable_package_key_depends_on_working_copy(tmp_path: Path) -> None:
    for copy in ("one", "two"):
        write(tmp_path / copy / "pkg/pyproject.toml", "[project]\nname = 'pkg'\n")
    one, two = tmp_path / "one", tmp_path / "two"
    assert good(one, "./pkg").key_inputs == good(two, "./pkg").key_inputs
    assert good(one, "-e ./pkg").key_inputs != good(two, "-e ./pkg").key_inputs


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_editable_package_in_temporary_working_copy_is_copied(tmp_path: Path, installer: Installer) -> None:
    for copy in ("one", "two"):
        write(tmp_path / copy / "pyproject.toml", "[project]\nname = 'pkg'\n")
        write(tmp_path / copy / "sub/pyproject.toml", "[project]\nname = 'pkg'\n")
    one, two = (
        good(tmp_path / copy / "sub", "-e .[dev]", "-e ..", installer=installer, temporary=True)
        for copy in ("one", "two")
    )
    assert one.lines == two.lines == [".[dev]", ".."]
    assert one.key_inputs == two.key_inputs
    assert [package.editable for package in one.local_packages] == [False, False]
    write(tmp_path / "two/sub/src/pkg.py", "X = 1\n")
    assert good(tmp_path / "two/sub", "-e .", temporary=True).key_inputs != one.key_inputs


def test_pip_clones_an_editable_repository_beside_the_environment(tmp_path: Path) -> None:
    line = "-e git+https://example.org/demo.git#egg=demo"
    assert good(tmp_path, line, temporary=True).lines == [line]


def test_wheel_and_links_folder_content_changes_cache_key(tmp_path: Path) -> None:
    wheel = write(tmp_path / "wheels/demo-1.0-py3-none-any.whl", "one")
    lines = ("--find-links wheels", "demo")
    by_link, by_file = good(tmp_path, *lines), good(tmp_path, "wheels/demo-1.0-py3-none-any.whl")
    assert by_link.links == [tmp_path / "wheels"]
    wheel.write_text("two")
    assert good(tmp_path, *lines).key_inputs != by_link.key_inputs
    assert good(tmp_path, "wheels/demo-1.0-py3-none-any.whl").key_inputs != by_file.key_inputs


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-r none.txt", "requirements file {project}/none.txt, but there is no such file"),
        ("-c none.txt", "constraints file {project}/none.txt, but there is no such file"),
        ("-r .", "but it is a folder"),
        ("./none", "local package './none', but there is no {project}/none"),
        ("-e ./none", "local package './none', but there is no {project}/none"),
        ("none-1.0-py3-none-any.whl", "there is no {project}/none-1.0-py3-none-any.whl"),
        ("demo @ file:///none/demo", "there is no /none/demo"),
        ("six=1.16", "'six=1.16' is not a requirement"),
        ("six=1.16", "write == for an exact version"),
        ("six 1.16", "is not a requirement"),
        ("; six", "is not a requirement"),
        ("six==1.16; python_version", "is not a requirement"),
    ],
)
def test_invalid_requirement_is_reported_with_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    (problem,) = bad(tmp_path, line)
    assert problem.startswith(f"{tmp_path}/python_env.yaml:2: ")
    assert words.format(project=tmp_path) in problem


def test_problems_of_nested_files_name_those_files_and_all_come_at_once(tmp_path: Path) -> None:
    write(tmp_path / "r.txt", "six\n\n-r none.txt\nattrs \\\n  !! 3\n")
    (tmp_path / "latin.txt").write_bytes(b"six # caf\xe9\n")
    first, second, third = bad(tmp_path, "-r r.txt", "-r latin.txt")
    assert first.startswith(f"{tmp_path}/r.txt:3: it names the requirements file {tmp_path}/none.txt")
    assert second.startswith(f"{tmp_path}/r.txt:4: ")
    assert third.startswith(f"{tmp_path}/python_env.yaml:3: it names the requirements file {tmp_path}/latin.txt")
    assert "not UTF-8" in third


def test_requirements_file_including_itself_is_reported(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "-r b.txt\n")
    write(tmp_path / "b.txt", "-r a.txt\n")
    (problem,) = bad(tmp_path, "-r a.txt")
    assert problem.startswith(f"{tmp_path}/b.txt:1: ")
    assert "includes itself" in problem


def test_variables_in_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "elsewhere/r.txt", "six\n")
    monkeypatch.setenv("WHERE_REQUIREMENTS_ARE", str(path.parent))
    assert good(tmp_path, "-r ${WHERE_REQUIREMENTS_ARE}/r.txt").lines == ["six"]
