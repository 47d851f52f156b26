"""Federated text corpora: named clients with training and held-out texts.

A text is a whole file or speech, so no part of a held-out text is trained on.
Nothing is random: the same files give the same corpus, with the same
fingerprint, on every machine.
"""

import collections
import hashlib
import json
import os
import pathlib
import runpy
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

# The top-level modules and packages of each client of `standard_library`. Names
# that an installation lacks are skipped. Other modules form the remainder.
FAMILIES = {
  "archives": "tarfile zipfile gzip bz2 lzma _compression compression",
  "asyncio": "asyncio",
  "collections": "collections _collections_abc bisect graphlib heapq weakref",
  "concurrent": "concurrent",
  "configuration": "configparser csv plistlib",
  "ctypes": "ctypes",
  "dates": "datetime _pydatetime _strptime calendar zoneinfo",
  "debugging": "pdb bdb cmd code codeop linecache trace traceback",
  "email": "email",
  "encodings": "encodings codecs",
  "files": "shutil fileinput mimetypes tempfile",
  "functional": "functools contextlib copy operator types",
  "hashing": "base64 hashlib hmac quopri secrets uu uuid",
  "html": "html _markupbase cgi cgitb webbrowser",
  "http": "http",
  "installation": "sysconfig site venv _osx_support",
  "json": "json tomllib",
  "logging": "logging",
  "mail": "imaplib mailbox mailcap poplib smtpd smtplib",
  "modules": "modulefinder pkgutil compileall imp py_compile runpy zipimport",
  "multiprocessing": "multiprocessing",
  "numbers": "_pydecimal fractions numbers random statistics",
  "paths": "pathlib ntpath posixpath filecmp fnmatch genericpath glob",
  "pickling": "pickle pickletools copyreg dbm shelve",
  "profiling": "profile cProfile profiling pstats timeit tracemalloc",
  "re": "re",
  "rpc": "xmlrpc socketserver",
  "sockets": "ssl socket selectors",
  "syntax": "ast _ast_unparse pyclbr symtable tabnanny tokenize",
  "text": "difflib string textwrap",
  "threads": "threading _threading_local queue sched",
  "tkinter": "tkinter",
  "turtle": "turtle turtledemo",
  "urllib": "urllib",
  "wsgiref": "wsgiref",
  "xml": "xml",
}
LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "__phello__"}
LEFT_OUT |= {"site-packages", "dist-packages", "lib-dynload"}
MINIMUM_CLIENTS = 30
MINIMUM_TRAIN = 30_000  # Characters that a family needs to be a client.
MINIMUM_FILE = 1_000  # Characters; shorter files are skipped as stubs.


class Client(NamedTuple):
  """A client with its texts."""

  name: str
  train: tuple[str, ...]
  held_out: tuple[str, ...]


class Corpus(NamedTuple):
  """Clients sorted by name, and the SHA-256 of their names and texts."""

  name: str
  clients: tuple[Client, ...]
  fingerprint: str


def standard_library(folder: str | os.PathLike | None = None) -> Corpus:
  """Returns the Python standard library; each client is a family of modules.

  Every machine has this corpus. It has the sources of the library without
  tests, generated tables and installed packages. A client is a package such as
  `asyncio`, or a few modules on one subject (see `FAMILIES`). Each client holds
  out about a fifth of its text.

  Args:
    folder: the folder of the sources; None for that of the running Python.

  Returns:
    A corpus. It has 36 clients if the installation has every family.

  Raises:
    ValueError: if `folder` has too little text for 30 clients.
  """
  return _corpus("standard_library", _divide(folder)[0])


def standard_library_remainder(
  folder: str | os.PathLike | None = None,
) -> Client:
  """Returns the texts that no client of `standard_library` has.

  They are for pretraining: code on many subjects, and the pages of the language
  reference (`pydoc_data.topics`). About a twentieth of the text is held out.

  Args:
    folder: the folder of the sources; None for that of the running Python.

  Raises:
    ValueError: if `folder` has too little text for 30 clients.
  """
  return _divide(folder)[1]


