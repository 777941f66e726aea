"""The server's page in a browser: what a reader sees, and what the server is asked for."""

import json
import re
import shutil
from pathlib import Path

import pytest

from model.weights import Weights, save_weights
from tests.conftest import random_model
from tests.serving.conftest import running_server, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright (pip install playwright)")
pytestmark = pytest.mark.long  # a new browser context alone takes half a second on a slow machine
expect = sync_api.expect

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CONTEXT = 4096  # a text of that length takes seconds: it can be stopped
DESKTOP = {"width": 1360, "height": 860}  # the settings are a column
MARKUP = '<script>window.ran = 1</script><img src="x" onerror="window.ran = 1"><b>bold</b>'
PAST_THE_EDGE = """() => [...document.querySelectorAll("body *")].filter(node =>
    !node.closest("pre, svg") && getComputedStyle(node).visibility !== "hidden"
    && node.getBoundingClientRect().right > innerWidth + 1).map(node => node.outerHTML.slice(0, 100))"""


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory, tokenizer_folder):
    """Weights that write to the context's end: the end token's logit is 0, and others' are higher."""
    import torch

    from model.LMConfig import LMConfig
    from model.text.tokenization import load_tokenizer, tokenizer_sha256

    config = LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=CONTEXT)
    model, end = random_model(config), load_tokenizer(tokenizer_folder).eos_token_id
    with torch.no_grad():
        model.output.weight[end] = 0
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    save_weights(path, Weights(model.state_dict(), config, str(tokenizer_folder), tokenizer_sha256(tokenizer_folder)))
    return path


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        installed = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
        path = next(installed, playwright.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("browser tests need Chromium (playwright install chromium)")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Open the page as a new visitor. At the end the console is empty, and no other origin was asked for anything."""
    contexts, messages, addresses = [], [], []

    def visit(port=server.port, ready=True, expected="nothing", greedy=None, **options):
        context = browser.new_context(**{"locale": "en-US", "viewport": DESKTOP, "reduced_motion": "reduce", **options})
        context.set_default_timeout(15_000)
        contexts.append(context)
        own = f"http://127.0.0.1:{port}/"
        context.on("request", lambda request: addresses.append((request.url, own)))
        context.on("weberror", lambda error: messages.append(str(error.error)))
        context.on("console", lambda message: expected in message.text or messages.append(message.text))
        if greedy:  # what set_greedy(page, greedy) leaves behind, in less time
            kept = json.dumps({"temperature": 0, "repetition_penalty": 1, "max_tokens": greedy, "plain": True})
            context.add_init_script(f"if (origin !== 'null') localStorage['mateconv.settings'] ??= '{kept}'")
        page = context.new_page()
        page.goto(own)
        if ready:
            expect_ready(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert messages == []
    assert [url for url, own in addresses if not url.startswith((own, "data:", "blob:" + own))] == []


def expect_ready(page) -> None:
    page.wait_for_selector("#model-name:has-text('tiny')", state="attached")


def idle(page) -> None:
    page.wait_for_selector("body:not(.busy)")


def set_number(page, **values) -> None:
    """Type numbers into the settings."""
    for name, value in values.items():
        page.fill(f"#set-{name}", str(value))
        page.press(f"#set-{name}", "Enter")


def set_greedy(page, max_tokens: int) -> None:
    """The likeliest tokens, shown as they came."""
    set_number(page, temperature=0, repetition_penalty=1, max_tokens=max_tokens)
    page.check("#set-plain")


def request_of(page, action) -> dict:
    """Do what sends a request, and wait for the answer's end -> what was sent."""
    with page.expect_request(lambda request: request.method == "POST") as sent:
        action()
    idle(page)
    return sent.value.post_data_json


def ask(page, text: str) -> dict:
    page.fill("#input", text)
    return request_of(page, lambda: page.press("#input", "Enter"))


def press(page, name: str, role: str = "assistant") -> None:
    """A button below the last message of that role."""
    page.locator(f'[data-role="{role}"] .foot button', has_text=name).last.click()


def shown(page, role: str = "assistant") -> list[str]:
    return page.locator(f'[data-role="{role}"] .text').all_text_contents()


def choice_of(server, sent: dict) -> dict:
    """What the API answers to the same request in one piece."""
    body = {name: value for name, value in sent.items() if not name.startswith("stream")}
    status, _, found = server.call("POST", CHAT if "messages" in sent else TEXT, body)
    assert status == 200, found
    return found["choices"][0]


def answer_to(server, sent: dict) -> str:
    """The text of that."""
    choice = choice_of(server, sent)
    return choice["message"]["content"] if "messages" in sent else choice["text"]


def test_an_answer_is_the_apis(visit, server):
    page = visit()
    set_greedy(page, 60)
    sent = ask(page, "你好")
    assert sent["messages"] == [{"role": "user", "content": "你好"}] and sent["truncation"] == "auto"
    assert (sent["temperature"], sent["repetition_penalty"], sent["max_tokens"]) == (0, 1, 60)
    assert shown(page) == [answer_to(server, sent)]
    facts = page.locator(".facts").inner_text()
    assert "60 tokens" in facts and "cut off at the token limit" in facts
    assert re.search(r"\d+ / 4,096", page.locator("#context").inner_text())
    assert re.search(r"[\d.]+ tokens/s", page.locator("#speed").inner_text())
    sent = ask(page, "春风")
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert shown(page)[1] == answer_to(server, sent)


def test_stop_keeps_what_came_and_frees_the_row(visit, server, metric):
    page = visit(greedy=CONTEXT)
    page.fill("#input", "你好")
    page.press("#input", "Enter")
    text = page.locator('[data-role="assistant"][aria-busy="true"] .text')
    lengths = []
    for _ in range(3):  # it grows while it is written
        wait_until(lambda: len(text.text_content()) > lengths[-1] if lengths else text.text_content())
        lengths.append(len(text.text_content()))
    assert metric("requests_running") == 1
    page.click("#stop")
    idle(page)
    wait_until(lambda: metric("requests_running") == 0, 5)
    partial = shown(page)[0]
    assert len(partial) >= lengths[-1] and "stopped by you" in page.locator(".facts").inner_text()
    most = len(partial.encode()) + 50
    body = {"messages": [{"role": "user", "content": "你好"}], "temperature": 0, "repetition_penalty": 1}
    assert answer_to(server, {**body, "max_tokens": most}).startswith(partial)
    page.reload()
    expect_ready(page)
    assert shown(page) == [partial]


def test_a_reload_in_the_middle_of_an_answer_keeps_what_came(visit, metric):
    page = visit(greedy=CONTEXT)
    page.fill("#input", "你好")
    page.press("#input", "Enter")
    text = page.locator('[data-role="assistant"][aria-busy="true"] .text')
    wait_until(text.text_content)
    before = text.text_content()
    page.reload()
    expect_ready(page)
    assert shown(page)[0].startswith(before) and "stopped by you" in page.locator(".facts").inner_text()
    wait_until(lambda: metric("requests_running") == 0, 5)


def test_edit_and_resend(visit, server):
    page = visit(greedy=10)
    ask(page, "first")
    ask(page, "second")
    page.locator('[data-role="user"] .foot button', has_text="Edit").first.click()
    page.fill(".editing textarea", "not this")
    page.press(".editing textarea", "Escape")
    assert shown(page, "user") == ["first", "second"]
    page.locator('[data-role="user"] .foot button', has_text="Edit").first.click()
    page.fill(".editing textarea", "changed")
    sent = request_of(page, lambda: page.click(".editing .primary"))
    assert sent["messages"] == [{"role": "user", "content": "changed"}]
    assert shown(page, "user") == ["changed"] and shown(page) == [answer_to(server, sent)]


@pytest.mark.slow
def test_regenerate(visit, server):
    page = visit(greedy=30)
    ask(page, "你好")
    before = shown(page)[0]
    set_number(page, temperature=2, seed=5)
    sent = request_of(page, lambda: press(page, "Regenerate"))
    assert sent["messages"] == [{"role": "user", "content": "你好"}] and sent["seed"] == 5
    assert len(shown(page)) == 1 and shown(page)[0] == answer_to(server, sent) != before


@pytest.mark.slow
def test_continue_an_answer(visit, server):
    page = visit(greedy=30)
    ask(page, "你好")
    begun = shown(page)[0].removesuffix("\ufffd")  # half a character would mislead the model
    sent = request_of(page, lambda: press(page, "Continue"))
    assert sent["continue_final_message"] and sent["messages"][-1] == {"role": "assistant", "content": begun}
    assert shown(page) == [begun + answer_to(server, sent)]
    assert "60 tokens" in page.locator(".facts").inner_text()


@pytest.mark.slow
def test_several_conversations_outlast_a_reload(visit):
    page = visit(greedy=10)
    ask(page, "first")
    ask(page, "more of the first")
    first = shown(page)
    page.click("#new-chat")
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "second")
    second = shown(page)
    titles = page.locator("#chats .open")
    assert titles.all_inner_texts() == ["second", "first"]
    page.reload()
    expect_ready(page)
    assert shown(page, "user") == ["second"] and shown(page) == second
    assert page.input_value("#set-temperature") == "0"
    titles.nth(1).click()
    assert shown(page, "user") == ["first", "more of the first"] and shown(page) == first
    page.locator("#chats .current button").nth(1).click()
    page.fill("#chats input", "another name")
    page.press("#chats input", "Enter")
    assert titles.all_inner_texts() == ["second", "another name"]
    page.locator("#chats .current button").nth(2).click()
    assert titles.all_inner_texts() == ["second"] and shown(page) == []
    page.click("#notice-action")  # undo
    assert sorted(titles.all_inner_texts()) == ["another name", "second"] and shown(page) == first


