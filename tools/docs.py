"""Render the site without Quarto: the same notebooks and _quarto.yml, pandoc for the Markdown.

    python tools/docs.py              the site, to _docs/
    python tools/docs.py --readme     README.md, from nbs/index.ipynb

nbdev prepares the pages as it does for Quarto: tables of arguments, links on names, hidden cells.
Broken links, pages that _quarto.yml lists in vain and an old README.md are errors.
"""
import argparse, ast, base64, hashlib, html, json, os, re, shutil, subprocess, sys, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

from common import NBS, ROOT, CellFailed, cores, forked, label, notebooks, offline, preload

SITE = Path(__file__).with_name("site")
OUT = ROOT/"_docs"
MARKDOWN = "markdown+autolink_bare_uris+tex_math_single_backslash-citations"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass
class Page:
    name: str          # Where the notebook lies under nbs/, e.g. tutorials/01_first_finetune.ipynb
    href: str          # Where its page lies under _docs/, e.g. tutorials/first_finetune.html
    title: str
    description: str
    markdown: str
    pictures: dict     # Name of a file → its bytes
    lead: str = ""
    body: str = ""
    toc: str = ""

    @property
    def up(self): return "../"*self.href.count("/")


# ------------------------------------------------------------ a notebook to Markdown

def options(source):
    "The `#| key: value` lines of a cell, and the code under them."
    found, code = {}, []
    for line in source.splitlines():
        match = re.match(r"#\|\s*([\w-]+):?\s*(.*)", line)
        if match and not code: found[match[1]] = match[2].strip().strip("\"'")
        else: code.append(line)
    return found, "\n".join(code).strip("\n")


def fence(text, kind):
    "A fenced block around any text, whatever backticks are in it."
    ticks = "`"*max([3] + [len(x) + 1 for x in re.findall(r"`{3,}", text)])
    return f"{ticks} {{{kind}}}\n{text}\n{ticks}"


def image(data, meta, opts):
    "A picture in a file of its own; with a caption it becomes a figure."
    data = base64.b64decode(data)
    file = f"{hashlib.sha256(data).hexdigest()[:16]}.png"
    opts["pictures"][file] = data
    caption, name = opts.get("fig-cap", ""), opts.get("label", "")
    alt = opts.get("fig-alt") or caption or "What the code above draws"
    width = f" width={meta['width']}px" if "width" in meta else ""
    alt = alt.replace('"', "'")
    attributes = f'{{{"#" + name if name else ""} .figure-img fig-alt="{alt}"{width}}}'
    return f"![{caption}]({opts['up']}figures/{file}){attributes}"


def output_markdown(out, opts):
    "One output of a cell."
    kind, box = out["output_type"], "::: {{.cell-output .cell-output-{}}}\n{}\n:::"
    if kind == "stream":
        text = ANSI.sub("", "".join(out["text"])).rstrip()
        return box.format(out["name"], fence(text, ".text"))
    if kind == "error":
        return box.format("error", fence(f"{out['ename']}: {out['evalue']}", ".text"))
    data = {k: "".join(v) for k, v in out["data"].items() if isinstance(v, (str, list))}
    if "text/markdown" in data:
        if opts.get("output") == "asis": return data["text/markdown"]
        inner = data["text/markdown"]
    elif "image/svg+xml" in data: inner = fence(data["image/svg+xml"], "=html")
    elif "image/png" in data:
        inner = image(data["image/png"], out.get("metadata", {}).get("image/png", {}), opts)
    elif "text/html" in data: inner = fence(data["text/html"], "=html")
    elif "text/plain" in data: inner = fence(ANSI.sub("", data["text/plain"]), ".text")
    else: return ""
    return box.format("display", inner)


