"""Three questions about a real long document: held-out source of Python's standard library, read once.

    python examples/demo.py                    # what `make demo` runs
    python examples/demo.py --tokens 4000      # a shorter document
    python examples/demo.py --model DIR        # another checkpoint

Two questions ask for a line that stands somewhere in it, the third for one that does not. The model has not seen these
files in training, and its attention reads at most 2,048 tokens of them for each token it writes.
"""

from __future__ import annotations

import argparse
import random
import re
import sysconfig
import time
from pathlib import Path

from openm3.ask.answer import Reader
from openm3.ask.documents import Document, collect
from openm3.ask.terminal import show_answer, write
from openm3.model.model import load
from openm3.tokens.tokenizer import Tokenizer
from openm3.train.corpus import Source, standard_library
from openm3.train.tasks import definitions

QUESTION = "Quote the line that defines {}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask three questions about Python's standard library.")
    parser.add_argument("--model", default="m3-tiny", help="checkpoint folder (default: the bundled m3-tiny)")
    parser.add_argument("--tokens", type=int, default=32_768, help="read at least so many tokens (default: 32768)")
    args = parser.parse_args(argv)

    begin = time.perf_counter()
    model = load(args.model)
    documents = long_document(model.tokenizer, args.tokens)
    early, late, absent = subjects(documents)
    reader = Reader(model, documents)
    lines = sum(d.text.count("\n") for d in documents)
    write(f"{len(documents)} files of Python's standard library, {lines:,} lines. Not used in training.\n")
    for number, name in enumerate((early, late, absent), 1):
        question = QUESTION.format(name)
        write(f"\n{number}. {question}\n\n")
        show_answer(reader, question, thinking="disabled", max_new_tokens=64)
    write(f"\nAll of it took {time.perf_counter() - begin:.0f} s.\n")


def long_document(tokenizer: Tokenizer, num_tokens: int) -> list[Document]:
    """Held-out files, none of them huge, of at least so many tokens: always the same on one version of Python."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = standard_library(held_out=True, tests=False)
    random.Random(0).shuffle(sources)
    documents: list[Document] = []
    read = 0
    for source in sources:
        if len(source.text) > 2 * num_tokens:
            continue
        (document,) = collect([str(root / source.name)]).documents
        documents.append(Document(source.name, document.text, document.encoding))
        read += len(tokenizer.encode(document.text))
        if read >= num_tokens:
            break
    return documents


def subjects(documents: list[Document]) -> tuple[str, str, str]:
    """A name defined about a fifth into the text, one two thirds into it, and one that is defined elsewhere only.

    The first two stand on short lines: of longer ones m3-tiny often finds the place and then loses the thread.
    """
    sources = [Source(d.name, d.text) for d in documents]
    lines = definitions(sources, max_chars=30)
    names = [name for name in lines if len(name) > 5 and not name.startswith("_")]
    text = "".join(d.text for d in documents)
    elsewhere = (n for s in standard_library(held_out=False, tests=False) for n in definitions([s]))
    absent = next(n for n in elsewhere if len(n) > 8 and n[0] != "_" and not re.search(rf"\b{n}\b", text))
    return names[len(names) // 5], names[2 * len(names) // 3], absent


if __name__ == "__main__":
    main()
