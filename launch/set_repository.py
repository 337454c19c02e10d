"""Writes the public address of this repository into the notebooks:

  python launch/set_repository.py https://github.com/OWNER/REPO

Each notebook then has a badge that opens it on Colab, where its first cell clones the
repository. A fork runs it once with its own address.
"""

import json
import pathlib
import re
import sys

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
_BADGE = re.compile(r"\[!\[Open in Colab\].*\n\n?")


def write(notebook: pathlib.Path, address: str) -> None:
  """Writes the badge and the address of the first cell of one notebook."""
  owner = address.removeprefix("https://github.com/")
  fields = json.loads(notebook.read_text(encoding="utf-8"))
  title, code = fields["cells"][0], next(cell for cell in fields["cells"] if cell["cell_type"] == "code")
  badge = (f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
           f"(https://colab.research.google.com/github/{owner}/blob/main/notebooks/{notebook.name})\n\n")
  title["source"] = (badge + _BADGE.sub("", "".join(title["source"]))).splitlines(keepends=True)
  code["source"] = [re.sub(r'^REPOSITORY = "[^"]*"', f'REPOSITORY = "{address}"', line) for line in code["source"]]
  notebook.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit status."""
  address = argv[1].removesuffix("/").removesuffix(".git") if len(argv) == 2 else ""
  if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
    print(f"error: {argv[1:]} is no address; give one like https://github.com/OWNER/REPO", file=sys.stderr)
    return 2
  for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
    write(notebook, address)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