def test_an_answer_goes_on_while_another_conversation_is_open(visit):
    page = visit(greedy=300)
    page.fill("#input", "long")
    with page.expect_request("**" + CHAT):
        page.press("#input", "Enter")
    page.click("#new-chat")
    page.click("#mode-text")
    expect(page.locator("#stop")).to_be_visible()
    page.click("#mode-chat")
    assert shown(page) == []
    idle(page)
    page.locator("#chats .open").first.click()
    assert shown(page, "user") == ["long"] and "300 tokens" in page.locator(".facts").inner_text()


def test_export_and_import(visit, tmp_path):
    page = visit(greedy=10)
    ask(page, "first")
    page.click("#new-chat")
    ask(page, "second")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "chats.json")
    kept = json.loads((tmp_path / "chats.json").read_text(encoding="utf-8"))["conversations"]
    assert [[message["content"] for message in chat["messages"]][0] for chat in kept] == ["second", "first"]
    other = visit()
    for count in (2, 0):  # what is there already is not added again
        other.set_input_files("#import-file", tmp_path / "chats.json")
        expect(other.locator("#notice-text")).to_have_text(f"Imported {count} conversations.")
        other.click("#notice-close")
    assert other.locator("#chats .open").all_inner_texts() == ["second", "first"]
    other.locator("#chats .open").nth(0).click()
    assert shown(other, "user") == ["second"] and shown(other) == shown(page)
    damaged = {"format": "mateconv-conversations", "version": 1, "conversations": [{"id": "1", "messages": [{}]}]}
    for content, why in ((b"{", "not an export"), (json.dumps(damaged).encode(), "messages[0].role")):
        other.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": content})
        expect(other.locator("#notice-text")).to_contain_text(why)
    assert other.locator("#chats .open").count() == 2


