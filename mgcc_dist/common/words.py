"""Numbers in sentences."""


def counted(count: int, noun: str) -> str:
    """Return "1 image", "2 images": `noun` in the singular, with a plural in -s or -y."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"
