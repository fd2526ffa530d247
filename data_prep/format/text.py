"""Text files that people write, whatever their editor puts in front."""

import codecs
import os
import stat
from pathlib import Path

MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def read_text(path: str | Path) -> str:
    """A file's text: UTF-8, or what its byte-order mark says (Windows' editors write UTF-16); the mark is no part of it.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is something else.
    """
    raw = Path(path).read_bytes()
    mark, encoding = next(((m, name) for m, name in MARKS if raw.startswith(m)), (b"", "utf-8"))
    return raw[len(mark) :].decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def encodable(text: str) -> str:
    """What of a text is no character, for a message; '' where all of it is: half of a surrogate pair, as broken JSON holds, or a
    byte of a command line that is no UTF-8."""
    try:
        text.encode("utf-8")
        return ""
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps bytes of arguments that it cannot decode
        return f"holds the byte 0x{code - 0xDC00:02x}, which is no UTF-8; write the text in UTF-8"
    return f"holds half of a surrogate pair (\\u{code:04x}), which is not a character; correct the text"


def no_file(path: str | Path) -> str:
    """Why there is no file to read at a path: that it is missing, or what is there instead."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except OSError:
        return f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "no such file"
    if stat.S_ISDIR(mode):
        return "a directory, not a file"
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
    kind = next((name for test, name in kinds if test(mode)), "no regular file")
    return f"{kind}, which cannot be read from its middle; write what comes out of it to a file"


def spelled(text: str) -> str:
    """A text of the command line in which backslash-n, -t and -r may be written out."""
    return text.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
