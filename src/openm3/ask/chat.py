"""`openm3 chat`: talk to a model in the terminal, about documents if you like."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import Any

import torch

from openm3.ask.conversation import Conversation
from openm3.ask.documents import Document, collect
from openm3.ask.media import Shown, content, look
from openm3.ask.terminal import Bar, Voice, show_notes, write
from openm3.errors import OpenM3Error
from openm3.model.model import Model, load
from openm3.tokens.media import Kind

HELP = """\
/file PATH   read a file, folder or glob; it goes with your next message
/image PATH  show a picture with your next message
/video PATH  show a video with it
/reset       forget the conversation and its files
/help        show this
/quit        leave; so does Ctrl-D
Ctrl-C stops the answer."""


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends. Raises OpenM3Error if there is no model or no such file to begin with."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = load(args.model, dtype=getattr(torch, args.dtype), weights=args.weights)
    talk = Talk(model, args.thinking, args.max_new_tokens)
    for path in args.file or ():
        talk.add_file(path)
    for path in args.image or ():
        talk.show(path, "image")
    for path in args.video or ():
        talk.show(path, "video")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ModuleNotFoundError):
            import readline  # noqa: F401  # its import gives input() history and editing
        write(f"{args.model}: /help for help, Ctrl-D to leave\n")
    while True:
        try:
            line = input("> " if is_terminal else "")
        except EOFError:
            write("\n" if is_terminal else "")
            return 0
        except KeyboardInterrupt:
            write("\n")
            continue
        try:
            if not talk.take(line.strip()):
                return 0
        except OpenM3Error as error:
            write(f"error: {error}\n", sys.stderr)
        except KeyboardInterrupt:
            write("interrupted: the message is not part of the conversation\n", sys.stderr)


class Talk:
    """A conversation, and what its user may type."""

    def __init__(self, model: Model, thinking: str, max_new_tokens: int) -> None:
        self.messages: list[dict[str, Any]] = []
        self._thinking = thinking
        self._max_new_tokens = max_new_tokens
        self._conversation = Conversation(model)
        self._documents: list[Document] = []
        self._shown: list[Shown] = []
        self._seen: list[Shown] = []

    def take(self, line: str) -> bool:
        """Do what one line says; False to leave. Raises OpenM3Error and leaves the conversation as it was."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/help":
            write(HELP + "\n")
        elif word == "/reset":
            self.messages, self._documents, self._shown, self._seen = [], [], [], []
        elif word == "/file" and rest.strip():
            self.add_file(rest.strip())
        elif word in ("/image", "/video") and rest.strip():
            self.show(rest.strip(), "image" if word == "/image" else "video")
        elif word.startswith("/"):
            write(f"{word} is no command, or lacks its PATH: see /help\n", sys.stderr)
        elif line:
            self.say(line)
        return True

    def add_file(self, path: str) -> None:
        """Put documents before the next message. Raises DocumentError."""
        found = collect([path])
        show_notes(found)
        self._documents += found.documents
        write(f"{len(found.documents)} file(s), {sum(len(d.text) for d in found.documents):,} characters\n", sys.stderr)

    def show(self, path: str, kind: Kind) -> None:
        """Put a picture or video before the next message. Raises PromptError."""
        shown = look(path, kind)
        self._shown.append(shown)
        write(f"{shown.line()}\n", sys.stderr)

    def say(self, text: str) -> None:
        """Send a message and write the reply. Raises PromptError if the conversation has grown too long.

        Interrupted while reading, or with nothing written, the message is taken back; a reply cut short is kept.
        """
        messages = [*self.messages, {"role": "user", "content": content(self._shown, self._documents, text)}]
        seen = [*self._seen, *self._shown]
        media = [one.media for one in seen]
        ids = self._conversation.encode(
            messages, thinking=self._thinking, max_new_tokens=self._max_new_tokens, media=media
        )
        with Bar() as bar:
            reply = self._conversation.reply(
                ids,
                thinking=self._thinking,
                max_new_tokens=self._max_new_tokens,
                media=media,
                on_progress=bar.update,
                on_text=Voice().say,
            )
        write("\n" if reply.stop == "end" else f" [{reply.stop}]\n")
        if reply.stop == "interrupted" and not reply.text:
            return
        self.messages = [*messages, {"role": "assistant", "content": reply.text}]
        self._documents, self._shown, self._seen = [], [], seen
