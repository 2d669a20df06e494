"""For mkdocs: pages link to files beside docs/, so that they read well in the repository; the site holds those too."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("benchmarks/README.md", "benchmarks/results/*.png", "benchmarks/results/*.h5")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them, at their place in the repository."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In the site benchmarks/ lies within docs/, not beside it."""
    place = Path(page.file.src_uri)
    if place.parts[0] == "benchmarks":
        return markdown.replace("](../docs/", "](../")
    up = "../" * len(place.parents)
    return re.sub(rf"(?<=\]\(){re.escape(up)}(?=benchmarks/)", up[3:], markdown)
