"""From pre-trained weights to a model that answers: tuned, talked to, exported. One run for all tests."""

import json
import sys

import pytest
import torch

import inference
import model.convert
from model.generation.judging import judge_answers
from model.generation.rows import Rows
from model.text.tokenization import EMBEDDED_TOKENIZER
from model.token_file.manifest import learn_path
from model.weights import load_weights
from optimized_inference import GenerationConfig, load_generator
from tests.chat_files import write_chats
from tests.tiny_runs import TINY, events, exit_code_here, train
from utils import run_command

pytestmark = pytest.mark.long
FACTS = dict(
    zip(
        "天 地 山 水 日 月 星 风 云 雨 花 草 人 马 牛 羊 鱼 鸟 金 木".split(),
        "一二 三 四五六 七 八九 十 百千 万 红 黄蓝 白 黑 东 西南 北 上下 左 右 春夏 秋冬".split(),
        strict=True,
    )
)
CHATS = [[("user", f"{key}？"), ("assistant", value)] for key, value in FACTS.items()]
GREEDY = GenerationConfig(do_sample=False, repetition_penalty=1, max_new_tokens=12)
SHAPE = {"dim": 64, "max_seq_len": 64, "device": "cpu", "compile": "false", "dtype": "float32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder `out` of a run that tuned `out/best_model.pth`, which lay there before."""
    folder = tmp_path_factory.mktemp("run")
    path = write_chats(folder / "chats.bin", CHATS, None)
    text = write_chats(folder / "texts.bin", CHATS, None)  # their ids are texts too: the manifest decides
    manifest = json.loads(text.with_suffix(".json").read_text())
    text.with_suffix(".json").write_text(json.dumps(manifest | {"chat": {}}))
    learn_path(text).unlink()
    flags = TINY | SHAPE | {"out_dir": folder / "out", "batch_size": 5}
    train({name: str(value) for name, value in (flags | {"train_data_path": text, "max_steps": 4}).items()})
    tuning = {
        "train_data_path": path, "val_data_path": path, "max_steps": 120,
        "init_from": folder / "out" / "best_model.pth",
        "optimizer_type": "muon", "learning_rate": 1e-2, "eval_interval": 120, "save_interval": 120, "log_interval": 50,
        "lr_scheduler": "linear", "weight_decay": 0,
    }  # fmt: skip
    given = ("dim", "n_layers", "n_heads", "n_kv_heads")  # by the weights
    assert exit_code_here({name: str(value) for name, value in (flags | tuning).items() if name not in given}) == 0
    return folder / "out"


@pytest.fixture
def generator(run):
    return load_generator(run / "best_model.pth", device="cpu")


def answers(generator) -> dict[str, str]:
    return {key: generator.chat([{"role": "user", "content": f"{key}？"}], GREEDY) for key in FACTS}


def test_it_answers_what_it_was_taught_and_stops(generator):
    assert answers(generator) == FACTS
    assert generator.end == "eos"


def test_the_log_says_how_many_held_out_answers_are_exact_and_stop(run):
    judged = [event for event in events(run) if "exact" in event][-1]
    assert judged["answers"] == 20 and judged["exact"] == judged["stopped"] == 1
    assert judged["repeated"] == judged["leaked"] == 0
    assert judged["answer_characters"] == judged["expected_characters"] == sum(map(len, FACTS.values())) / 20


def test_answers_are_judged():
    answers, ends = ["好", " 七步诗七步诗七步诗七步诗", "user\n你好", "不"], ["eos", "length", "eos", "eos"]
    judged = judge_answers(answers, ends, ["好", "七", "你", "是"])
    assert [judged[name] for name in ("exact", "stopped", "repeated", "leaked")] == [0.25, 0.75, 0.25, 0.25]


def test_the_weights_that_it_began_with_are_kept_beside_it(run):
    [earlier] = (run / "previous").iterdir()
    assert (earlier / "best_model.pth").exists() and (earlier / "pretrain_64.pth").exists()
    assert not (run / "pretrain_64.pth").exists() and (run / "sft_64.pth").exists()
    recorded = (run / "config.yaml").read_text(encoding="utf-8")
    assert f"init_from: {earlier / 'best_model.pth'}" in recorded
    assert load_weights(earlier / "best_model.pth").chat == {}


def talk(monkeypatch, capsys, cwd, *arguments) -> str:
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["inference.py", "--device", "cpu", *map(str, arguments)])
    monkeypatch.setattr("model.generation.chat_loop.prepare_input", lambda: None)  # which pytest's standard input lacks
    monkeypatch.setattr("model.generation.chat_loop.ask", iter(["天？", None]).__next__)
    with pytest.raises(SystemExit):
        run_command(inference.main)
    return "".join(capsys.readouterr())