@pytest.mark.slow
def test_settings_begin_as_the_server_s_flags_and_what_is_changed_stays(visit, weights_file):
    flags = ["--greedy", "--max_new_tokens", "9", "--stop_strings", "完", "--seed", "5", "--repetition_penalty", "3"]
    with running_server(weights_file, *flags) as server:
        page = visit(server.port)
        values = {"temperature": "0", "max_tokens": "9", "stop_strings": "完", "seed": "5", "repetition_penalty": "3"}
        assert {name: page.input_value(f"#set-{name}") for name in values} == values
        set_number(page, max_tokens=11)
        page.reload()
        expect_ready(page)
        values["max_tokens"] = "11"
        assert {name: page.input_value(f"#set-{name}") for name in values} == values
        sent = ask(page, "春风")
        assert sent["max_tokens"] == 11 and sent["seed"] == 5
        assert not {"temperature", "repetition_penalty", "stop"} & sent.keys()  # the server's own
        set_number(page, temperature=1, seed="")
        page.fill("#set-stop_strings", "")
        sent = ask(page, "春风")
        assert (sent["temperature"], sent["stop"]) == (1, []) and "seed" in sent  # drawn: else the server's would count
        page.click("#reset")
        assert page.input_value("#set-max_tokens") == "9"


def test_settings_reach_the_request(visit):
    page = visit()
    page.locator("#set-temperature-range").fill("1.25")
    numbers = {"top_p": 0.33, "top_k": 7, "max_tokens": 5, "repetition_penalty": 1.05}
    numbers |= {"presence_penalty": -0.5, "frequency_penalty": 0.75, "seed": 42}
    set_number(page, **numbers)
    page.fill("#set-stop_strings", "完\n\\n\\n")
    page.fill("#set-system", "你是诗人")
    sent = ask(page, "春风")
    assert sent == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "你是诗人"}, {"role": "user", "content": "春风"}],
        "truncation": "auto",
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "temperature": 1.25,
        "stop": ["完", "\n\n"],
        **numbers,
    }
    set_number(page, top_p=0, temperature=9)  # what the server would refuse
    assert page.input_value("#set-top_p") == "0.01" and page.input_value("#set-temperature") == "2"
    page.click("#reset")
    values = {name: float(page.input_value(f"#set-{name}")) for name in ["temperature", *numbers][:-1]}
    assert values == dict(zip(values, (0.8, 0.9, 50, 256, 1.1, 0, 0), strict=True))
    assert [page.input_value(f"#set-{name}") for name in ("seed", "stop_strings", "system")] == [""] * 3


