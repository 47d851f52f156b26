import io
import re
import shutil
import tarfile

import datasets
import pytest

from fedjax_llm.data import sources

ROWS = [{"a": f"row {i}, äé", "b": i} for i in range(6)]
TRAIN, TEST = ROWS[:4], ROWS[4:]
WRITERS = {
  "parquet": lambda rows, path: rows.to_parquet(path),
  "jsonl": lambda rows, path: rows.to_json(path),
  "json": lambda rows, path: rows.to_json(path, lines=False),
  "csv": lambda rows, path: rows.to_csv(path),
}


@pytest.fixture(autouse=True)
def no_bars():
  """Of what the tests write; what they load has to see to it by itself."""
  datasets.utils.disable_progress_bars()
  yield
  datasets.utils.enable_progress_bars()


def write(folder, kind="jsonl", **splits):
  folder.mkdir(parents=True, exist_ok=True)
  for name, rows in splits.items():
    rows = datasets.Dataset.from_list(rows)
    WRITERS[kind](rows, str(folder / f"{name}.{kind}"))
  return folder


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_in_hub_layout_has_its_splits(tmp_path, kind):
  folder = write(tmp_path / "toy", kind, train=TRAIN, test=TEST)
  (folder / "LICENSE").write_text("MIT")
  assert sources.load(f"{folder}@train").to_list() == TRAIN
  assert sources.load(folder, split="test").to_list() == TEST
  assert sources.load(f"{folder}@train[1:3]").to_list() == TRAIN[1:3]
  assert sources.load(f"{folder}@train[-1:]+test").to_list() == ROWS[3:]


def test_a_text_file_is_a_row_a_line(tmp_path):
  (tmp_path / "train.txt").write_text("one\ntwo\n")
  assert sources.load(tmp_path).to_list() == [{"text": "one"}, {"text": "two"}]


def test_one_split_needs_no_name(tmp_path):
  assert sources.load(write(tmp_path, train=TRAIN)).to_list() == TRAIN


def test_a_folder_may_be_named_like_a_spec(tmp_path):
  folder = write(tmp_path / "a:b@test", train=TRAIN)
  assert sources.load(folder).to_list() == TRAIN
  assert sources.load(f"{folder}@train[:2]").to_list() == TRAIN[:2]


def test_a_config_is_a_part_of_a_folder(tmp_path):
  write(tmp_path / "main", train=TRAIN)
  write(tmp_path / "more", train=TEST)
  (tmp_path / "README.md").write_text(
    "---\nconfigs:\n- config_name: main\n  data_files: main/*.jsonl\n"
    "- config_name: more\n  data_files: more/*.jsonl\n---\n"
  )
  assert sources.load(f"{tmp_path}:main").to_list() == TRAIN
  assert sources.load(f"{tmp_path}:more@train[:1]").to_list() == TEST[:1]


@pytest.mark.parametrize("kind", WRITERS)
def test_files_tell_which_each_row_is_from(tmp_path, kind):
  write(tmp_path, kind, ann=TRAIN, bob=TEST)
  expected = [row | {"file": "ann"} for row in TRAIN]
  expected += [row | {"file": "bob"} for row in TEST]
  assert sources.load(f"{tmp_path}/*.{kind}").to_list() == expected
  some = sources.load(f"{tmp_path}/*.{kind}@train[3:5]")
  assert some.to_list() == expected[3:5]
  one = sources.load(tmp_path / f"bob.{kind}")
  assert one.to_list() == expected[4:]


def test_files_of_one_name_are_told_by_their_folders(tmp_path, monkeypatch):
  for name, rows in {"ann": TRAIN, "bob": TEST}.items():
    write(tmp_path / "clients" / name, train=rows)
  monkeypatch.chdir(tmp_path)
  data = sources.load("clients/*/train.jsonl")
  assert data["file"][:] == ["ann/train"] * 4 + ["bob/train"] * 2
  monkeypatch.setenv("HOME", str(tmp_path))
  assert sources.load("~/clients/ann").to_list() == TRAIN


def test_rows_in_memory_are_a_data_set(tmp_path):
  data = sources.load(ROWS)
  assert data.to_list() == ROWS
  assert sources.load(data).to_list() == ROWS
  assert sources.load(data, split="train[:2]").to_list() == ROWS[:2]
  splits = datasets.DatasetDict(train=data, test=data.select([5]))
  assert sources.load(splits, split="test").to_list() == ROWS[5:]


def test_a_fingerprint_is_of_the_content_wherever_it_lies(tmp_path):
  here = write(tmp_path / "here" / "toy", train=TRAIN, test=TEST)
  there = shutil.copytree(here, tmp_path / "there" / "toy")
  again = write(tmp_path / "parquet" / "toy", "parquet", train=TRAIN)
  data = sources.load(f"{here}@train")
  fingerprint = sources.fingerprint(data)
  assert len(bytes.fromhex(fingerprint)) == 32
  for same in (f"{there}@train", again, TRAIN):
    assert sources.fingerprint(sources.load(same)) == fingerprint
  others = [
    sources.load(f"{here}@test"),
    data.select([1, 0, 2, 3]),
    data.select(range(3)),
    data.rename_column("a", "c"),
    data.remove_columns("b"),
    data.cast_column("b", datasets.ClassLabel(names=list("wxyz"))),
    data.cast_column("b", datasets.ClassLabel(names=list("wxyv"))),
  ]
  prints = {sources.fingerprint(other) for other in (data, *others)}
  assert len(prints) == 1 + len(others)


