"""The site: it builds without a warning, takes nothing from the network, and what the pages name is there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from bench.evidence import benchmarks_page

TOP = sorted(ROOT.glob("*.md"))
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "kernels|engine|macpo|recipes|bench|tests|docs"


def built(folder: Path, docs: Path = ROOT / "docs") -> Path:
    """Build the project's pages, or others under the project's settings but without its navigation."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra: docs)")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(folder), strict=True)
    config.nav = config.nav if docs == ROOT / "docs" else None
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        return built(tmp_path_factory.mktemp("site"))


def test_no_page_takes_anything_from_the_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        text = page.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text)
        assert not [tag for tag in tags if re.search(r'(?:src|href)=["\']?(?:https?:)?//', tag)], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet.name


def test_search_works_in_pages_that_are_opened_as_files(site: Path, tmp_path: Path) -> None:
    """Browsers start no worker there; docs/iframe-worker.js takes its place."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium or chromedriver is not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1300,1000", f"--user-data-dir={tmp_path}"):
        options.add_argument(argument)
    with webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver")))) as driver:
        driver.get((site / "how-it-works" / "data.html").as_uri())
        entry = WebDriverWait(driver, 60).until(lambda d: d.find_element(By.CSS_SELECTOR, ".md-search__input"))
        entry.click()
        entry.send_keys("sbatch")
        found = (By.CSS_SELECTOR, ".md-search-result__item a")
        link = WebDriverWait(driver, 60).until(lambda d: d.find_element(*found).get_attribute("href"))
        assert "many-gpus.html" in str(link)


@pytest.mark.parametrize("text", ["[a](b.md)", "[a](index.md#b)", "![a](b.png)", "[a](/b.md)"])
def test_what_leads_nowhere_breaks_the_build(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    (tmp_path / "docs").mkdir()
    for name in ("style.css", "iframe-worker.js"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[a](index.md#a)\n")
    built(tmp_path / "site", tmp_path / "docs")
    (tmp_path / "docs" / "index.md").write_text(f"# A\n\n{text}\n")
    with pytest.raises(pytest.importorskip("mkdocs.exceptions").Abort):
        built(tmp_path / "site", tmp_path / "docs")


def anchors(page: Path) -> set[str]:
    """Anchors of a page on GitHub and on the site: those of its headings, and those that it sets itself."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    yield from (link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere_on_github_too(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {path for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)", text) if page.name != "LOG.md"}
    assert not [path for path in named if not (ROOT / path).exists()]
    modules = re.findall(r"python -m (bench[\w.]*\w)", text) if page.name != "LOG.md" else []
    files = [ROOT / module.replace(".", "/") for module in modules]
    assert not [path for path in files if not (path.is_dir() or path.with_suffix(".py").is_file())]


def test_the_benchmarks_are_those_of_the_result_files() -> None:
    """`python -m bench.evidence.benchmarks_page` writes the page anew."""
    assert benchmarks_page.PAGE.read_text(encoding="utf-8") == benchmarks_page.text()