def cell_markdown(cell, up, pictures):
    "One cell with its outputs; its pictures are put into `pictures`, by the names of their files."
    source = "".join(cell.get("source") or "")
    if cell["cell_type"] == "markdown": return "" if source.startswith("<!-- WARNING") else source
    if cell["cell_type"] != "code" or not (source or cell.get("outputs")): return ""
    opts, code = options(source)
    if opts.get("include") == "false": return ""
    blocks = []
    if code and opts.get("echo") != "false":
        block = fence(code, ".python")
        if "code-fold" in opts:
            state = " open" if opts["code-fold"] == "show" else ""
            summary = f"<summary>{html.escape(opts.get('code-summary', 'Code'))}</summary>"
            block = f'<details class="code-fold"{state}>\n{summary}\n\n{block}\n\n</details>'
        blocks.append(block)
    if opts.get("output") != "false":
        opts.update(up=up, pictures=pictures)
        blocks += [output_markdown(o, opts) for o in cell.get("outputs", [])]
    return "\n\n".join(b for b in blocks if b)


def text_of(cell): return "".join(cell.get("source") or "")


def shown_name(cell):
    "The name whose signature and docstring a cell shows, if it does."
    found = re.search(r"(?m)^show_doc\(([\w.]+)\)", text_of(cell))
    return found[1] if found and cell.get("outputs") else None


def say_once(cells):
    """Let an exported cell whose source is shown stand under one heading with its names.

    Around the source nbdev puts the signature and the docstring of each name; the source has both.
    """
    from fastcore.basics import listify
    from nbdev.doclinks import patch_name
    cells = list(cells)
    for i, cell in enumerate(cells):
        opts, code = options(text_of(cell))
        if cell["cell_type"] != "code" or opts.get("code-summary") != "Exported source": continue
        defined = [n for n in ast.parse(code).body if hasattr(n, "name")]
        names = [name for n in defined for name in listify(patch_name(n))]
        about, first, last = {}, i, i
        while first and shown_name(cells[first - 1]) in names: first -= 1
        while last + 1 < len(cells) and shown_name(cells[last + 1]) in names: last += 1
        for c in cells[first:i] + cells[i + 1:last + 1]: about[shown_name(c)] = c
        for c in about.values(): c.update(source="", outputs=[], shown=c["outputs"])
        names = [n for n in names if n in about and not n.rpartition(".")[2].startswith("_")]
        cells[i] = code_cell = dict(cell, source=code)
        if not names: continue
        shown = about[names[0]]["shown"][0]["data"]["text/markdown"]
        link = re.search(r"\[source\].*", "".join(shown))
        owner = names[0].rpartition(".")[0] + "."
        title = ", ".join(names[:1] + [n.removeprefix(owner) for n in names[1:]])
        title = title.replace("_", "\\_")
        anchors = "".join(f"[]{{#{n.lower()}}}" for n in names[1:])
        head = f"{anchors}{link[0] if link else ''}\n\n### {title} {{#{names[0].lower()}}}"
        cells[first] = dict(cells[first], cell_type="markdown", source=head)
        if first == i: cells.insert(i + 1, code_cell)
    return cells


def unlinked(text):
    "Code whose comments name things as they did, before nbdev made links of the names."
    plain = lambda code: re.sub(r"\[(`[^`\n]+`)\]\(http[^)\n]*\)", r"\1", code[0])
    return re.sub(r"(?ms)^```.*?^```", plain, text)


def processed(path):
    "The fields of a Page, from what nbdev hands to Quarto for this notebook (runs in a child)."
    import yaml
    from execnb.nbio import nb2str, read_nb
    from nbdev.processors import FilterDefaults
    os.environ["IN_TEST"] = "1"
    nb = read_nb(path)
    try: FilterDefaults()(nb)
    except Exception as e:
        hint = "nbdev runs exported cells, imports and show_doc by themselves when it makes a page"
        raise CellFailed(f"{e}\n{type(e.__cause__).__name__}: {e.__cause__}\n({hint})") from None
    cells = json.loads(nb2str(nb))["cells"]
    front = {}
    for cell in cells:
        found = re.match(r"---\n(.*?)\n---", "".join(cell.get("source") or ""), re.S)
        if cell["cell_type"] == "raw" and found: front.update(yaml.safe_load(found[1]) or {})
    name = path.relative_to(NBS).as_posix()
    href = (path.relative_to(NBS).parent/front.get("output-file", path.stem + ".html")).as_posix()
    up, pictures = "../"*href.count("/"), {}
    parts = [cell_markdown(c, up, pictures) for c in say_once(cells)]
    text = unlinked("\n\n".join(filter(None, parts)))
    title = front.get("title", path.stem)
    return name, href, title, front.get("description") or "", text, pictures


