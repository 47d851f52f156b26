"""Loads data sets by one spec string: from the hub, a folder, files or memory.

  sources.load("openai/gsm8k:main@train")           hub name, config and split
  sources.load("../shared/data/gsm8k@train[:100]")  folder in the hub's layout
  sources.load("clients/*.json")                    files, one for each client

Each result is a `datasets.Dataset`. Its `fingerprint` depends on its content
and not on its location.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
  import datasets


Spec = Union[
  str,
  os.PathLike,
  Sequence[Mapping[str, Any]],
  "datasets.Dataset",
  "datasets.DatasetDict",
]

READERS = {
  ".csv": "csv",
  ".json": "json",
  ".jsonl": "json",
  ".parquet": "parquet",
  ".txt": "text",
}
# user@host, user @ host.domain and UUCP's host!user, with attached characters.
_ADDRESS = re.compile(
  r"(?<!\S)\S+(?:@\S*| ?@ ?[\w-]+\.[\w.-]+)|(?<![\w.-])[\w.-]+(?:![\w.%-]+)+"
)


def load(spec: Spec, *, split: str | None = None) -> datasets.Dataset:
  """Loads the data set that `spec` names.

  The rows of files get a column `file`: the path of their file, without the
  folder that all files share and without the ending. So a file can be a client.

  Args:
    spec: `NAME_OR_FOLDER[:CONFIG][@SPLIT]`. NAME_OR_FOLDER is a name on the
      Hugging Face hub, a folder in the hub's layout, a file, or a glob of files
      (parquet, json, jsonl, csv or text). SPLIT may be a slice such as
      `train[:1000]`; the split of files is `train`. A spec may also be a list
      of dictionaries, a `datasets.Dataset` or a `datasets.DatasetDict`.
    split: the split, if `spec` has none. It may be None if there is only one.

  Raises:
    ValueError: if the data set, config or split does not exist or cannot be
      read.
  """
  import datasets

  named = None
  splits: Mapping[Any, datasets.Dataset]
  if isinstance(spec, datasets.DatasetDict):
    splits = spec
  elif isinstance(spec, datasets.Dataset):
    splits = {"train": spec}
  elif isinstance(spec, str | os.PathLike):
    name, config, named = _parse(os.path.expanduser(spec))
    splits = _read(name, config)
  else:
    rows = datasets.Dataset.from_list([dict(row) for row in spec])
    splits = {"train": rows}
  if named and split:
    raise ValueError(
      f"expected one split, got {spec!s} and {split=}. Leave one of them out."
    )
  return _choose(splits, named or split)


def newsgroups(
  path: str | os.PathLike, split: str = "train", *, subject: bool = False
) -> datasets.Dataset:
  """Loads 20 Newsgroups, "bydate", without headers and e-mail addresses.

  The header of a post ends at its first blank line. E-mail addresses
  (`user@host` and UUCP's `host!user`), with attached characters, become
  `<address>`. Names of people stay in the text.

  Args:
    path: the path of `20news-bydate.tar.gz`, with members
      `20news-bydate-SPLIT/GROUP/NUMBER`; http://qwone.com/~jason/20Newsgroups.
    split: "train" or "test".
    subject: whether each text starts with the subject line of its header.

  Returns:
    A data set with the columns `text` and `label`, sorted by path. The names of
    the labels are the sorted groups.

  Raises:
    ValueError: if the file or the split does not exist.
  """
  import datasets

  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(
      f"newsgroups expected 20news-bydate.tar.gz, got {path=!s}, which is not a"
      " file. Download it from http://qwone.com/~jason/20Newsgroups."
    )
  posts = {}
  with tarfile.open(path) as archive:
    for member in archive:
      folder, _, name = member.name.removeprefix("./").partition("/")
      if folder == f"20news-bydate-{split}" and member.isfile():
        group, _, number = name.partition("/")
        content: Any = archive.extractfile(member)
        post = content.read().decode("latin-1")
        posts[group, number] = _text(post, subject)
  if not posts:
    raise ValueError(
      f"newsgroups expected split 'train' or 'test', got {split=}, which has no"
      f" posts in {path}."
    )
  groups = sorted({group for group, _ in posts})
  keys = sorted(posts)
  return datasets.Dataset.from_dict(
    {
      "text": [posts[key] for key in keys],
      "label": [groups.index(group) for group, _ in keys],
    },
    datasets.Features(
      text=datasets.Value("string"), label=datasets.ClassLabel(names=groups)
    ),
  )


def fingerprint(data: datasets.Dataset) -> str:
  """Returns the SHA-256 of the rows, the column names and the label names.

  It depends neither on the location of the data nor on the order of columns.
  """
  import datasets

  digest = hashlib.sha256()
  names = {
    column: feature.names
    for column, feature in data.features.items()
    if isinstance(feature, datasets.ClassLabel)
  }
  head = json.dumps([sorted(data.column_names), names], sort_keys=True)
  digest.update(head.encode())
  tables: Any = data.with_format("arrow").iter(batch_size=1000)
  for table in tables:
    for row in table.to_pylist():
      line = json.dumps(row, sort_keys=True, default=repr)
      digest.update(line.encode() + b"\n")
  return digest.hexdigest()


def _parse(spec: str) -> tuple[str, str | None, str | None]:
  """Returns name or path, config and split of a spec.

  If the whole spec is an existing path, it has no config and no split.
  """
  if _exists(spec):
    return spec, None, None
  name, _, split = spec.rpartition("@") if "@" in spec else (spec, "", "")
  if not _exists(name):
    head, _, config = name.rpartition(":")
    if head and "/" not in config:
      return head, config, split or None
  return name, None, split or None


def _exists(path: str) -> bool:
  return os.path.exists(path) or bool(glob.glob(path))


def _read(name: str, config: str | None) -> Mapping[Any, datasets.Dataset]:
  """Returns all splits of a hub name, a folder, or files."""
  is_folder = os.path.isdir(name)
  if not is_folder:
    matches = [name] if os.path.isfile(name) else sorted(glob.glob(name))
    files = [path for path in matches if os.path.isfile(path)]
    if files and config:
      raise ValueError(
        f"expected files without a config, got {config!r}. Leave it out."
      )
    if files:
      return {"train": _read_files(files)}
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
      raise ValueError(
        f"expected NAME_OR_FOLDER[:CONFIG][@SPLIT], got {name!r}, which is not"
        " a file, a folder or a name on the hub. Check the path."
      )
  expected = (
    "a folder in the hub's layout: parquet, json, jsonl, csv or text"
    if is_folder
    else "a folder that exists, or a data set on the hub, which must be"
    " reachable (HF_HUB_OFFLINE unset) or cached"
  )
  return _load(f"{expected}; got {name!r} with {config=}", name, config)


def _read_files(paths: Sequence[str]) -> datasets.Dataset:
  """Returns the rows of files, with the column `file`."""
  import datasets

  endings = {pathlib.Path(path).suffix for path in paths}
  kinds = {READERS.get(ending) for ending in endings}
  if len(kinds) > 1 or None in kinds:
    raise ValueError(
      f"expected files with one ending of {', '.join(READERS)}, got"
      f" {', '.join(sorted(endings))}; the first file is {paths[0]}."
    )
  files = {f"file{i}": glob.escape(path) for i, path in enumerate(paths)}
  parts = _load(
    f"files with rows of the same columns, got {paths[0]} and"
    f" {len(paths) - 1} more",
    kinds.pop(),
    data_files=files,
  )
  root = os.path.commonpath([os.path.dirname(path) for path in paths])
  rows: list[Any] = []
  for key, path in zip(files, paths, strict=True):
    name = pathlib.Path(path).relative_to(root).with_suffix("").as_posix()
    if "file" in parts[key].column_names:
      raise ValueError(
        "expected files without a column 'file', which is added here, got one"
        f" in {path}. Rename it."
      )
    column = [name] * len(parts[key])
    rows.append(parts[key].add_column("file", column))
  return datasets.concatenate_datasets(rows)


def _load(
  expected: str, *arguments: Any, **options: Any
) -> Mapping[Any, datasets.Dataset]:
  """Calls `datasets.load_dataset` without progress bars.

  Raises:
    ValueError: if it fails. The message says what was `expected`.
  """
  import datasets

  shown = not datasets.utils.are_progress_bars_disabled()
  datasets.utils.disable_progress_bars()
  try:
    splits: Any = datasets.load_dataset(*arguments, **options)
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
    raise ValueError(f"expected {expected}: {error}") from error
  finally:
    if shown:
      datasets.utils.enable_progress_bars()
  return splits


def _choose(
  splits: Mapping[Any, datasets.Dataset], split: str | None
) -> datasets.Dataset:
  """Returns a split or a slice; the only split if `split` is None."""
  import datasets

  names = ", ".join(splits)
  if split is None and len(splits) > 1:
    raise ValueError(
      f"expected a split, one of {names}, got none. Append"
      f" '@{next(iter(splits))}' to the spec."
    )
  try:
    instruction = datasets.ReadInstruction.from_spec(split or names)
    parts = instruction.to_absolute(
      {name: len(splits[name]) for name in splits}
    )
  except (AssertionError, ValueError) as error:
    raise ValueError(
      f"expected one of the splits {names}, or a slice such as"
      f" '{next(iter(splits))}[:100]', got {split!r}: {error}"
    ) from error
  chosen: Any = [
    splits[part.splitname].select(range(part.from_, part.to)) for part in parts
  ]
  return datasets.concatenate_datasets(chosen) if chosen[1:] else chosen[0]


def _text(post: str, subject: bool) -> str:
  """Removes addresses and headers from a post; keeps the subject if asked."""
  headers, _, text = post.replace("\r\n", "\n").partition("\n\n")
  if subject:
    lines = [x for x in headers.splitlines() if x.startswith("Subject:")]
    text = "\n".join([*lines[:1], text])
  return _ADDRESS.sub("<address>", text).strip()
