"""The user's guide, command by command and call by call, as it is written there: only scaled down.

Each command is the guide's own text. What makes it small follows: flags that override the guide's, and a folder with
a piece of the sample corpus. They run in the guide's order, in a copy of the project, with the packages that the guide
installs and none beside them, as a new user would run them: the first of its kind in a process of its own, the others
in one interpreter that has torch already.
"""

import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.storage.archive import load_torch, save_torch
from tests import forks
from tests.guide.home import Interpreter, copy_project
from tests.tiny_runs import HUNG, ONE_THREAD, mostly

pytestmark = pytest.mark.long
FLAGS = "--max_steps 2 --n_layers 1 --max_seq_len 16 --eval_steps 1"  # what makes a run of the default config small
NARROW = FLAGS + " --dim 64"
# Of requirements.txt, what the guide's `pip install` does not name (wandb comes where the guide uses it).
NOT_INSTALLED = ["psutil", "fastokens", "orjson", "rensa", "zstandard", "matplotlib", "gguf", "starlette", "uvicorn"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A copy of the project with 300 texts under the name that the guide gives to the raw data."""
    home = tmp_path_factory.mktemp("guide") / "MateConv"
    return copy_project(home, "mobvoi_seq_monkey_general_open_corpus.jsonl")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of processes in which nothing is installed but what the guide installs."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_INSTALLED}))\n")
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def interpreter(home, environment):
    interpreter = Interpreter(home, environment)
    yield interpreter
    interpreter.close()


@pytest.fixture
def quick(interpreter):
    """Runs a command of the guide in the interpreter, followed by `more`; what it printed."""

    def run(text, more="", typed=""):
        words = shlex.split(text.replace("\\\n", " ")) + shlex.split(more)
        return checked(text, SimpleNamespace(**interpreter.run(words[1:], typed)))

    return run


def checked(text, result):
    """The result of a command, which must have ended well."""
    assert result.code == 0 and "Traceback" not in result.stderr, f"{text}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture
def guide(home, environment):
    """Runs a command of the guide as it is, followed by `more`, in a process of its own; what it printed."""

    def run(text, more="", **options):
        words = shlex.split(text.replace("\\\n", " ")) + shlex.split(more)
        words[0] = {"python": sys.executable, "torchrun": sys.executable}[words[0]]
        if text.startswith("torchrun"):
            words.insert(1, "-m")
            words.insert(2, "torch.distributed.run")
        options = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": HUNG} | options
        result = forks.run(
            words, cwd=home, env=ONE_THREAD | environment, **options
        )  # torch's launcher is forked, our scripts start
        result.code = result.returncode
        return checked(text, result)

    return run


def run_script(interpreter, code):
    """What a user's script in the project's folder prints."""
    (interpreter.home / "script.py").write_text(code, encoding="utf-8")
    return checked(code, SimpleNamespace(**interpreter.run(["script.py"]))).stdout


# ------------------------------------------------------------------------------------------------------ 数据处理


def test_data_method_2_without_arguments(guide, home):
    guide("python optimized_data_processing.py")
    assert (home / "dataset" / "pretrain_data.bin").stat().st_size > 10_000
    assert (home / "dataset" / "pretrain_data.json").exists() and (home / "dataset" / "data_stats.json").exists()


def test_data_method_1_in_python(home, interpreter):
    shutil.copy(home / "dataset" / "mobvoi_seq_monkey_general_open_corpus.jsonl", home / "dataset" / "raw_data.jsonl")
    before = (home / "dataset" / "pretrain_data.bin").read_bytes()
    code = """
from optimized_data_processing import OptimizedDataProcessor

# 创建处理器
processor = OptimizedDataProcessor(
    tokenizer_path='/path/to/tokenizer',
    max_length=512,
    chunk_size=50000,
    save_interval=1000000
)

# 验证和清洗数据
processor.validate_and_clean_jsonl(
    input_path='./dataset/raw_data.jsonl',
    output_path='./dataset/cleaned_data.jsonl'
)

# 处理数据集
processor.process_dataset(
    input_path='./dataset/cleaned_data.jsonl',
    output_path='./dataset/pretrain_data.bin',
    resume=True  # 支持断点续传
)

# 保存统计信息
processor.save_statistics('./dataset/data_stats.json')
"""
    run_script(
        interpreter, code.replace("/path/to/tokenizer", "model/tokenizer").replace("pretrain_data.bin", "val_data.bin")
    )
    assert (home / "dataset" / "cleaned_data.jsonl").exists()
    assert (home / "dataset" / "val_data.bin").read_bytes() == before  # cleaning first or in one pass: the same tokens


# ------------------------------------------------------------------------------------------------------ 模型训练

TRAINING = {
    "config": "python train.py --config config.yaml",
    "flags": """python train.py \\
    --epochs 15 \\
    --batch_size 32 \\
    --learning_rate 3e-4 \\
    --optimizer_type adamw \\
    --lr_scheduler cosine \\
    --use_ema \\
    --early_stopping \\
    --out_dir out""",
    "torchrun": """torchrun --nproc_per_node=2 train.py \\
    --config config.yaml \\
    --ddp""",
    "launch": """python -m torch.distributed.launch \\
    --nproc_per_node=2 \\
    train.py --config config.yaml --ddp""",
    "accumulation": """python train.py \\
    --batch_size 32 \\
    --accumulation_steps 4""",
    "bfloat16": "python train.py --dtype bfloat16",
    "float32": "python train.py --dtype float32",
    "linear": "python train.py --lr_scheduler linear",
    "polynomial": "python train.py --lr_scheduler polynomial",
    "out of memory": """python train.py \\
    --batch_size 8 \\
    --accumulation_steps 4 \\
    --dtype float16""",
    "speed": "python train.py --batch_size 64 --eval_interval 1000 --log_interval 100",
    "distributed, mixed precision": """torchrun --nproc_per_node=4 train.py \\
    --config config.yaml \\
    --ddp \\
    --dtype bfloat16 \\
    --batch_size 64 \\
    --use_ema""",
}


# torchrun starts four processes in the last one; two cost 17 s of CPU time and run nothing else.
@pytest.mark.parametrize("name", mostly(TRAINING, ["torchrun", "launch"]))
def test_training(guide, quick, home, name):
    shutil.rmtree(home / "out", ignore_errors=True)
    if name == "config":
        result, width = guide(TRAINING[name], FLAGS), 512
    else:
        run = quick if TRAINING[name].startswith("python train.py") else guide
        result, width = run(TRAINING[name], NARROW), 64
    assert "finished after step 2" in result.stderr
    files = {path.name for path in (home / "out").iterdir()}
    assert {f"pretrain_{width}.pth", "best_model.pth", "metrics.jsonl"} <= files


def test_resuming_from_a_step_and_from_the_interrupted_checkpoint(quick, home):
    quick("python train.py --config config.yaml", NARROW + " --save_interval 1")
    out = home / "out"
    shutil.copy(out / "checkpoint_step_1.pth", out / "checkpoint_interrupted.pth")
    command = "python train.py --resume --resume_from out/checkpoint_interrupted.pth"
    assert "at step 1" in quick(command).stderr  # its settings come from the checkpoint
    content = load_torch(out / "checkpoint_step_1.pth")  # as if 5,000 steps had been taken
    content["progress"]["step"] = 5000
    save_torch(out / "checkpoint_step_5000.pth", content)
    command = """python train.py \\
    --config config.yaml \\
    --resume \\
    --resume_from out/checkpoint_step_5000.pth"""
    result = quick(command, NARROW.replace("--max_steps 2", "--max_steps 5002"))
    assert "at step 5,000" in result.stderr and "finished after step 5,002" in result.stderr


def test_validation_data_and_early_stopping_in_the_config_file(quick, home):
    text = (home / "config.yaml").read_text(encoding="utf-8")
    text = text.replace("val_data_path: null", 'val_data_path: "./dataset/val_data.bin"')
    text = text.replace("early_stopping: false", "early_stopping: true")
    (home / "val_config.yaml").write_text(text, encoding="utf-8")
    result = quick("python train.py --config val_config.yaml", NARROW)
    assert "held out" not in result.stderr and "validation loss" in result.stderr


@pytest.mark.slow  # tests/runs/test_trackers.py keeps wandb offline, too
def test_wandb_that_cannot_be_reached_is_kept_offline(quick, home):
    command = """python train.py \\
    --config config.yaml \\
    --use_wandb \\
    --wandb_project "MateConv-Pretrain" \\
    --wandb_run_name "exp1\""""
    result = quick(command, f"{NARROW} --max_steps 200")  # which takes longer than wandb to begin
    assert "offline" in result.stderr and list((home / "out" / "wandb").glob("offline-run-*"))


# ------------------------------------------------------------------------------------------------------ 模型推理


@pytest.fixture(scope="module")
def trained(home, interpreter):
    """Weights of the default shape, from two small steps, at out/pretrain_512.pth and out/best_model.pth."""
    flags = "--max_steps 2 --batch_size 2 --max_seq_len 64 --eval_steps 1".split()
    assert interpreter.run(["train.py", "--config", "config.yaml", *flags])["code"] == 0


def test_single_generation(guide, trained):
    command = """python inference.py \\
    --model_path out/pretrain_512.pth \\
    --prompt "中国" \\
    --max_new_tokens 100 \\
    --temperature 0.8 \\
    --top_k 50 \\
    --top_p 0.9"""
    assert guide(command, "--max_new_tokens 20").stdout.startswith("中国")


def test_streaming(quick, trained):
    command = """python inference.py \\
    --model_path out/pretrain_512.pth \\
    --prompt "长江、" \\
    --stream"""
    assert quick(command, "--max_new_tokens 20").stdout.startswith("长江、")


def test_interactive_chat(guide, trained):
    command = """python inference.py \\
    --model_path out/best_model.pth \\
    --interactive \\
    --temperature 0.8 \\
    --top_p 0.9 \\
    --repetition_penalty 1.2 \\
    --stream"""
    text = guide(command, "--max_new_tokens 8", input="你好\n介绍一下中国\nclear\nexit\n").stdout
    rule = "=" * 80
    assert text.startswith(
        f"🤖 交互式对话模式\n{rule}\n输入 'exit'、'quit' 或 'q' 退出\n输入 'clear' 清空对话历史\n{rule}\n\n"
        "👤 用户: 你好\n🤖 助手: "
    )
    assert "\n\n👤 用户: 介绍一下中国\n🤖 助手: " in text and text.endswith("👤 用户: exit\n👋 再见！\n")


def test_batch_generation(quick, home, trained):
    prompts = ["中国", "长江、黄河", "你好，好久不见"]
    (home / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    command = """python inference.py \\
    --model_path out/pretrain_512.pth \\
    --batch_file prompts.txt"""
    text = quick(command, "--max_new_tokens 8").stdout
    assert [text.index(prompt) for prompt in prompts] == sorted(text.index(prompt) for prompt in prompts)


def test_less_repetition_without_a_model_path_or_a_prompt(quick, trained):
    command = """python inference.py \\
    --repetition_penalty 1.3 \\
    --no_repeat_ngram_size 3"""
    result = quick(command, "--max_new_tokens 8")
    assert result.stdout.strip() and "out/pretrain_512.pth" in result.stderr


def test_greedy_is_repeatable(quick, trained):
    command = 'python inference.py --model_path out/pretrain_512.pth --prompt "中国" --greedy --max_new_tokens 8'
    assert quick(command).stdout == quick(command).stdout


def test_python_api(interpreter, trained):
    code = """
import torch
from transformers import AutoTokenizer
from model.model import Transformer
from model.LMConfig import LMConfig
from optimized_inference import TextGenerator, GenerationConfig

# 加载模型
lm_config = LMConfig()
model = Transformer(lm_config)
model.load_state_dict(torch.load('out/pretrain_512.pth'))

# 加载分词器
tokenizer = AutoTokenizer.from_pretrained('/path/to/tokenizer')

# 创建生成器
generator = TextGenerator(model, tokenizer)

# 生成配置
gen_config = GenerationConfig(
    do_sample=True,
    temperature=0.8,
    top_k=50,
    top_p=0.9,
    max_new_tokens=100,
    repetition_penalty=1.2
)

# 单次生成
result = generator.generate("中国", gen_config)
print(result)

# 流式生成
def callback(token):
    print(token, end="", flush=True)

result = generator.generate(
    "长江、",
    gen_config,
    stream=True,
    callback=callback
)

# 批量生成
prompts = ["中国", "长江、", "你好"]
results = generator.batch_generate(prompts, gen_config)

# 多轮对话
history = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！有什么可以帮助你的吗？"},
    {"role": "user", "content": "介绍一下中国"}
]
response = generator.chat(history, gen_config)
"""
    code = code.replace("/path/to/tokenizer", "model/tokenizer").replace("max_new_tokens=100", "max_new_tokens=10")
    code += "assert len(results) == 3 and all(isinstance(t, str) for t in [result, response, *results])\n"
    assert run_script(interpreter, code).strip()


# --------------------------------------------------------------------------------------------------- 完整示例


def test_the_complete_example(quick, home):
    (home / "dataset" / "pretrain_data.bin").unlink()
    quick("python optimized_data_processing.py")
    command = """python train.py \\
    --epochs 15 \\
    --batch_size 32 \\
    --learning_rate 3e-4 \\
    --use_ema \\
    --use_wandb"""
    quick(command, NARROW)
    command = """python inference.py \\
    --model_path out/best_model.pth \\
    --prompt "中国" \\
    --stream"""
    assert quick(command).stdout.startswith("中国")
    assert Path(home / "out" / "previous").is_dir()  # the runs before it are all still there