def use_this_index():
    "Let nbdev link names by this checkout's index, whatever is installed."
    import nbdev.doclinks
    index = {}
    exec((ROOT/"ftkit"/"_modidx.py").read_text(encoding="utf-8"), index)
    ours = SimpleNamespace(name="ftkit", load=lambda: index["d"])
    nbdev.doclinks.entry_points = lambda **_: [ours]


# ------------------------------------------------------------ Markdown to pages

def pandoc(text, *args):
    import pypandoc
    command = [pypandoc.get_pandoc_path(), "-f", MARKDOWN, "-t", "html5", "--wrap=none", "--mathml"]
    done = subprocess.run([*command, *args], input=text, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(done.stderr)
    return done.stdout, done.stderr


def render(page):
    "Fill in the page's lead, body and table of contents."
    text = f"{page.description}\n\n<!-- text -->\n\n{page.markdown}"
    out, complaints = pandoc(text, "--standalone", "--toc", "--toc-depth=3",
                             f"--template={SITE/'body.html'}", f"--lua-filter={SITE/'quarto.lua'}")
    page.toc, _, body = out.partition("<!-- body -->")
    page.lead, _, page.body = body.partition("<!-- text -->")
    lines = [x for x in complaints.splitlines() if x.strip() and "Duplicate identifier" not in x]
    return [f"{page.name}: {line}" for line in lines]  # of duplicates, check_links knows better


def sidebar_items(contents, section=""):
    "(section, href, text or None) of each page in the sidebar, in order."
    for item in contents or []:
        if isinstance(item, str): yield section, item, None
        elif "section" in item: yield from sidebar_items(item.get("contents"), item["section"])
        else: yield section, item["href"], item.get("text")


def plain(text):
    "A title without Markdown's marks."
    return html.escape(re.sub(r"[`*_]", "", text))


def sidebar(site, pages, here):
    parts, section = [], None
    for name, href, text in sidebar_items(site["sidebar"]["contents"]):
        page = pages[href]
        if name != section:
            if section: parts.append("</ul></details>")
            if name:
                inside = any(s == name and h == here.name
                             for s, h, _ in sidebar_items(site["sidebar"]["contents"]))
                state = " open data-here" if inside else " open"
                parts.append(f"<details{state}><summary>{plain(name)}</summary><ul>")
            section = name
        current = ' aria-current="page"' if page is here else ""
        link = f'<a href="{here.up}{page.href}"{current}>{plain(text or page.title)}</a>'
        parts.append(f"<li>{link}</li>" if name else f'<p class="lone">{link}</p>')
    return "".join(parts) + ("</ul></details>" if section else "")


def drop_missing(site, pages):
    "Take the entries that lead to no page out of the menus; say which they were."
    gone = []

    def keep(item):
        if isinstance(item, dict) and "contents" in item:
            item["contents"] = list(filter(keep, item["contents"]))
            return bool(item["contents"])
        href = item if isinstance(item, str) else item["href"]
        if href not in pages: gone.append(href)
        return href in pages

    for menu, key in (site["sidebar"], "contents"), (site["navbar"], "left"):
        menu[key] = list(filter(keep, menu[key]))
    there = {p.relative_to(NBS).as_posix() for p in notebooks()}
    gone = [x for x in dict.fromkeys(gone) if x not in there]
    return [f"_quarto.yml lists {x}, which is no notebook" for x in gone]


def navbar(site, pages, here):
    links = []
    for item in site["navbar"].get("left", []):
        page = pages[item["href"]]
        current = ' aria-current="page"' if page is here else ""
        text = plain(item.get("text") or page.title)
        links.append(f'<a href="{here.up}{page.href}"{current}>{text}</a>')
    return "".join(links)


def neighbours(site, pages, here):
    "Links to the page before and the page after."
    order = [pages[href] for _, href, _ in sidebar_items(site["sidebar"]["contents"])]
    i = order.index(here) if here in order else None
    if i is None: return ""
    link = lambda p, rel: f'<a rel="{rel}" href="{here.up}{p.href}">{plain(p.title)}</a>'
    before = link(order[i - 1], "prev") if i else "<span></span>"
    after = link(order[i + 1], "next") if i + 1 < len(order) else "<span></span>"
    return before + after


def relative(page, pages, base):
    "Turn links to notebooks and to the published site into links between the pages."
    def change(match):
        before, target = match[1], html.unescape(match[2])
        if target.startswith(base):  # nbdev links a name to where it may be shown, or only told of
            path, _, anchor = target[len(base):].partition("#")
            there = any(p.href == path and f'id="{anchor}"' in p.body for p in pages.values())
            target = page.up + path + ("#" + anchor if there and anchor else "")
        elif not re.match(r"[a-z]+:|#|//", target):
            path, _, anchor = target.partition("#")
            if path.endswith(".ipynb"):
                full = os.path.normpath(os.path.join(os.path.dirname(page.name), path))
                if full in pages:
                    target = page.up + pages[full].href + ("#" + anchor if anchor else "")
        return f'{before}"{html.escape(target)}"'
    return re.sub(r'(\bhref=)"([^"]*)"', change, page.body)


def assemble(page, pages, site, template):
    "The whole HTML of a page."
    source = f"{site['repo-url']}/blob/{site.get('repo-branch', 'main')}/nbs/{page.name}"
    values = dict(
        title=plain(page.title), site=plain(site["title"]), repo=site["repo-url"], source=source,
        description=html.escape(page.description),
        lead=page.lead, up=page.up, body=page.body,
        toc=page.toc if page.toc.strip() else "", navbar=navbar(site, pages, page),
        sidebar=sidebar(site, pages, page), neighbours=neighbours(site, pages, page),
        footer=html.escape(site.get("page-footer", {}).get("left", "")))
    both = f"{values['title']} – {values['site']}"
    values["full_title"] = values["title"] if page.title == site["title"] else both
    return re.sub(r"\{\{(\w+)\}\}", lambda m: values[m[1]], template)


# ------------------------------------------------------------ links and search

class Reader(HTMLParser):
    "Ids, links and the text of each section of a page."
    def __init__(self):
        super().__init__()
        self.ids, self.links, self.sections = Counter(), [], []
        self.main = self.heading = False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids[attrs["id"]] += 1
        if tag in ("a", "link") and "href" in attrs: self.links.append(attrs["href"])
        if tag in ("img", "script") and "src" in attrs: self.links.append(attrs["src"])
        if tag == "main": self.main = True
        if self.main and tag in ("h1", "h2", "h3"):
            self.heading = True
            self.sections.append([attrs.get("id", ""), "", ""])

    def handle_endtag(self, tag):
        if tag == "main": self.main = False
        if tag in ("h1", "h2", "h3"): self.heading = False

    def handle_data(self, data):
        if self.main and self.sections: self.sections[-1][1 if self.heading else 2] += data + " "


def check_links(readers):
    "What is wrong with the links of the pages (all that lead inside the site)."
    problems = []
    for href, reader in readers.items():
        twice = [i for i, n in reader.ids.items() if n > 1]
        problems += [f"{href}: the id {i!r} occurs more than once" for i in twice]
        for link in reader.links:
            if re.match(r"[a-z]+:|//", link): continue
            path, _, anchor = link.partition("#")
            target = os.path.normpath(os.path.join(os.path.dirname(href), path)) if path else href
            if not (OUT/target).exists(): problems.append(f"{href}: {link} leads nowhere")
            elif anchor and target in readers and anchor not in readers[target].ids:
                problems.append(f"{href}: {link}: there is no such place on that page")
    return list(dict.fromkeys(problems))


def search_index(pages, readers):
    "A script that holds the text of every section, for the search box."
    squeeze = lambda text: re.sub(r"\s+", " ", text).strip()
    rows = []
    for page in pages.values():
        for anchor, head, text in readers[page.href].sections:
            href = page.href + ("#" + anchor if anchor else "")
            rows.append([href, page.title, squeeze(head), squeeze(text)[:1500]])
    return "window.ftkitSearch = " + json.dumps(rows, ensure_ascii=False) + ";\n"


# ------------------------------------------------------------ README

def readme_text():
    "README.md: the index notebook as Markdown, with links that work from the project's top folder."
    nb = json.loads((NBS/"index.ipynb").read_text(encoding="utf-8"))
    parts = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(source.strip())
        if cell["cell_type"] != "code" or re.match(r"#\|\s*hide\b", source): continue
        parts.append(f"```python\n{options(source)[1]}\n```")
        for out in cell.get("outputs", []):
            text = out.get("text") or out.get("data", {}).get("text/plain") or []
            if text: parts.append("```\n" + ANSI.sub("", "".join(text)).rstrip() + "\n```")
    text = "\n\n".join(filter(None, parts)) + "\n"
    text = re.sub(r"\]\((?![a-z]+:|#|/)([^)\s]+)", r"](nbs/\1", text)
    text = re.sub(r'((?:src|href)=")(?![a-z]+:|#|/)', r"\1nbs/", text)
    note = "<!-- Made from nbs/index.ipynb by `make export`: edit that. -->\n"
    return note + text


def write_readme():
    (ROOT/"README.md").write_text(readme_text(), encoding="utf-8")
    print("wrote README.md")


def check_readme():
    readme = ROOT/"README.md"
    if readme.exists() and readme.read_text(encoding="utf-8") == readme_text(): return []
    return ["README.md is not what nbs/index.ipynb gives: make export"]


# ------------------------------------------------------------ all of it

def settings():
    import yaml
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))["website"]
    return site, site["site-url"].rstrip("/") + "/"


