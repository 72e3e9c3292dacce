"""``mlprojects init``: the command of the project gives the real script what its author would have typed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.projects._project_spec import load_project as mlflow_loads

from prefect_mlprojects.exceptions import ProjectSpecError
from prefect_mlprojects.scaffold import Scaffold, find_script, scaffold
from prefect_mlprojects.scaffold.imports import imported_names, requirements
from prefect_mlprojects.spec import build_command, load_project
from prefect_mlprojects.spec.entry_points import check_call

ARGPARSE = """
import argparse, json, os
from pathlib import Path

RATE = 0.5

def options():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", help="The table, 100%% of it.")
    parser.add_argument("--alpha", type=float, default=RATE, help="Strength (default: %(default)s)")
    parser.add_argument("-n", "--n-estimators", type=int, required=True)
    parser.add_argument("--kind", choices=["tree", "linear", "on"], default="tree")
    parser.add_argument("--depth", type=int, choices=range(1, 4))
    parser.add_argument("--out", type=Path, default=Path("out"))
    group = parser.add_argument_group("more")
    group.add_argument("--verbose", action="store_true")
    group.add_argument("--no-cache", dest="cache", action="store_false")
    group.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--tag", action="append")
    parser.add_argument("--api-key", default="abc")
    parser.add_argument("-v", action="count")
    parser.add_argument("--debug", help=argparse.SUPPRESS)
    return parser.parse_args()

if __name__ == "__main__":
    print(json.dumps(vars(options()), default=str))
"""

CLICK = """
import json
import click

@click.command()
@click.argument("data", type=click.Path())
@click.argument("files", nargs=-1)
@click.option("--alpha", default=0.5, help="Strength.")
@click.option("-n", "--rounds", "rounds", type=click.IntRange(1, 9), required=True)
@click.option("--kind", type=click.Choice(["a", "b"]), default="a", show_default=True)
@click.option("--shout/--no-shout", default=True)
@click.option("--verbose", is_flag=True)
@click.option("--tag", multiple=True)
@click.option("--point", type=float, nargs=2)
@click.option("--name")
@click.version_option("1")
def main(**values):
    print(json.dumps(values))

if __name__ == "__main__":
    main()
"""

TYPER = """
import json
from enum import Enum
from typing import Annotated, List, Optional
import typer

class Kind(str, Enum):
    tree = "tree"
    linear = "linear"

def main(
    data: str,
    rounds: Annotated[int, typer.Option(min=1, max=9, help="How often.")],
    alpha: float = typer.Option(0.5, "--alpha", "-a"),
    kind: Kind = Kind.tree,
    verbose: bool = False,
    shout: bool = True,
    tag: Optional[List[str]] = None,
    name: str | None = None,
):
    values = dict(locals())
    print(json.dumps({**values, "kind": kind.value}))

if __name__ == "__main__":
    typer.run(main)
"""

SUBCOMMANDS = """
import argparse, json

common = argparse.ArgumentParser(add_help=False)
common.add_argument("--seed", type=int, default=1)
parser = argparse.ArgumentParser()
parser.add_argument("--store", default="here")
parser.add_argument("--debug", action="store_true")
commands = parser.add_subparsers(dest="command", required=True)
train = commands.add_parser("train", parents=[common])
train.add_argument("--alpha", type=float, default=0.1)
commands.add_parser("score").add_argument("model")
print(json.dumps(vars(parser.parse_args())))
"""

CLICK_GROUP = """
import json
import click

@click.group()
@click.option("--store", default="here")
@click.pass_context
def cli(context, store):
    context.obj = store

@cli.command()
@click.option("--alpha", default=0.1)
@click.pass_obj
def train_model(store, alpha):
    print(json.dumps({"command": "train", "store": store, "alpha": alpha}))

@cli.command("score")
@click.argument("model")
def _score(model):
    print(json.dumps({"command": "score", "model": model}))

cli()
"""

TYPER_APP = """
import json
import typer

app = typer.Typer()

@app.command()
def train_model(alpha: float = 0.1):
    print(json.dumps({"command": "train", "alpha": alpha}))

@app.command("score")
def other(model: str, top: int = 5):
    print(json.dumps({"command": "score", "model": model, "top": top}))

