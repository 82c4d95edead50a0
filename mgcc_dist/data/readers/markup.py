"""XML without its dangers: a document type, which could define entities that grow or read files, is refused."""

from collections.abc import Mapping
from typing import NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat


def parse(content: bytes) -> Element:
    """The root element; names are without their namespaces.

    Raises:
        ValueError: not well-formed, or with a document type (DOCTYPE).
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True

    def start(name: str, attributes: Mapping[str, str]) -> None:
        builder.start(name.rpartition("}")[2], dict(attributes))

    def end(name: str) -> None:
        builder.end(name.rpartition("}")[2])

    def refuse(*_: object) -> NoReturn:
        raise ValueError("it has a DOCTYPE, which this program does not read")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an encoding that nobody knows
        raise ValueError(f"not well-formed XML: {error}") from error
    return builder.close()