def collect(errors):
    "Every notebook as a Page, by name."
    found = {}
    for r in forked(processed, notebooks()):
        if r.error: errors.append(f"{label(r.item)}: {r.error}")
        else: found[r.value[0]] = Page(*r.value)
    return dict(sorted(found.items()))


def copy_files(pages):
    "Pictures and style sheets that lie among the notebooks, and the site's own."
    for path in NBS.rglob("*"):
        inside = path.relative_to(NBS)
        if path.is_file() and path.suffix in (".png", ".jpg", ".svg", ".gif", ".css"):
            if any(x[0] in "_." for x in inside.parts): continue
            (OUT/inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, OUT/inside)
    (OUT/"figures").mkdir()
    for page in pages.values():
        for name, data in page.pictures.items(): (OUT/"figures"/name).write_bytes(data)
    (OUT/"site").mkdir()
    for name in "site.css", "site.js": shutil.copy(SITE/name, OUT/"site")
    (OUT/".nojekyll").touch()


def build():
    start, errors = time.monotonic(), []
    site, base = settings()
    use_this_index()
    pages = collect(errors)
    errors += drop_missing(site, pages)
    with ThreadPoolExecutor(cores()) as pool:
        for complaints in pool.map(render, pages.values()): errors += complaints
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    copy_files(pages)
    template, readers = (SITE/"page.html").read_text(encoding="utf-8"), {}
    for page in pages.values():
        page.body = relative(page, pages, base)
        text = assemble(page, pages, site, template)
        (OUT/page.href).parent.mkdir(parents=True, exist_ok=True)
        (OUT/page.href).write_text(text, encoding="utf-8")
        readers[page.href] = Reader()
        readers[page.href].feed(text)
    (OUT/"site"/"search.js").write_text(search_index(pages, readers), encoding="utf-8")
    errors += check_links(readers)
    print(f"site: {len(pages)} pages in {time.monotonic() - start:.0f} s, {OUT.name}/index.html")
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="make README.md instead of the site")
    args = parser.parse_args()
    if args.readme: return write_readme()
    offline()
    preload()
    errors = build()
    errors += check_readme()
    for error in errors: print(f"error  {error}", file=sys.stderr)
    return int(bool(errors))


if __name__ == "__main__": sys.exit(main())