@pytest.mark.slow
def test_the_oldest_turns_of_a_long_conversation_are_left_out(visit):
    page = visit(greedy=5)
    ask(page, "春" * 1200)  # some 3,000 tokens
    ask(page, "风" * 1200)
    assert len(shown(page)) == 2 and page.locator(".failed").count() == 0
    assert page.locator(".facts").last.inner_text().startswith("5 tokens")
    assert "the 2 oldest messages no longer fit" in page.locator(".facts").last.inner_text()


def test_an_error_is_told_and_can_be_tried_again(visit):
    page = visit(expected="400", greedy=5)
    ask(page, "春" * 4000)
    assert "failed: The text is longer than the model’s context." in page.locator(".failed").inner_text()
    press(page, "Edit", "user")
    page.fill(".editing textarea", "春")
    request_of(page, lambda: page.press(".editing textarea", "Enter"))
    assert page.locator(".failed").count() == 0 and shown(page)[0]


@pytest.mark.slow
def test_dark_by_the_toggle(visit):
    page = visit(color_scheme="light")

    def luminance(of: str) -> float:
        color = page.locator("body").evaluate(f"node => getComputedStyle(node).{of}")
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 765

    assert luminance("backgroundColor") > 0.9 and luminance("color") < 0.2
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "light"
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.reload()
    expect_ready(page)
    assert page.get_attribute("html", "data-theme") == "dark"
    assert luminance("backgroundColor") < 0.15 and luminance("color") > 0.8
    assert visit(color_scheme="dark").get_attribute("html", "data-theme") == "dark"  # as the system says


