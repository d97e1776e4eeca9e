"""Bytes -> text, as Python itself would read a script; a text or the reason why there is none."""

import io
import tokenize

from fairway.audit.reading import bounds
from fairway.audit.reading.script import Gap


def decoded(content: bytes) -> str | Gap:
    """The text of a script: by its byte-order mark or its coding line, else UTF-8."""
    if len(content) > bounds.FILE_BYTES:
        return Gap(0, f"{len(content):,} bytes, and at most {bounds.FILE_BYTES:,} are read")
    zero = content.find(b"\0")
    if zero >= 0:
        return Gap(_line(content, zero), "a NUL byte: Python refuses the text")
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    except (SyntaxError, LookupError) as error:
        encoding = "utf-8" if "invalid or missing encoding" in str(error) else ""
        if not encoding:
            return Gap(1, f"the coding line cannot be followed: {error}")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        return Gap(_line(content, error.start), f"byte 0x{content[error.start]:02x} is no {encoding} text")
    except (LookupError, ValueError) as error:  # a coding that is no text encoding, such as hex
        return Gap(1, f"the coding line cannot be followed: {error}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1