app()
"""


def make(folder: Path, text: str, **files: str) -> Scaffold:
    (folder / "train.py").write_text(text)
    for name, content in files.items():
        (folder / name.replace("_txt", ".txt").replace("_toml", ".toml")).write_text(content)
    made = scaffold(folder / "train.py", folder, None, {"PATH": str(Path(sys.executable).parent)})
    made.write(overwrite=True)
    return made


def parsed(folder: Path, entry_point: str, values: dict[str, Any]) -> dict[str, Any]:
    """What the script itself reads from the command of an entry point."""
    _, point, checked = check_call(folder, entry_point, values)
    command = build_command(point, checked)
    done = subprocess.run(
        ["bash", "-c", command.replace("python", shlex.quote(sys.executable), 1)],
        cwd=folder,
        env={**os.environ, **secret_variables(checked)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def secret_variables(checked: Any) -> dict[str, str]:
    from prefect_mlprojects._support.secrets import reveal

    return {checked.variables[name]: reveal(value) for name, value in checked.secrets.items()}


ARGPARSE_DEFAULTS = {
    "data": "d.csv", "alpha": 0.5, "n_estimators": 3, "kind": "tree", "depth": None, "out": "out", "verbose": False,
    "cache": True, "shuffle": True, "layers": [64, 32], "tag": None, "api_key": "abc", "v": None, "debug": None,
}  # fmt: skip
CLICK_DEFAULTS = {
    "data": "d", "files": [], "alpha": 0.5, "rounds": 3, "kind": "a", "shout": True, "verbose": False, "tag": [],
    "point": None, "name": None,
}  # fmt: skip
TYPER_DEFAULTS = {
    "data": "d", "rounds": 3, "alpha": 0.5, "kind": "tree", "verbose": False, "shout": True, "tag": None, "name": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "entry_point", "values", "read"),
    [
        (ARGPARSE, "main", {"data": "d.csv", "n_estimators": 3}, ARGPARSE_DEFAULTS),
        (
            ARGPARSE,
            "main",
            {
                "data": "my data; x", "n_estimators": 4, "alpha": 1e-5, "kind": "on", "depth": 2, "out": "x y",
                "verbose": True, "no_cache": True, "no_shuffle": True, "layers": [1, 2, 3], "tag": ["a b", "c"], "api_key": "k y",
            },
            ARGPARSE_DEFAULTS | {
                "data": "my data; x", "n_estimators": 4, "alpha": 1e-5, "kind": "on", "depth": 2, "out": "x y",
                "verbose": True, "cache": False, "shuffle": False, "layers": [1, 2, 3], "tag": ["a b", "c"], "api_key": "k y",
            },
        ),
        (CLICK, "main", {"data": "d", "rounds": 3}, CLICK_DEFAULTS),
        (
            CLICK,
            "main",
            {"data": "d", "files": ["a b", "c"], "alpha": 2, "rounds": 9, "kind": "b", "no_shout": True, "verbose": True,
             "tag": ["x", "y z"], "point": [1, 2.5], "name": "$n"},
            {"data": "d", "files": ["a b", "c"], "alpha": 2.0, "rounds": 9, "kind": "b", "shout": False, "verbose": True,
             "tag": ["x", "y z"], "point": [1.0, 2.5], "name": "$n"},
        ),
        (TYPER, "main", {"data": "d", "rounds": 3}, TYPER_DEFAULTS),
        (
            TYPER,
            "main",
            {"data": "d", "rounds": 9, "alpha": 1, "kind": "linear", "verbose": "yes", "no_shout": 1, "tag": "a,b", "name": "n"},
            {"data": "d", "rounds": 9, "alpha": 1.0, "kind": "linear", "verbose": True, "shout": False, "tag": ["a", "b"],
             "name": "n"},
        ),
        (SUBCOMMANDS, "train", {}, {"store": "here", "debug": False, "command": "train", "seed": 1, "alpha": 0.1}),
        (SUBCOMMANDS, "score", {"model": "m", "store": "s"}, {"store": "s", "debug": False, "command": "score", "model": "m"}),
        (CLICK_GROUP, "train-model", {"alpha": 3, "store": "s"}, {"command": "train", "store": "s", "alpha": 3.0}),
        (CLICK_GROUP, "score", {"model": "m"}, {"command": "score", "model": "m"}),
        (TYPER_APP, "train-model", {"alpha": 3}, {"command": "train", "alpha": 3.0}),
        (TYPER_APP, "score", {"model": "m"}, {"command": "score", "model": "m", "top": 5}),
    ],
)  # fmt: skip
def test_script_reads_what_was_given(
    tmp_path: Path, script: str, entry_point: str, values: dict[str, Any], read: dict[str, Any]
) -> None:
    make(tmp_path, script)
    project = load_project(tmp_path)
    assert project.warnings == ()
    assert parsed(tmp_path, entry_point, values) == read
    # The same file is one for `mlflow run`.
    theirs = mlflow_loads(str(tmp_path))  # type: ignore[no-untyped-call]
    assert set(theirs._entry_points) == set(project.entry_points)


def test_what_the_file_says(tmp_path: Path) -> None:
    made = make(tmp_path, ARGPARSE)
    parameters = load_project(tmp_path).entry_points["main"].parameters
    assert parameters["data"].description == "The table, 100% of it."
    assert parameters["alpha"].description == "Strength"
    assert parameters["depth"].choices == ("1", "2", "3")
    assert parameters["api_key"].secret
    assert "abc" not in made.files["MLproject"]
    assert "v" not in parameters
    assert "debug" not in parameters
    assert [each.split(";")[0] for each in made.notes] == [
        "-v counts how often it is given",
        "the default of --out is known only when the script runs",
    ]
    make(tmp_path, TYPER)
    rounds = load_project(tmp_path).entry_points["main"].parameters["rounds"]
    assert (rounds.minimum, rounds.maximum, rounds.description, rounds.required) == (1, 9, "How often.", True)


def test_script_without_options(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch(0o640)
    made = make(tmp_path, "print(1)\n")
    assert "has no options" in made.notes[0]
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in made.files} == {0o640}
    assert load_project(tmp_path).entry_points["main"].command == "python train.py"


def test_packages_are_those_that_the_project_imports(tmp_path: Path) -> None:
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("from . import deep\nfrom .deep import x\n")
    (tmp_path / "helpers" / "deep.py").write_text("import yaml, os.path\n")
    (tmp_path / "other.py").write_text("import never\n")
    script = "import sklearn.linear_model, click\nfrom helpers import deep\nif True:\n    import notthere\n"
    made = make(tmp_path, script)
    assert imported_names(tmp_path / "train.py", tmp_path) == ["click", "notthere", "sklearn", "yaml"]
    written = yaml.safe_load(made.files["python_env.yaml"])
    assert written["python"] == "{}.{}".format(*sys.version_info[:2])
    names = [each.partition("==")[0].lower() for each in written["dependencies"]]
    assert names == ["click", "notthere", "pyyaml", "scikit-learn"]
    assert "notthere" in made.notes[-1]
    assert requirements(["a_b", "cv2"], {"a_b": ("A.B", "1.0+cpu")}) == (
        ["A.B==1.0", "opencv-python-headless"],
        ["cv2"],
    )


@pytest.mark.parametrize(
    ("file", "line", "listed"),
    [
        ("requirements_txt", "python_env: python_env.yaml", ["-r requirements.txt"]),
        ("pyproject_toml", "python_env: pyproject.toml", None),
    ],
)
def test_existing_list_of_packages_is_used(tmp_path: Path, file: str, line: str, listed: list[str] | None) -> None:
    made = make(tmp_path, "import yaml\n", **{file: "[project]\nname = 'x'\n" if "toml" in file else "six\n"})
    assert line in made.files["MLproject"].splitlines()
    text = made.files.get("python_env.yaml")
    assert (yaml.safe_load(text)["dependencies"] if text else None) == listed


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    made = make(tmp_path, "print(1)\n")
    (tmp_path / "python_env.yaml").unlink()
    (tmp_path / "MLproject").write_text("name: mine\n")
    with pytest.raises(ProjectSpecError, match="the file exists"):
        made.write(overwrite=False)
    assert (tmp_path / "MLproject").read_text() == "name: mine\n"
    assert not (tmp_path / "python_env.yaml").exists()


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"main.py": "", "train.py": ""}, "main.py"),
        ({"a.py": "", "b.py": "if __name__ == '__main__': pass"}, "b.py"),
        ({"a.py": "__main__", "b.py": "__main__"}, "a.py, b.py can all be run"),
        ({"a.py": ""}, "it has no main.py"),
    ],
)
def test_script_is_found(tmp_path: Path, files: dict[str, str], found: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    try:
        said = find_script(tmp_path).name
    except ProjectSpecError as error:
        said = error.message
    assert found in said


@pytest.mark.parametrize("text", [b"def x(:\n", b"\xff\xfe", b"x = 1\0", b"(" * 5000])
def test_bad_script_is_told_of(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "train.py").write_bytes(text)
    with pytest.raises(ProjectSpecError, match="it is not a Python program"):
        scaffold(tmp_path / "train.py", tmp_path, None, {"PATH": ""})


def test_hostile_script_is_read_not_run(tmp_path: Path) -> None:
    text = (
        "import argparse, os\nos.system('touch ran')\np = argparse.ArgumentParser()\n"
        "p.add_argument('--a', default=os.system('touch ran'), help='x\\n- y: {z}\\x1b[31m')\n"
        "p.add_argument('--$(touch ran)')\np.add_argument(*['--b'])\np.add_argument('--c', choices=[x for x in 'ab'])\n"
    )
    made = make(tmp_path, text)
    assert not (tmp_path / "ran").exists()
    assert "a" in load_project(tmp_path).entry_points["main"].parameters
    assert any("known only when the script runs" in each for each in made.notes)
