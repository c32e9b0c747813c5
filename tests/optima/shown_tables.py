"""Tables as a narrow terminal shows them."""

import io

from rich.console import Console
from rich.table import Table


def shown(table: Table) -> str:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    return text
