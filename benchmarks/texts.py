"""Cut the three kinds of text that ``frontier.py`` measures on: an encyclopedia, code and prose.

    apt-get download jargon-text
    python benchmarks/texts.py FOLDER --wikitext test.txt valid.txt --prose jargon-text_4.4.7-4.1_all.deb

writes ``table/`` and ``selection/`` into FOLDER, each with ``wikitext2.txt``, ``code.txt`` and ``prose.txt``: what
tables are made of, and what settings are chosen on. They share no document. WikiText-2 is the test split for tables,
the validation split for choices. Code is modules of the standard library of the Python that runs this, none of which is
in the text that comes with swquant. Prose is the Jargon File, in the public domain, from the archive of its Debian
package, which is unpacked by ``dpkg-deb``: its first half for choices, its second for tables, whole paragraphs of
running text, lines joined. The texts are not copied into the repository.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
import subprocess
import sysconfig
import tarfile
from pathlib import Path

CHARACTERS = 120_000
MODULE = 8_000
"""Characters of a module, from its first import on, to the end of a line."""

SPLITS = ("table", "selection")
KINDS = ("wikitext2", "code", "prose")
CODE = {
    "table": "ast shutil gettext pprint mailbox ftplib cmd glob locale netrc plistlib tokenize uuid wave weakref "
    "xml/etree/ElementTree xmlrpc/client",
    "selection": "imaplib nntplib poplib trace timeit tabnanny stat site secrets pkgutil reprlib quopri profile pdb "
    "numbers mimetypes linecache keyword",
}
JARGON = "./usr/share/doc/jargon-text/jargon.txt.gz"
LEAST = 200
"""Characters of a paragraph of prose; shorter ones are headings, lists and entries without a story."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wikitext", type=Path, nargs=2, metavar=("TEST", "VALID"), required=True)
    parser.add_argument("--prose", type=Path, metavar="DEB", required=True)
    args = parser.parse_args()
    paragraphs = running_text(unpacked(args.prose))
    middle = len(paragraphs) // 2
    prose = {"table": paragraphs[middle:], "selection": paragraphs[:middle]}
    for split, wikitext in zip(SPLITS, args.wikitext, strict=True):
        place = args.folder / split
        place.mkdir(parents=True, exist_ok=True)
        texts = (wikitext.read_text(encoding="utf-8"), code(split), "\n\n".join(prose[split]))
        for kind, text in zip(KINDS, texts, strict=True):
            (place / f"{kind}.txt").write_text(text[:CHARACTERS], encoding="utf-8")


def code(split: str) -> str:
    """The beginnings of some modules of the standard library, one after the other, without what introduces them."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / f"{name}.py").read_text(encoding="utf-8") for name in CODE[split].split()]
    starts = [re.search(r"^(import|from) ", text, re.MULTILINE) for text in texts]
    found = (text[start.start() if start else 0 :][:MODULE] for text, start in zip(texts, starts, strict=True))
    return "\n\n".join(text.rpartition("\n")[0] for text in found)


def unpacked(package: Path) -> str:
    """The Jargon File from the archive of its Debian package."""
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        member = archive.extractfile(JARGON)
        assert member is not None
        return gzip.decompress(member.read()).decode()


def running_text(text: str) -> list[str]:
    """Paragraphs of prose, lines joined: what is long enough, begins as a sentence does and ends as one."""
    joined = (" ".join(part.split()) for part in text.split("\n\n"))
    return [
        part for part in joined if len(part) >= LEAST and (part[0].isalpha() or part[0] in "“[") and part[-1] in ".”]!?"
    ]


if __name__ == "__main__":
    main()
