"""Federated text corpora: named clients, each with train and held-out texts.

A text is a whole file or speech, never a fragment of one, so that what a client
holds out is new to every model. Nothing is drawn at random: the same files
give the same corpus on every machine, and its fingerprint says so.
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

# What each client of `standard_library` holds: top-level modules and packages.
# Names that an installation lacks are skipped; what no line names is remainder.
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
MINIMUM_TRAIN = 30_000  # Characters, for a family to be a client.
MINIMUM_FILE = 1_000  # Characters; shorter files are stubs.


class Client(NamedTuple):
  """One holder of texts."""

  name: str
  train: tuple[str, ...]
  held_out: tuple[str, ...]


class Corpus(NamedTuple):
  """Clients sorted by name, and the SHA-256 of their names and contents."""

  name: str
  clients: tuple[Client, ...]
  fingerprint: str


def standard_library(folder: str | os.PathLike | None = None) -> Corpus:
  """The Python standard library, a client being a family of its modules.

  The corpus that is on every machine: sources, without tests, generated tables
  and installed packages. A client is a package such as `asyncio` or a few
  modules on one subject, see `FAMILIES`. About a fifth of its text is held out.

  Args:
    folder: of the library's sources; that of the running Python if None.

  Returns:
    A corpus of 36 clients where the installation lacks no family.

  Raises:
    ValueError: if `folder` holds too little text for 30 clients.
  """
  return _corpus("standard_library", _divide(folder)[0])


def standard_library_remainder(
  folder: str | os.PathLike | None = None,
) -> Client:
  """What no client of `standard_library` holds, to pretrain a model on.

  Code on many subjects, and the language reference (`pydoc_data.topics`) by the
  page. About a twentieth of it is held out. Arguments and errors are those of
  `standard_library`.
  """
  return _divide(folder)[1]


def shakespeare(
  path: str | os.PathLike, minimum_characters: int = 2000
) -> Corpus:
  """Shakespeare's plays, a client being a speaker and a text a speech.

  About a fifth of a speaker's text is held out.

  Args:
    path: of tiny Shakespeare's `input.txt`: speeches are separated by blank
      lines, the first line of each is the speaker and a colon.
    minimum_characters: of a client's speeches, each counted with the line that
      names the speaker, which is no part of the text. The default keeps 105.

  Raises:
    ValueError: if there is no such file or no such speaker.
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
  """Name and fingerprint of a corpus or of one client's texts, for a record."""
  if isinstance(texts, Corpus):
    return {"name": texts.name, "fingerprint": texts.fingerprint}
  return {"name": texts.name, "fingerprint": _fingerprint(texts)}


def _divide(folder: str | os.PathLike | None) -> tuple[list[Client], Client]:
  """The families that hold enough text, and the remainder."""
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
      f"expected a standard library with text for {MINIMUM_CLIENTS} clients or "
      f"more, got {len(clients)} in {folder}. Give the `folder` of a full "
      "Python installation: the one that holds `asyncio` and `email`."
    )
  return clients, _split("remainder", remainder, 0.05)


def _sources(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Paths below `folder` with their texts, in an order that names decide."""
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
  """The text of a source file, empty if it cannot be read."""
  try:
    with tokenize.open(file) as source:
      return source.read()
  except (OSError, SyntaxError, UnicodeDecodeError):
    return ""


def _is_table(text: str) -> bool:
  """Whether a third of the lines hold a character's number or escape."""
  lines = text.splitlines()
  coded = sum("0x" in line or "\\x" in line or "\\u" in line for line in lines)
  return 3 * coded > len(lines)


def _split(name: str, documents: Mapping[str, str], share: float) -> Client:
  """Holds out whole documents of at most `share` of the text.

  Their order is that of their keys' hashes. The largest is never held out; one
  always is, the smallest if none fits.
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
  """Sorts the clients by name and takes their fingerprint."""
  clients = tuple(sorted(clients))
  return Corpus(name, clients, _fingerprint(clients))


def _fingerprint(texts: Client | tuple[Client, ...]) -> str:
  return _hash(json.dumps(texts))


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
