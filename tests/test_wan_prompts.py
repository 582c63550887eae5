"""Prompts for public weights: cleaned text, tokens, and the cache that spares the next run the encoder."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.test_wan_text import DIM, VOCAB, weights
from worldmodel.errors import CheckpointError, ConfigError
from worldmodel.models.wan.prompts import MOST_TOKENS, PromptCache, PromptEncoder, Tokenizer, clean_text

SENTENCES = ["A red car drives along the river.", "The old mill stands by the water & the bridge.", "Zwei Boote fahren zum Hafen"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "encoder.safetensors"
    save_file(weights(), path)
    return path


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("ftfy")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=VOCAB,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    path.write_bytes(model.getvalue())
    return path


def test_text_is_cleaned_as_published():
    pytest.importorskip("ftfy")
    assert clean_text("  a \t b\n\nc\u3000d ") == "a b c d"
    assert clean_text("mill &amp;amp; bridge &lt;i&gt;") == "mill & bridge <i>"
    assert clean_text("cafÃ© “x”") == 'café "x"' and clean_text("&nbsp; ") == ""


def test_tokens_end_and_are_cut(pieces):
    tokenizer = Tokenizer(pieces)
    ids = tokenizer("A red   car")
    assert ids[-1] == 1 and ids.count(1) == 1 and tokenizer(" A red car\n") == ids
    assert tokenizer("") == [1]
    long = tokenizer("the river " * 600)
    assert len(long) == MOST_TOKENS and long[-1] == 1 and 1 not in long[:-1]
    assert 1 not in tokenizer("</s> is text")[:-1]


def test_bad_tokenizers_and_missing_packages_are_named(pieces, tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(pieces.read_bytes()[:50])
    for name in ("spiece.model", "absent.model"):
        with pytest.raises(CheckpointError, match="missing or damaged"):
            Tokenizer(tmp_path / name)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ConfigError, match=r"worldmodel\[wan\]"):
        clean_text("a")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"worldmodel\[wan\]"):
        Tokenizer(pieces)


def test_the_second_run_needs_neither_encoder_nor_packages(file, pieces, tmp_path, monkeypatch):
    encoder = PromptEncoder(file, pieces)
    said: list[str] = []
    texts = ["A red car", "the river", "A red car"]
    first = PromptCache(tmp_path / "prompts", encoder.id, said.append).embeddings(texts, encoder)
    assert torch.equal(first[0], first[2]) and first[0].shape[1] == DIM and first[0].dtype == torch.bfloat16
    for package in ("sentencepiece", "ftfy"):
        monkeypatch.setitem(sys.modules, package, None)
    again = PromptEncoder(file, pieces)
    second = PromptCache(tmp_path / "prompts", again.id, said.append).embeddings(texts, again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and said == []


def test_an_encoder_is_known_by_all_that_changes_its_numbers(file, pieces, tmp_path):
    save_file(weights(seed=1), tmp_path / "other.safetensors")
    (tmp_path / "spiece.model").write_bytes(pieces.read_bytes() + b"\0")
    made = [
        PromptEncoder(file, pieces),
        PromptEncoder(tmp_path / "other.safetensors", pieces),
        PromptEncoder(file, tmp_path / "spiece.model"),
        PromptEncoder(file, pieces, dtype=torch.float32),
    ]
    assert len({encoder.id for encoder in made}) == 4 and PromptEncoder(file, pieces, keep=True).id == made[0].id
    with pytest.raises(CheckpointError, match=r"spiece\.model"):
        PromptEncoder(file, tmp_path / "absent.model")


class Counting:
    """An encoder that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts):
        self.asked.append(list(texts))
        return [torch.full((len(text) + 1, 4), float(len(text)), dtype=torch.bfloat16) for text in texts]


def test_the_cache_asks_for_what_it_lacks_alone(tmp_path):
    encode, said = Counting(), []
    cache = PromptCache(tmp_path / "new" / "folder", "encoder", said.append)
    assert [len(made) for made in cache.embeddings(["a", "bb", "a"], encode)] == [2, 3, 2]
    assert [len(made) for made in cache.embeddings(["ccc", "bb", "\ud800"], encode)] == [4, 3, 2]
    cache.embeddings(["\ud800", "a"], encode)
    assert encode.asked == [["a", "bb"], ["ccc", "\ud800"]]
    PromptCache(cache.folder, "another", said.append).embeddings(["a"], encode)
    assert encode.asked[-1] == ["a"] and said == [] and not list(cache.folder.glob("*.tmp"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _foreign(path: Path) -> None:
    save_file({"embedding": torch.zeros(2, 4)}, path)


def _list(path: Path) -> None:
    save_file({"embedding": torch.zeros(2, 4)}, path, metadata={"worldmodel": "[1]"})


@pytest.mark.parametrize("damage", [_cut, _empty, _flip, _foreign, _list])
def test_a_damaged_file_is_made_anew_with_one_sentence(tmp_path, damage):
    encode, said = Counting(), []
    cache = PromptCache(tmp_path, "encoder", said.append)
    made = cache.embeddings(["a red car"], encode)
    damage(cache.path("a red car"))
    assert torch.equal(cache.embeddings(["a red car"], encode)[0], made[0])
    assert len(said) == 1 and "made anew" in said[0] and len(encode.asked) == 2
    cache.embeddings(["a red car"], encode)
    assert len(said) == 1 and len(encode.asked) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "prompts").write_text("a file where the folder should be")
    encode, said = Counting(), []
    cache = PromptCache(tmp_path / "prompts", "encoder", said.append)
    assert cache.embeddings(["a"], encode)[0].shape == (2, 4)
    assert len(said) == 1 and "could not be kept" in said[0]