def shakespeare(
  path: str | os.PathLike, minimum_characters: int = 2000
) -> Corpus:
  """Returns Shakespeare's plays; a client is a speaker and a text is a speech.

  A client holds out about a fifth of its text.

  Args:
    path: the path of tiny Shakespeare's `input.txt`. Blank lines separate the
      speeches. The first line of a speech is the speaker and a colon.
    minimum_characters: the smallest number of characters in all speeches of a
      client. Lines with the speaker's name count, but are not part of the
      texts. The default gives 105 clients.

  Raises:
    ValueError: if the file does not exist or no speaker has enough text.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(
      f"shakespeare expected the text of the plays, got {path=!s}, which is "
      "not a file. Download tinyshakespeare/input.txt from "
      "https://github.com/karpathy/char-rnn and give its path."
    )
  speeches = collections.defaultdict(dict)
  characters = collections.Counter()
  plays = path.read_text(encoding="utf-8")
  for number, speech in enumerate(plays.strip().split("\n\n")):
    speaker, _, text = speech.partition(":\n")
    speeches[speaker][str(number)] = text
    characters[speaker] += len(speech)
  clients = [
    _split(speaker, texts, 0.2)
    for speaker, texts in speeches.items()
    if characters[speaker] >= minimum_characters and len(texts) > 1
  ]
  if not clients:
    raise ValueError(
      f"shakespeare expected speakers of {minimum_characters=} or more, got "
      f"none among {len(speeches)} in {path}. Lower the minimum."
    )
  return _corpus("shakespeare", clients)


def identity(texts: Corpus | Client) -> dict[str, str]:
  """Returns name and fingerprint of a corpus or of the texts of one client."""
  if isinstance(texts, Corpus):
    return {"name": texts.name, "fingerprint": texts.fingerprint}
  return {"name": texts.name, "fingerprint": _fingerprint(texts)}


def _divide(folder: str | os.PathLike | None) -> tuple[list[Client], Client]:
  """Returns the families that have enough text, and the remainder."""
  folder = pathlib.Path(folder or sysconfig.get_path("stdlib"))
  family_of = {
    module: family
    for family, modules in FAMILIES.items()
    for module in modules.split()
  }
  families = collections.defaultdict(dict)
  for path, text in _sources(folder):
    module = path.split("/")[0].removesuffix(".py")
    families[family_of.get(module, "remainder")][path] = text
  remainder = families.pop("remainder", {})
  clients = []
  for family, documents in families.items():
    client = _split(family, documents, 0.2)
    if sum(map(len, client.train)) >= MINIMUM_TRAIN and client.held_out:
      clients.append(client)
    else:
      remainder |= documents
  if len(clients) < MINIMUM_CLIENTS:
    raise ValueError(
      f"expected a standard library with text for {MINIMUM_CLIENTS} clients or"
      f" more, got {len(clients)} in {folder}. Give the `folder` of a full"
      " Python installation, which has `asyncio` and `email`."
    )
  return clients, _split("remainder", remainder, 0.05)


def _sources(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields the paths below `folder` with their texts, sorted by name."""
  for root, folders, files in os.walk(folder):
    folders[:] = sorted(set(folders) - LEFT_OUT)
    for file in map(pathlib.Path(root).joinpath, sorted(files)):
      if file.suffix != ".py" or file.name.startswith("_sysconfigdata"):
        continue
      path = file.relative_to(folder).as_posix()
      if path == "pydoc_data/topics.py":
        for topic, page in runpy.run_path(str(file))["topics"].items():
          yield f"{path}/{topic}", page
      elif len(text := _read(file)) >= MINIMUM_FILE and not _is_table(text):
        yield path, text


def _read(file: pathlib.Path) -> str:
  """Returns the text of a source file; empty if it cannot be read."""
  try:
    with tokenize.open(file) as source:
      return source.read()
  except (OSError, SyntaxError, UnicodeDecodeError):
    return ""


def _is_table(text: str) -> bool:
  """Returns whether over a third of the lines have a character code."""
  lines = text.splitlines()
  coded = sum("0x" in line or "\\x" in line or "\\u" in line for line in lines)
  return 3 * coded > len(lines)


def _split(name: str, documents: Mapping[str, str], share: float) -> Client:
  """Holds out whole documents with at most `share` of the text.

  Documents are tried in the order of the hashes of their keys. The largest
  document is never held out. If no document fits, the smallest is held out.
  """
  by_size = sorted(documents, key=lambda key: (len(documents[key]), key))
  candidates = by_size[:-1]
  room = share * sum(map(len, documents.values()))
  held_out = set()
  for key in sorted(candidates, key=_hash):
    if len(documents[key]) <= room:
      held_out.add(key)
      room -= len(documents[key])
  held_out = held_out or set(candidates[:1])
  return Client(
    name,
    tuple(text for key, text in documents.items() if key not in held_out),
    tuple(text for key, text in documents.items() if key in held_out),
  )


def _corpus(name: str, clients: Iterable[Client]) -> Corpus:
  """Makes a corpus with the clients sorted by name."""
  clients = tuple(sorted(clients))
  return Corpus(name, clients, _fingerprint(clients))


def _fingerprint(texts: Client | tuple[Client, ...]) -> str:
  return _hash(json.dumps(texts))


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
