"""What mkdocs does to pages here: files outside docs/ become pages, and links to them follow."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"edm2_core/SPEC.md": "spec.md", "CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Any, *, config: Any) -> Any:
    """Each file of PAGES becomes the page of that name, without a copy in docs/."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """A link to a file outside docs/ goes to its page, else to the repository if the site names one, else is text."""
    above = page.file.src_uri in PAGES.values()  # written for a reader at the repository's root

    def linked(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], re.sub("-+", "-", match[3] or "")  # GitHub's anchors keep each dash
        if above and path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        if not above and not path.startswith("../"):
            return match[0]
        path = path.removeprefix("../")
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)", linked, markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """No level of headings is left out: clauses of the specification stand two below their chapters."""
    return re.sub(r"(</?)h4\b", r"\1h3", html) if page.file.src_uri == "spec.md" else html


def on_post_page(output: str, **_: Any) -> str:
    """What the theme leaves without a name: its search, and the first cell of a table without a title."""
    named = output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )
    return named.replace("<th></th>", "<td></td>")