def test_inference_takes_the_newest_final_weights_and_says_which(run, monkeypatch, capsys):
    said = talk(monkeypatch, capsys, run.parent, "--interactive", "--greedy")
    assert "weights out/sft_64.pth: the newest final weights under out/" in said
    assert f"🤖 助手: {FACTS['天']}\n" in said and "do not answer" not in said


def test_a_base_model_says_that_it_does_not_answer(run, monkeypatch, capsys):
    [earlier] = (run / "previous").iterdir()
    (run.parent / "q.jsonl").write_text('{"prompt": "q", "completion": "a"}', encoding="utf-8")
    for mode in (["--interactive"], ["--judge", "q.jsonl"]):
        arguments = (*mode, "--greedy", "--max_new_tokens", "3", "--model_path", earlier / "best_model.pth")
        assert "they continue what you write and do not answer" in talk(monkeypatch, capsys, run.parent, *arguments)
    said = talk(monkeypatch, capsys, run.parent, "--prompt", "天", "--max_new_tokens", "3")
    assert "these weights were tuned on chats: a prompt is continued as it stands" in said


def test_a_changed_template_of_the_tokenizer_does_not_change_the_answers(run, tmp_path):
    """The weights bring theirs along: the template is not part of tokenizer.json and its hash."""
    for file in EMBEDDED_TOKENIZER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert answers(load_generator(run / "best_model.pth", tmp_path, device="cpu")) == FACTS


def test_transformers_answers_alike_token_by_token(run, generator, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.convert.convert(run / "sft_64.pth", tmp_path / "hf", say=lambda line: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.generation_config.eos_token_id == 2
    for key in FACTS:
        history = [{"role": "user", "content": f"{key}？"}]
        ids = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
        assert ids == generator.encode_chat(history)
        written = theirs.generate(torch.tensor([ids]), do_sample=False, repetition_penalty=1.0, max_new_tokens=12)
        new = written[0, len(ids) :].tolist()
        assert new[-1] == 2 and tokenizer.decode(new[:-1]) == FACTS[key]
        ours = [event.token for event in generator.events([ids], GREEDY, Rows(generator.engine(), 1))]
        assert new[:-1] == ours[:-1] and ours[-1] is None


@pytest.mark.slow
def test_a_gguf_file_answers_alike(run, tmp_path):
    gguf = pytest.importorskip("gguf")
    model.convert.convert(run / "sft_64.pth", tmp_path / "a.gguf", say=lambda line: None)
    assert answers(load_generator(tmp_path / "a.gguf", device="cpu")) == FACTS
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    template = json.loads((run / "sft_64.json").read_text(encoding="utf-8"))["chat"]["template"]
    assert fields["tokenizer.chat_template"].contents() == template


@pytest.mark.slow
def test_exports_carry_the_template_and_the_ends_that_the_weights_record(run, tmp_path):
    weights = load_weights(run / "sft_64.pth")
    weights.chat = weights.chat | {"template": "{{ messages[0].content }}", "end_ids": [2, 5]}
    model.convert.write("transformers", tmp_path / "hf", weights)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
    gguf = pytest.importorskip("gguf")
    model.convert.write("gguf", tmp_path / "a.gguf", weights)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 5
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0].content }}"


@pytest.mark.parametrize("chat", [[], {"end_ids": [2]}, {"template": "", "template_sha256": "", "end_ids": [-1]}])
def test_a_damaged_description_is_one_line(run, tmp_path, chat, monkeypatch, capsys):
    (tmp_path / "w.pth").write_bytes((run / "sft_64.pth").read_bytes())
    described = json.loads((run / "sft_64.json").read_text(encoding="utf-8"))
    (tmp_path / "w.json").write_text(json.dumps(described | {"chat": chat}))
    said = talk(monkeypatch, capsys, tmp_path, "--interactive", "--model_path", tmp_path / "w.pth")
    assert "does not describe weights" in said and "Traceback" not in said
