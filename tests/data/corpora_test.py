import pathlib
import shutil
import sysconfig

import hypothesis
import pytest
from hypothesis import strategies

from fedjax_llm.data import corpora

# Modules that Python 3.12 and 3.13 removed, or that slim images leave out.
MISSING = (
  "aifc asynchat asyncore cgi cgitb chunk crypt curses distutils ensurepip "
  "imp lib2to3 mailcap nntplib pipes pydoc_data smtpd sndhdr sqlite3 sunau "
  "telnetlib test tests tkinter turtle turtledemo uu venv xdrlib"
).split()


@pytest.fixture(scope="module")
def library() -> corpora.Corpus:
  return corpora.standard_library()


@pytest.fixture(scope="module")
def remainder() -> corpora.Client:
  return corpora.standard_library_remainder()


@pytest.fixture
def slim(tmp_path) -> pathlib.Path:
  """A copy of the library without what newer or slim installations lack."""
  return pathlib.Path(
    shutil.copytree(
      sysconfig.get_path("stdlib"),
      tmp_path / "slim",
      ignore=lambda folder, names: [
        name
        for name in names
        if name.removesuffix(".py") in MISSING
        or name in ("site-packages", "dist-packages", "idlelib", "__pycache__")
        or name.endswith((".so", ".a"))
      ],
    )
  )


def characters(texts) -> int:
  return sum(map(len, texts))


def check_clients(clients):
  names = [client.name for client in clients]
  assert names == sorted(set(names))
  texts = [text for client in clients for text in client.train]
  texts += [text for client in clients for text in client.held_out]
  assert len(texts) == len(set(texts))
  for client in clients:
    assert characters(client.train) >= corpora.MINIMUM_TRAIN
    held_out = characters(client.held_out)
    assert 0.02 < held_out / (held_out + characters(client.train)) < 0.35
    assert max(map(len, client.train)) >= max(map(len, client.held_out))
  return set(texts)


def test_clients_of_the_library_are_disjoint_and_hold_enough(library):
  assert len(library.clients) >= 30
  assert {"asyncio", "email", "encodings", "xml"} < {
    client.name for client in library.clients
  }
  check_clients(library.clients)


def test_remainder_holds_nothing_of_a_client(library, remainder):
  texts = remainder.train + remainder.held_out
  assert check_clients(library.clients).isdisjoint(texts)
  assert set(remainder.train).isdisjoint(remainder.held_out)
  assert characters(remainder.train) > 1_000_000
  assert 0.03 < characters(remainder.held_out) / characters(texts) < 0.06


def test_every_family_names_modules_of_its_own():
  modules = " ".join(corpora.FAMILIES.values()).split()
  assert len(modules) == len(set(modules))
  assert list(corpora.FAMILIES) == sorted(corpora.FAMILIES)


def test_tables_and_tests_are_left_out(library, remainder):
  clients = (*library.clients, remainder)
  texts = [
    text for client in clients for text in client.train + client.held_out
  ]
  assert not any("decoding_table = (" in text for text in texts)
  assert not any("html5 = {" in text for text in texts)
  assert not any("import unittest\nfrom test import" in text for text in texts)


def test_a_slim_library_is_a_valid_corpus(library, slim):
  (slim / "heapq.py").write_bytes(b"# coding: utf-8\n" + b"\xff" * 5000)
  shutil.rmtree(slim / "json")  # What is left of its family is too little.
  corpus = corpora.standard_library(slim)
  assert 30 <= len(corpus.clients) < len(library.clients)
  texts = check_clients(corpus.clients)
  remainder = corpora.standard_library_remainder(slim)
  assert texts.isdisjoint(remainder.train + remainder.held_out)
  orphan = (slim / "tomllib" / "_parser.py").read_text()
  assert orphan in remainder.train + remainder.held_out
  assert corpus.fingerprint != library.fingerprint


def test_a_folder_that_is_no_library_is_named(tmp_path):
  (tmp_path / "os.py").write_text("# nothing\n" * 1000)
  with pytest.raises(ValueError, match="expected a standard library.*got 0 in"):
    corpora.standard_library(tmp_path)
  with pytest.raises(ValueError, match=tmp_path.name):
    corpora.standard_library_remainder(tmp_path)


def test_fingerprint_is_stable(library):
  assert corpora.standard_library() == library
  assert len(bytes.fromhex(library.fingerprint)) == 32


def plays(path: pathlib.Path, text: str) -> corpora.Corpus:
  path.write_text(text)
  return corpora.shakespeare(path, minimum_characters=10)


@hypothesis.given(
  strategies.lists(strategies.integers(10, 99), min_size=2, max_size=20)
)
def test_a_fifth_is_held_out_and_the_longest_kept(tmp_path_factory, lengths):
  speeches = [f"ROMEO:\n{i:02}{'o' * n}" for i, n in enumerate(lengths)]
  path = tmp_path_factory.getbasetemp() / "play"
  (romeo,) = plays(path, "\n\n".join(speeches)).clients
  texts = romeo.train + romeo.held_out
  assert len(texts) == len(lengths)
  assert max(map(len, romeo.train)) == max(map(len, texts))
  assert romeo.train == tuple(sorted(romeo.train))
  allowed = max(0.2 * characters(texts), min(map(len, texts)))
  assert 0 < characters(romeo.held_out) <= allowed


def test_fingerprint_covers_names_and_contents(tmp_path):
  text = "ROMEO:\nBut soft!\n\nJULIET:\nAy me!\n\nROMEO:\nShe speaks.\n\n"
  text += "JULIET:\nO Romeo, Romeo!\n"
  prints = {
    plays(tmp_path / "play", variant).fingerprint
    for variant in (
      text,
      text.replace("ROMEO", "PARIS"),
      text.replace("soft", "loud"),
      text.replace("Ay me", "Oh no"),
    )
  }
  assert len(prints) == 4
  assert plays(tmp_path / "copy", text).fingerprint in prints


def test_identity_tells_texts_apart(library, remainder):
  assert corpora.identity(library)["fingerprint"] == library.fingerprint
  renamed = remainder._replace(name="else")
  assert corpora.identity(remainder) != corpora.identity(renamed)
  assert corpora.identity(remainder) == corpora.identity(
    corpora.standard_library_remainder()
  )


def test_shakespeare_has_105_speakers(data):
  path = data / "tinyshakespeare" / "input.txt"
  corpus = corpora.shakespeare(path)
  assert len(corpus.clients) == 105
  speeches = path.read_text().strip().split("\n\n")
  for name, train, held_out in corpus.clients:
    spoken = [
      speech.removeprefix(f"{name}:\n")
      for speech in speeches
      if speech.startswith(f"{name}:\n")
    ]
    assert sorted(spoken) == sorted(train + held_out)
    assert 0 < characters(held_out) <= 0.2 * characters(spoken)


def test_shakespeare_says_what_is_missing(tmp_path):
  with pytest.raises(ValueError, match="not a file.*[Dd]ownload"):
    corpora.shakespeare(tmp_path / "input.txt")
  (tmp_path / "input.txt").write_text("ROMEO:\nAy.\n\nROMEO:\nNo.\n")
  with pytest.raises(ValueError, match="minimum_characters=2000.*Lower"):
    corpora.shakespeare(tmp_path / "input.txt")
