"""What a page is served with."""

import re
from collections.abc import Sequence

from torchfilm.app.serving import PAGE


def size_of_page(client, page: str, others: Sequence[str], known: str = "") -> int:
    """Bytes of a page that needs nothing from elsewhere; known: an address that is only a name."""
    sizes = 0
    for name in (page, *others):
        text = (PAGE / name).read_text()
        sizes += len(text.encode())
        assert not re.search(r"https?://|@import|url\(", text.replace(known, "") if known else text), name
        reply = client.get("/" if name == page else f"/{name}")
        assert reply.text == text
        assert "default-src 'self'" in reply.headers["content-security-policy"]
    return sizes
