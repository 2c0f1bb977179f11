"""`promptcache chat`."""

import contextlib
import signal
import sys
from collections.abc import Generator, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from promptcache import UsageError
from promptcache_cli import output
from promptcache_cli.commands.generate import (
    answer_as_json,
    explain_if_readable,
    read_options,
    sampling_options,
    streamed,
    usage_line,
)
from promptcache_cli.options import (
    cache_options,
    checked_text,
    load_generator,
    model_options,
    save_options,
    stdin,
    system_option,
    template_options,
)

if TYPE_CHECKING:
    from promptcache import Conversation, GenerationResponse

    Responses = Generator[GenerationResponse]

HELP = """\
/help     show this
/history  show the conversation
/undo     take back the last message and its answer
/exit     leave; so does Ctrl-D
Ctrl-C stops an answer and keeps what was said."""
# Arguments of `Conversation`; the others are about generating.
CONVERSATION_OPTIONS = ("name", "system", "tools", "chat_template_config")


@click.command()
@click.option("--name", help="Keep the conversation, to continue it later")
@model_options
@system_option
@template_options
@cache_options
@sampling_options
@click.option("--save/--no-save", default=True, help="Save what is said, or not")
@click.option("-u", "--usage", is_flag=True, help="Print a line of figures each turn")
@save_options
def chat(
    usage: bool,
    json_: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Hold a conversation that continues where it stopped

    Reads a message a line. Every turn reuses what was said before, and is saved, so
    that it is not read again after a restart either. With --name the conversation
    itself is kept, too. /help lists the commands. With --json each turn is printed as
    a line of JSON.

    Example:

    \b
        promptcache chat -s @narrator.txt --name dungeon
        promptcache chat --name dungeon
    """
    from promptcache.chat.conversation import Conversation
    from promptcache.models.settings import Settings

    # Checked before the model is loaded, which takes longer.
    Settings.of(**read_options(options))
    console = output.Console(quiet=quiet)
    beginning = {name: options.pop(name) for name in CONVERSATION_OPTIONS}
    with (
        load_generator(options, console) as generator,
        Conversation(generator, **beginning) as conversation,
    ):
        _Session(conversation, console, options, json_=json_, usage=usage).run()


class _Session:
    """Reads messages and shows the answers until the input ends."""

    def __init__(
        self,
        conversation: "Conversation",
        console: output.Console,
        options: dict[str, Any],
        *,
        json_: bool,
        usage: bool,
    ) -> None:
        self._conversation = conversation
        self._console = console
        self._options = options
        self._json = json_
        self._usage = usage

    def run(self) -> None:
        if num_turns := self._conversation.num_turns:
            self._console.info(
                f"Continuing after turn {num_turns}, /history shows them all"
            )
        if not self._conversation.is_answered:
            self._show(None)
        for line in _lines():
            if line.startswith("/"):
                if line == "/exit":
                    return
                self._run_command(line)
            elif line:
                self._show(line)

    def _run_command(self, command: str) -> None:
        if command == "/help":
            output.say_text(HELP)
        elif command == "/history":
            for message in self._conversation.messages:
                output.say_text(f"{message['role']}: {message['content']}")
        elif command == "/undo":
            undone = self._conversation.undo()
            self._console.info("Taken back" if undone else "Nothing to take back")
        else:
            output.say(f"No command {command}, /help lists them")

    def _show(self, text: str | None) -> None:
        """Show an answer as it comes; after an error, the next message is read.

        Without a text, it answers the message that has no answer yet.
        """
        shown: list[GenerationResponse] = []
        explanation = None
        try:
            if text is not None:
                checked_text(text)
            if self._usage:
                explanation = explain_if_readable(
                    self._conversation.explain, text, **read_options(self._options)
                )
            with self._console.progress("Reading", "tokens") as progress:
                responses = self._answer(text, progress)
                with contextlib.closing(responses):
                    stoppable = _until_interrupted(responses)
                    for response in streamed(stoppable, echo=not self._json):
                        shown.append(response)
        except UsageError as error:
            output.fail(error)
        except KeyboardInterrupt:
            self._console.info("Stopped before the answer began")
        if shown and self._json:
            output.json_line(answer_as_json(shown))
        if shown and self._usage:
            output.say(usage_line(shown[-1], explanation))

    def _answer(self, text: str | None, progress: Any) -> "Responses":
        options = {**self._options, "prompt_progress_callback": progress}
        if text is None:
            return self._conversation.answer(**options)
        return self._conversation.say(text, **options)


def _lines() -> Iterator[str]:
    """Yield the lines of stdin, on a terminal with a prompt and editing."""
    if not output.is_terminal(sys.stdin):
        yield from (line.strip() for line in stdin())
        return
    # Gives `input` its editing.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield _ask().strip()
        except KeyboardInterrupt:
            output.say_text("\nCtrl-D or /exit leaves")
        except EOFError:
            output.say()
            return


def _ask() -> str:
    """Return a line that is typed; stdout is for answers if not a terminal."""
    if output.is_terminal(sys.stdout):
        return input("> ")
    output.say("> ", end="")
    return input()


def _until_interrupted(responses: "Responses") -> Iterator["GenerationResponse"]:
    """Pass responses on, and stop between two of them after Ctrl-C.

    Before the first one, which can take long, Ctrl-C takes effect at once. An
    interrupted step would leave the cache in between two tokens, and the answer could
    not be saved.
    """
    interrupted: list[int] = []
    started: list[bool] = []

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if not started:
            raise KeyboardInterrupt
        interrupted.append(number)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        for response in responses:
            started.append(True)
            yield response
            if interrupted:
                return
    finally:
        signal.signal(signal.SIGINT, before)