@pytest.mark.slow
def test_a_phone_s_width_is_enough(visit):
    page = visit(viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)
    assert page.evaluate(PAST_THE_EDGE) == []
    page.click("#settings-button")
    set_number(page, max_tokens=40)
    assert page.evaluate(PAST_THE_EDGE) == []
    page.click("#settings-close")
    ask(page, "a" * 120 + " " + MARKUP)
    assert page.evaluate(PAST_THE_EDGE) == []
    page.click("#chats-button")
    expect(page.locator("#chats .open")).to_be_visible()
    page.keyboard.press("Escape")
    page.click("#mode-text")
    page.fill("#text-prompt", "春风")
    page.check("#show-probabilities")
    request_of(page, lambda: page.click("#continue"))
    page.locator(".token").nth(5).click()
    assert page.evaluate(PAST_THE_EDGE) == []
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [360, 360]


def test_markup_in_a_message_stays_text(visit):
    page = visit()
    set_number(page, max_tokens=5)
    ask(page, MARKUP)
    assert shown(page, "user") == [MARKUP] and page.locator("#chats .open").text_content() == MARKUP[:60]
    messages = [
        {"role": "user", "content": MARKUP},
        {"role": "assistant", "content": f"{MARKUP}\n# {MARKUP}\n- {MARKUP}"},
    ]
    chats = [{"id": "<img src=x>", "title": MARKUP, "updated": 1e15, "messages": messages}]
    content = json.dumps({"format": "mateconv-conversations", "version": 1, "conversations": chats}).encode()
    page.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": content})
    page.locator("#chats .open").first.click()
    assert shown(page, "user") == [MARKUP]
    assert page.locator('[data-role="assistant"] .text > *').all_text_contents() == [MARKUP] * 3
    assert page.locator(":is(#log, #chats, #notice) :is(script, img, b)").count() == 0
    assert page.evaluate("window.ran") is None


def test_enter_in_an_input_method_does_not_send(visit):
    page = visit()
    page.fill("#input", "nihao")
    for state in ("isComposing: true", "keyCode: 229"):
        event = f"new KeyboardEvent('keydown', {{key: 'Enter', {state}, bubbles: true, cancelable: true}})"
        assert page.locator("#input").evaluate(f"node => node.dispatchEvent({event})")  # left to the input method
    page.press("#input", "Shift+Enter")
    assert page.input_value("#input") == "nihao\n" and shown(page, "user") == []


def test_text_is_continued_as_the_api_does(visit, server):
    page = visit()
    set_greedy(page, 60)
    page.click("#mode-text")
    page.fill("#text-prompt", "春风")
    sent = request_of(page, lambda: page.press("#text-prompt", "Control+Enter"))
    assert sent["prompt"] == "春风" and "truncation" not in sent
    text, told = answer_to(server, sent), choice_of(server, sent)
    assert page.locator("#continuation").text_content() == text
    sent = request_of(page, lambda: page.click("#continue"))  # goes on where the text ended
    assert sent["prompt"] == told["prompt_token_ids"] + told["token_ids"]
    added = choice_of(server, sent)["logprobs"]["content"]
    joined = b"".join(bytes(token["bytes"]) for token in [*told["logprobs"]["content"], *added])
    assert page.locator("#continuation").text_content() == joined.decode("utf-8", "replace")
    page.fill("#set-stop_strings", text[10:13])
    sent = request_of(page, lambda: page.click("#continuation-foot button:text('Regenerate')"))
    until = page.locator("#continuation").text_content()
    assert until == answer_to(server, sent) == text[: text.find(text[10:13])]
    page.fill("#text-prompt", "春")  # what was written of another text goes
    assert page.locator("#result").is_hidden()
    page.fill("#text-prompt", "春风")
    page.fill("#set-stop_strings", text[10:13])
    sent = request_of(page, lambda: page.click("#continue"))
    assert sent["prompt"] == "春风" and page.locator("#continuation").text_content() == until
    page.click("#use-as-prompt")
    prompt = "春风" + until.removesuffix("\ufffd")  # half a character would mislead the model
    assert page.input_value("#text-prompt") == prompt and page.locator("#result").is_hidden()
    page.reload()
    expect_ready(page)
    assert page.input_value("#text-prompt") == prompt


