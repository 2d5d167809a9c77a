"""The files of the page: where they are, copied into a folder, or all in one file."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import IO, Any

from captioner.runtime.files import atomic_write

DATA_SCRIPT = ".json.js"

_PACKAGE = Path(__file__).parents[1]
_STYLE = re.compile(r'\s*<link rel="stylesheet" href="([a-z.]+)">')
_SCRIPT = re.compile(r'\s*<script src="([a-z.]+)" defer></script>')
_POLICY = re.compile(r'(?s)content="default-src.*?">')


def page_folder() -> Path:
    """Where the page's files are: inside the installed package, or beside it in a working copy."""
    folders = (_PACKAGE / "page", _PACKAGE.parent / "vis")
    return next(folder for folder in folders if (folder / "index.html").is_file())


def page_files() -> list[Path]:
    """The files of the page, without data that a run left beside them."""
    files = (path for path in page_folder().iterdir() if path.suffix in (".html", ".css", ".js"))
    return sorted(path for path in files if not path.name.endswith(DATA_SCRIPT))


def write_data_script(source: Path) -> None:
    """Write NAME.json.js beside NAME.json: the same data, as a script that a page opened by double click may load.

    Raises:
        InputError: it cannot be written.
    """
    target = source.with_name(source.name + ".js")
    with source.open(encoding="utf-8") as read, atomic_write(target, "w", encoding="utf-8") as written:
        written.write(f"receiveData({json.dumps(source.name)},\n")
        shutil.copyfileobj(read, written)
        written.write(");\n")


def copy_page(folder: Path) -> Path:
    """Put the page's own files into a folder, and return the path of its index.html.

    Raises:
        InputError: a file cannot be written.
    """
    for source in page_files():
        target = folder / source.name
        if is_same(source, target):
            continue
        with source.open("rb") as read, atomic_write(target) as written:
            shutil.copyfileobj(read, written)
    return folder / "index.html"


def is_same(source: Path, target: Path) -> bool:
    """A working copy's own vis/ holds the page's files themselves."""
    return target.exists() and target.samefile(source)


def inlined(name: str) -> tuple[str, str]:
    """A page with its style sheets and scripts inside, no other code allowed: up to where data belong, and the rest."""
    source = page_folder()
    page = (source / name).read_text(encoding="utf-8")
    styles = [_inline(source / name, "</style") for name in _STYLE.findall(page)]
    scripts = [_inline(source / name, "</script") for name in _SCRIPT.findall(page)]
    page = _SCRIPT.sub("", _STYLE.sub("", page))
    policy = (
        "default-src 'none'; img-src data:; "
        f"style-src {' '.join(map(_digest, styles))}; script-src {' '.join(map(_digest, scripts))}"
    )
    page = _POLICY.sub(lambda _: f'content="{policy}">', page, count=1)
    page = page.replace("<html ", "<html data-album ", 1)
    page = page.replace("</head>", "".join(f"<style>{style}</style>\n" for style in styles) + "</head>", 1)
    head, tail = page.rsplit("</body>", 1)
    return head, "".join(f"<script>{script}</script>\n" for script in scripts) + "</body>" + tail


def _inline(path: Path, end: str) -> str:
    text = path.read_text(encoding="utf-8")
    assert end not in text.lower() and "<!--" not in text, f"{path.name} would end its own block"
    return text


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def write_data(stream: IO[str], name: str, data: Any) -> None:
    """Put data into a page of `inlined`, where the page finds them by their name."""
    # Neither </script> nor <!-- can stand in what follows: as JSON, < may also be written as a code.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    stream.write(f'<script type="application/json" data-name="{name}">{text}</script>\n')
