"""A chat at a terminal or through a pipe, with an `optimized_inference.TextGenerator`."""

import sys

from model.command import print_text, say
from model.errors import InputError
from model.generation.generation_config import GenerationConfig
from model.terminal import prepare_input, read_message

RULE = "=" * 80
CONTINUES = "these weights were trained on texts: they continue what you write and do not answer (docs/chat.md)"
ANSWERS = "these weights were tuned on chats: a prompt is continued as it stands; --interactive answers it"


def run_interactive(generator, config: GenerationConfig, show_speed: bool = False) -> None:
    """Chat until the user leaves. Ctrl-C stops an answer; its part so far stays in the history.

    Status lines appear on stderr, before the transcript or between two turns.
    """
    if generator.chat_format == {}:
        say(CONTINUES)
    generator.prepare_chat(config)
    lines: list[str] = []
    generator.say = lines.append
    prepare_input()
    print(f"🤖 交互式对话模式\n{RULE}\n输入 'exit'、'quit' 或 'q' 退出\n输入 'clear' 清空对话历史\n{RULE}\n")
    history: list[dict[str, str]] = []
    while (message := ask()) is not None and message.lower() not in ("exit", "quit", "q"):
        if message.lower() == "clear":
            history = []
            print("✨ 对话历史已清空\n")
        elif message:
            history = answer(generator, config, [*history, {"role": "user", "content": message}])
            for line in lines:
                say(line)
            if show_speed:
                say_speed(generator)
            if (lines or show_speed) and sys.stderr.isatty():
                say("")
            lines.clear()
    print("👋 再见！")


def ask() -> str | None:
    """The user's next message; None on Ctrl-C or Ctrl-D."""
    try:
        message = read_message("👤 用户: ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    if not sys.stdin.isatty():
        print_text(message)  # a terminal shows what is typed; a transcript of a pipe should read the same
    return message


def answer(generator, config: GenerationConfig, history: list[dict[str, str]]) -> list[dict[str, str]]:
    """Stream an answer to the last message.

    Returns:
        the history with the answer, or without that message if it cannot be answered.
    """
    said: list[str] = []
    begun = False

    def keep_and_show(piece: str) -> None:
        said.append(piece)
        show(piece)

    try:
        history = generator.fit_history(history, config)
        show("🤖 助手: ")
        begun = True
        generator.chat(history, config, stream=True, callback=keep_and_show)
    except InputError as error:
        if begun:
            print()
        say(f"error: {error}")
        print()
        return history[:-1]
    except KeyboardInterrupt:
        pass  # the part so far stays in the history
    print("\n")
    return [*history, {"role": "assistant", "content": "".join(said)}]


def show(text: str) -> None:
    """Print a piece of text where the last one ended."""
    print_text(text, end="")


def say_speed(generator) -> None:
    """One line on how fast the last text was generated, and whether the context cut it off."""
    if generator.speed is not None:
        context = generator.model.config.max_seq_len
        why = f"; the text ends because the context of {context} tokens is full" if generator.end == "context" else ""
        say(f"speed: {generator.speed}{why}")