def test_probabilities_alternatives_and_branches(visit, server):
    page = visit(greedy=20)
    page.click("#mode-text")
    page.fill("#text-prompt", "春风")
    sent = request_of(page, lambda: page.click("#continue"))
    text = page.locator("#continuation").text_content()
    told = choice_of(server, sent)
    tokens = told["logprobs"]["content"]
    page.check("#show-probabilities")
    chips, choices = page.locator(".token"), page.locator("#alternatives .alternative")
    assert chips.count() == len(tokens) == 20
    chips.nth(7).click()
    assert choices.count() == 5 and page.locator("#alternatives .taken").count() == 1
    percent = float(choices.first.locator(".number").inner_text().rstrip("%"))
    assert percent == pytest.approx(100 * 2.718281828 ** tokens[7]["logprob"], abs=0.06)
    page.keyboard.press("Escape")
    expect(page.locator("#alternatives")).to_be_hidden()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")  # the next one's
    branched = request_of(page, lambda: choices.nth(1).click())
    other = tokens[8]["top_logprobs"][1]
    assert branched["prompt"] == told["prompt_token_ids"] + [token["id"] for token in tokens[:8]] + [other["id"]]
    assert chips.count() == 29 and page.locator(".token.chosen").count() == 1
    page.uncheck("#show-probabilities")
    joined, told = page.locator("#continuation").text_content(), choice_of(server, branched)
    written = [*tokens[:8], other, *told["logprobs"]["content"]]
    assert joined == b"".join(bytes(token["bytes"]) for token in written).decode("utf-8", "replace") != text
    assert joined.endswith(told["text"])


def test_a_wrong_key_asks_for_one(visit, weights_file, tmp_path):
    (tmp_path / "key").write_text("sekret\n")
    with running_server(weights_file, "--api_key_file", str(tmp_path / "key")) as server:
        page = visit(server.port, ready=False, expected="Failed to load resource")
        dialog = page.locator("#key-dialog")
        for key in ("wrong", "sekret"):
            expect(dialog).to_be_visible()
            page.fill("#key", key)
            with page.expect_response("**/v1/models") as answered:
                page.press("#key", "Enter")
            assert answered.value.status == (401 if key == "wrong" else 200)
            if key == "wrong":
                expect(page.locator("#key-hint")).to_contain_text("This key is wrong")
        expect_ready(page)
        expect(dialog).to_be_hidden()
        set_number(page, max_tokens=5)
        ask(page, "你好")
        assert "5 tokens" in page.locator(".facts").inner_text() and page.locator("#notice").is_hidden()
        page.reload()  # the key is kept for this tab
        expect_ready(page)
        assert "sekret" not in page.evaluate("JSON.stringify(localStorage)")
    ask(page, "还在吗")  # the server went away
    assert "The server can’t be reached" in page.locator(".failed").inner_text()


@pytest.mark.parametrize("locale, lang, send", [("zh-CN", "zh-CN", "发送"), ("fr-FR", "en", "Send")])
def test_the_language_is_the_browsers(visit, locale, lang, send):
    page = visit(locale=locale)
    assert page.get_attribute("html", "lang") == lang and page.locator("#send").inner_text() == send
    assert page.locator("#settings h2").inner_text() == {"发送": "设置", "Send": "Settings"}[send]
    assert (page.get_attribute("#input", "placeholder") == "输入消息") == (lang == "zh-CN")
    unnamed = """() => [...document.querySelectorAll("input, textarea, button")].filter(node =>
        !(node.labels?.length || node.getAttribute("aria-label") || node.textContent.trim())).map(node => node.id)"""
    assert page.evaluate(unnamed) == ["notice-action"]  # named when it is shown
    page.click("#language")
    assert page.locator("#send").inner_text() == {"发送": "Send", "Send": "发送"}[send]
    page.reload()
    expect_ready(page)
    assert page.locator("#send").inner_text() == {"发送": "Send", "Send": "发送"}[send]