def test_a_fingerprint_does_not_depend_on_the_order_of_columns():
  labels = {x: datasets.ClassLabel(names=["no", "yes"]) for x in "ab"}
  features = datasets.Features(labels)
  data = datasets.Dataset.from_list([{"a": 0, "b": 1}], features)
  other = data.select_columns(["b", "a"])
  assert other.column_names == ["b", "a"]
  assert sources.fingerprint(other) == sources.fingerprint(data)


def test_loading_is_silent_and_leaves_progress_bars_as_they_were(
  tmp_path, capfd
):
  write(tmp_path, train=TRAIN)
  datasets.utils.enable_progress_bars()
  sources.load(tmp_path)
  assert not datasets.utils.are_progress_bars_disabled()
  assert capfd.readouterr() == ("", "")
  datasets.utils.disable_progress_bars()
  sources.load(tmp_path)
  assert datasets.utils.are_progress_bars_disabled()


def test_what_is_not_there_is_named(tmp_path):
  write(tmp_path / "toy", train=TRAIN, test=TEST)
  write(tmp_path / "toy", "csv", other=TEST)
  write(tmp_path, ann=TRAIN, bob=[{"b": [1]}], eve=[{"file": "x"}])
  (tmp_path / "empty").mkdir()
  for spec, message in {
    "toy": "one of train, test, got none. Append '@train'",
    "toy@dev": "splits train, test, or a slice.*'train.:100.', got 'dev'",
    "toy@train[:x]": "train, test, or a slice.*got 'train.:x.'",
    "toy:main@test": "config='main'.*default",
    "missing/folder": "missing/folder', which is not.*a file, a folder",
    "empty": "folder in the hub's layout: parquet.*any data files",
    "ann.jsonl:main": "files without a config, got 'main'",
    "toy/*.*": "one ending of .csv, .json.*got .csv, .jsonl",
    "[ab]*.jsonl": "rows of the same columns, got .*ann.jsonl and 1 more",
    "eve.jsonl": "without a column 'file'.*eve.jsonl. Rename",
  }.items():
    with pytest.raises(ValueError, match=f"(?s){message}"):
      sources.load(f"{tmp_path}/{spec}")
  with pytest.raises(ValueError, match="one split.*split='test'"):
    sources.load(f"{tmp_path}/toy@train", split="test")


def test_the_hub_is_named_when_it_is_not_reached(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for spec in ("databricks/databricks-dolly-15k", "openai/gsm8k:main@train"):
    with pytest.raises(ValueError, match="on the hub.*HF_HUB_OFFLINE.*reach"):
      sources.load(spec)


def test_clients_of_shepherd_are_its_files(data):
  dolly = sources.load(data / "dolly15k_fed10" / "local_training_*.json")
  assert sorted(set(dolly["file"])) == [
    f"local_training_{i}" for i in range(10)
  ]
  assert dolly.column_names == [
    *("instruction", "context", "response", "category", "file")
  ]
  assert len(dolly) == 14_931
  assert len(sources.load(data / "gsm8k", split="test")) == 1_319


def archive(path, posts):
  with tarfile.open(path, "w:gz") as file:
    for name, post in posts.items():
      member = tarfile.TarInfo(name)
      member.size = len(post.encode("latin-1"))
      file.addfile(member, io.BytesIO(post.encode("latin-1")))
  return path


def test_newsgroups_lose_headers_and_addresses(tmp_path):
  header = "From: ann@cs.edu (Ann)\nSubject: x\n\n"
  path = archive(
    tmp_path / "posts.tar.gz",
    {
      "20news-bydate-train/sci.med/2": f"{header}Hé @ noon!\n\nbob@b.org: hi",
      "20news-bydate-train/alt.x/7": f"{header}<a.b@c.de>, eve @ f.gov ...\n",
      "20news-bydate-train/sci.med/1": f"{header}mail uunet!cs!bob. Wow! No",
      "20news-bydate-test/sci.med/3": "From: a@b.c\r\n\r\n\r\nText\r\nhere\r\n",
    },
  )
  train = sources.newsgroups(path)
  assert train.features["label"].names == ["alt.x", "sci.med"]
  assert train.to_list() == [
    {"text": "<address> <address> ...", "label": 0},
    {"text": "mail <address> Wow! No", "label": 1},
    {"text": "Hé @ noon!\n\n<address> hi", "label": 1},
  ]
  (test,) = sources.newsgroups(path, "test").to_list()
  assert test["text"] == "Text\nhere"
  titled = sources.newsgroups(path, subject=True)["text"]
  assert titled[0] == "Subject: x\n<address> <address> ..."
  assert sources.newsgroups(path, "test", subject=True)[0] == test
  with pytest.raises(ValueError, match="'train' or 'test', got split='dev'"):
    sources.newsgroups(path, "dev")
  with pytest.raises(ValueError, match="which is not a file. Download"):
    sources.newsgroups(tmp_path / "none.tar.gz")


def test_no_post_shows_an_address_of_its_headers(data):
  path = data / "20news_bydate" / "20news-bydate.tar.gz"
  test = sources.newsgroups(path, "test")
  assert len(test) == 7_532 and len(set(test["label"])) == 20
  everything = "\n".join(test["text"])
  assert not re.search(r"[\w.-]@[\w-]", everything)
  with tarfile.open(path) as file:
    for member in file:
      if "/sci.med/" in member.name and "-test/" in member.name:
        head = file.extractfile(member).read().split(b"\n\n")[0]
        for address in re.findall(rb"\S+@[\w.-]+\w", head):
          assert address.decode("latin-1") not in everything
