"""Add the nodes to a ComfyUI folder: `python -m erasure.comfyui FOLDER`, with the Python that runs ComfyUI."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from erasure.errors import ErasureError

EXAMPLES = Path(__file__).resolve().parent / "example_workflows"
CONTENT = '''"""The nodes of Erasure, from the package that is installed in this Python."""

from erasure.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''


def install(folder: Path) -> Path:
    """Write `custom_nodes/erasure/__init__.py` and the examples into a ComfyUI folder; return the path of the former.

    Args:
        folder: the folder that holds `custom_nodes`.

    Raises:
        ErasureError: the folder has no `custom_nodes`, or holds another `custom_nodes/erasure`.
    """
    nodes = folder / "custom_nodes"
    if not nodes.is_dir():
        raise ErasureError(f"{folder} is no ComfyUI folder: it has no custom_nodes. Nothing was written")
    path = nodes / "erasure" / "__init__.py"
    if path.is_file() and path.read_text(encoding="utf-8") != CONTENT:
        raise ErasureError(f"{path} exists already with another content. It was left as it is")
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(CONTENT, encoding="utf-8")
    temporary.replace(path)
    examples = path.parent / EXAMPLES.name
    examples.mkdir(exist_ok=True)
    for file in EXAMPLES.glob("*.json"):
        if not file.name.endswith(".api.json"):  # the form of scripts, which ComfyUI's page does not list
            shutil.copyfile(file, examples / file.name)
    return path


def main(arguments: list[str]) -> int:
    """Install the nodes into the folder that the only argument names, and return the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m erasure.comfyui FOLDER (the folder of ComfyUI)\n")
        return 2
    try:
        path = install(Path(arguments[0]).expanduser())
    except ErasureError as fault:
        sys.stderr.write(f"{fault}\n")
        return 2
    sys.stdout.write(f"Written: {path}. Restart ComfyUI to see the nodes under erasure\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
