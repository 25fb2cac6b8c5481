"""The README's examples run as they stand, and the generated pages are fresh."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.cli import cli
from surgery.recipe import Recipe, apply_override, check
from tests.conftest import TinyModel
from tests.forking import Job, carry_out


def blocks(root: Path, language: str) -> list[str]:
    """The README's code blocks in one language."""
    text = (root / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def recipe_name(text: str) -> str:
    """What the recipe's first line says that it is called."""
    return text.partition(";")[0].removeprefix("# ")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel, project_root: Path) -> Path:
    """A folder with what the README speaks of: model/, train.jsonl, eval.jsonl, recipe.yaml."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(tiny_model("llama", overrides={"max_position_embeddings": 4096}), folder / "model")
    (recipe,) = blocks(project_root, "yaml")
    (folder / recipe_name(recipe)).write_text(recipe)
    rows = [{"prompt": f"a{n} ", "completion": f"b{n % 7}"} for n in range(64)]
    for name, part in (("train", rows[:48]), ("eval", rows[48:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that has to succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done


@pytest.mark.slow
def test_every_command_of_the_readme_runs_in_its_order(workshop: Path, project_root: Path, tmp_path: Path) -> None:
    """A reader can paste the shell examples one after another, and the undone folder is the base."""
    lines = [line for block in blocks(project_root, "bash") for line in block.splitlines()]
    assert len(lines) >= 9
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {command[0] for command in commands} == {"surgery"}
    jobs = [Job(f"{number:02}", 0, command[1:], limit_seconds=300) for number, command in enumerate(commands)]
    ended = carry_out(jobs, tmp_path, "-W", "error", at=workshop)
    wrong = [(lines[n], ended[job.name].errors) for n, job in enumerate(jobs) if ended[job.name].codes != [0]]
    assert not wrong
    for path in (workshop / "model").iterdir():
        assert (workshop / "model-again" / path.name).read_bytes() == path.read_bytes()


def test_every_command_for_other_machines_is_one(project_root: Path) -> None:
    """Examples that take several devices or a Gaudi cannot run here: their commands, options and settings exist."""
    lines = [line for block in blocks(project_root, "sh") for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines]
    ours = [words for words in found if "surgery" in words or "surgery.train" in words]
    assert len(ours) >= 7
    for words in ours:
        is_module = "surgery.train" in words
        own = words[words.index("surgery.train" if is_module else "surgery") + 1 :]
        name, arguments = ("train", own) if is_module else (own[0], own[1:])
        context = cli.commands[name].make_context(name, list(arguments))
        document = {"model": "model"}
        for text in (text for text in arguments if "=" in text):
            apply_override(document, text)
        check(Recipe, document, "README")
        assert context.params["nproc"] in (None, 8)
        if name == "run":
            assert (project_root / arguments[0]).is_file()


@pytest.mark.slow
def test_every_python_example_of_the_readme_runs(workshop: Path, project_root: Path) -> None:
    """The Python examples form one script."""
    script = "\n".join(blocks(project_root, "python"))
    assert "surgery.attach" in script
    run([sys.executable, "-W", "error", "-c", script], workshop)


@pytest.mark.slow
def test_the_recipe_of_the_readme_runs_as_its_first_line_says(workshop: Path, project_root: Path) -> None:
    """The recipe, its name and its command stand in one block."""
    (text,) = blocks(project_root, "yaml")
    command = text.splitlines()[0].partition("; ")[2]
    run([sys.executable, "-W", "error", "-m", "surgery.cli", *shlex.split(command)[1:]], workshop)
    assert (workshop / "merged" / "model.safetensors").is_file()


def test_the_page_of_commands_is_what_the_commands_say(project_root: Path) -> None:
    """docs/cli.md is generated, and regenerated when a command changes."""
    run([sys.executable, "docs/make_cli.py", "--check"], project_root)


def test_every_link_of_the_pages_leads_somewhere(project_root: Path) -> None:
    """Relative links in the README and in docs/ name files that exist."""
    pages = [project_root / "README.md", project_root / "CONTRIBUTING.md", *(project_root / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
