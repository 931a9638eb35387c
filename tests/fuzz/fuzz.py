"""Let atheris damage what a stranger may have written, for as long as you like.

    pip install -e '.[fuzz,gguf,onnx]'
    python tests/fuzz/fuzz.py --list
    python tests/fuzz/fuzz.py gguf -max_total_time=600 -rss_limit_mb=4096

What follows the target's name goes to libFuzzer. Its mutations know no format, so a target whose file is JSON begins
from sound JSON. It stops at the first exception that is no sentence for a user, and leaves the bytes beside it.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import atheris

with atheris.instrument_imports(include=["swquant"]):
    import swquant.cli  # noqa: F401

FOLDER = Path(__file__).parent


def load(path: Path) -> ModuleType:
    """A module that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    with atheris.instrument_imports(include=["swquant"]):
        targets = load(FOLDER / "targets.py")
    folder = Path(tempfile.mkdtemp(prefix="swquant-fuzz-"))
    plain, text = targets.small_model(folder / "plain"), folder / "text.txt"
    text.write_text("the model reads a long text and writes short codes. " * 200)
    known = targets.make_targets(plain, targets.make_outputs(plain, text, folder), folder)
    if sys.argv[1:2] not in [[name] for name in known]:
        print("\n".join(known))
        return
    target = known[sys.argv[1]]
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "sound").write_bytes(target.seed)
    atheris.Setup([sys.argv[0], str(corpus), f"-max_len={2 * len(target.seed)}", *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
