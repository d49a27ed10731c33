"""Write this package as a kernel repository of Hugging Face's `kernels`:   python -m fastlm_kernels.hub --to DIR

    DIR/README.md                       the card
    DIR/build/torch-BACKEND/            the package's sources and metadata.json, for BACKEND cuda, rocm and cpu
                                        (there every function is PyTorch's, or runs in Triton's interpreter)

`kernels.get_local_kernel(Path(DIR))` imports it beside an installed fastlm_kernels, and so does `get_kernel` once DIR
was uploaded. `layers` holds what `kernelize` puts into a model. An existing DIR is never written to.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import layers
from ._command import BadInput, Parser, run

BACKENDS = ("cuda", "rocm", "cpu")
NAME = "fastlm-kernels"
VERSION = 1  # of the layers' names and signatures, as the loader's `version=` asks for it
_METADATA = "metadata.json"
_LEFT_OUT = ("__pycache__", "*.pyc", "aot_report_*.csv")

_CARD = """\
---
library_name: kernels
license: apache-2.0
tags: [kernels, triton]
---

# fastlm kernels

Triton kernels for language models, each a drop-in for PyTorch's function of the same name.

```python
from pathlib import Path
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, use_kernel_mapping

fk = get_local_kernel(Path("."))  # this directory; fk.rms_norm, fk.cross_entropy, ...
mapping = {{"RMSNorm": {{"cuda": LocalLayerRepository(Path("."), layer_name="RMSNorm")}}}}
with use_kernel_mapping(mapping):
    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
```

Layers: {layers}.
"""


def _digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file below `directory` in base64, by its path there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != _METADATA)
    return {
        path.relative_to(directory).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def _metadata(backend: str, digests: dict[str, str]) -> dict[str, object]:
    """What `kernels` reads before it imports a build. The id becomes the module's name: one for each content."""
    content = hashlib.sha256("".join(f"{name}:{digest};" for name, digest in digests.items()).encode())
    return {
        "id": f"{NAME.replace('-', '_')}_{backend}_{content.hexdigest()[:12]}",
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def write(directory: Path) -> None:
    """Write the repository to `directory`, whole or not at all. BadInput where something is in the way."""
    if directory.exists() or directory.is_symlink():
        raise BadInput("--to", directory, "it exists; give a new directory, or remove that one")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    except OSError as error:
        raise BadInput("--to", directory, f"cannot write there ({error.strerror}); give another place") from None
    try:
        package = Path(__file__).parent
        for backend in BACKENDS:
            build = scratch / "build" / f"torch-{backend}"
            shutil.copytree(package, build, ignore=shutil.ignore_patterns(*_LEFT_OUT, _METADATA))
            (build / _METADATA).write_text(json.dumps(_metadata(backend, _digests(build)), indent=2) + "\n")
        (scratch / "README.md").write_text(_CARD.format(layers=", ".join(f"`{name}`" for name in layers.__all__)))
        scratch.chmod(0o755)  # mkdtemp's are private
        scratch.rename(directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Write the repository and say how to load it."""
    parser = Parser(f"{__package__}.hub", __doc__)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a directory that does not exist yet")
    directory = parser.parse_args(argv).to
    write(directory)
    sys.stdout.write(f"{directory}: {', '.join(f'torch-{b}' for b in BACKENDS)}; layers {', '.join(layers.__all__)}\n")
    sys.stdout.write(f"load it with kernels.get_local_kernel(Path({str(directory)!r}))\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
