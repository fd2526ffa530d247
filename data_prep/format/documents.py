"""A document of a linked context as text: from a text, or an object with a title and a text."""

from collections.abc import Mapping
from string import Formatter

from unfold.data_prep.errors import DataError

DEFAULT = "{text}\n"
WITH_TITLE = "{title}\n{text}\n"


class DocumentTemplate:
    """How documents are written. The same text always gives the same tokens, wherever it stands in a context."""

    def __init__(self, source: str = ""):
        """source: text with the fields of a document in braces, such as ``{title}: {text}``; empty: the title, if there is one,
        and the text, a line each.

        Raises:
            DataError: braces that name no field.
        """
        self._source = source
        for template in (source, DEFAULT):
            try:
                names = [name for _, name, how, change in Formatter().parse(template) if name is not None]
                plain = all(name and name.replace("_", "a").isalnum() for name in names) and not any(
                    how or change for _, _, how, change in Formatter().parse(template)
                )
            except ValueError as e:
                raise DataError(f"--document-template {source!r}: {e}; write braces of the text itself twice") from None
            if not plain:
                raise DataError(f"--document-template {source!r}: takes names of fields alone in braces, such as {{text}}")
        if source and not any(name for _, name, *_ in Formatter().parse(source)):
            raise DataError(f"--document-template {source!r}: names no field, so all documents would be alike; use {{text}}")

    def render(self, document: object, what: str) -> str:
        """The text of a document.

        Args:
            document: a text, or an object with at least what the template names; texts each.
            what: names it in errors, such as ``document 3 of 10``.

        Raises:
            DataError: it is empty, of another type, or lacks a field.
        """
        values = {"text": document} if isinstance(document, str) else document
        if not isinstance(values, Mapping):
            raise DataError(f"{what} is {type(document).__name__}, neither a text nor an object with 'text'; correct the file")
        template = self._source or (WITH_TITLE if values.get("title") else DEFAULT)
        names = dict.fromkeys(name for _, name, *_ in Formatter().parse(template) if name)
        for name in names:
            if name not in values:
                whose = "--document-template names it" if self._source else "every document needs one"
                raise DataError(f"{what} has no {name!r}, {whose}; it has {', '.join(map(repr, sorted(values))) or 'nothing'}")
            if not isinstance(values[name], str):
                raise DataError(f"{what}: its {name!r} is {type(values[name]).__name__}, not text; correct the file")
        if not any(values[name].strip() for name in names):
            raise DataError(f"{what} is empty; leave it out")
        return template.format_map({name: values[name] for name in names})
