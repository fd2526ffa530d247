"""A dozen questions for a single fact on pages of Python's documentation, as a task file in RULER's layout.

The pages are some that tests/benchmarks/smollm2_gists.py holds out (with python3.11-doc 3.11.2); a context is the beginning of
one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

CHARACTERS = 3000  # of a context, about 900 tokens
QUESTIONS = (  # page below the sources' directory, question, what an answer must hold one of (whatever its case)
    ("library/quopri", "Which encoding scheme is more compact if there are many nonprintable characters?", "base64"),
    ("library/urllib.robotparser", "Who is the author of this section?", "Montanaro"),
    ("library/urllib.robotparser", "Which method returns the time the robots.txt file was last fetched?", "mtime"),
    ("library/tomllib", "Since which version of Python is there tomllib?", "3.11"),
    ("library/tomllib", "Which library is recommended for editing already existing TOML files?", "TOML Kit", "tomlkit"),
    ("library/crypt", "Which hashing method is the weakest?", "METHOD_CRYPT"),
    ("library/crypt", "Which module is a potential replacement for crypt?", "hashlib"),
    ("library/termios", "Which constant is the queue selector for the input queue?", "TCIFLUSH"),
    ("library/heapq", "Which function transforms a list into a heap?", "heapify"),
    ("library/pprint", "What is the default width in characters per line?", "80"),
    ("library/tracemalloc", "How much data did Python load in the example, bytecode and constants?", "4855"),
    ("library/selectors", "Which class is an alias to the most efficient implementation?", "DefaultSelector"),
)


def write_questions(texts: Sequence[str], path: Path) -> int:
    """Write the questions whose pages there are.

    Args:
        texts: files and directories of text; pages are looked for below the directories.
        path: of the task file. Not written where there is no page.

    Returns:
        The number of questions.
    """
    rows = []
    for page, question, *answers in QUESTIONS:
        found = [file for text in texts for file in Path(text).glob(f"{page}.rst*")]
        if found:
            context = found[0].read_text()[:CHARACTERS]
            rows.append({"input": f"{context}\n\nQuestion: {question}\n", "outputs": answers, "answer_prefix": "Answer:"})
    if rows:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)
