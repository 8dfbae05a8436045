"""Finding tokenizers: by the files of a folder, in places, by the variable, in what was downloaded."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from darkroom.errors import InputError
from darkroom.text.bert_tokenizer import BertTokenizer
from darkroom.text.find import find_tokenizer, read_tokenizer
from darkroom.text.t5_tokenizer import T5Tokenizer, train_unigram
from darkroom.text.tokenizer import EOS, TextTokenizer, Tokenizer, train_bpe

CAPTIONS = ["a red apple, 3d style", "the big blue circle"] * 3
CLIP = train_bpe(CAPTIONS, 540, 20)
OTHER_CLIP = train_bpe(CAPTIONS, 530, 20)
T5 = train_unigram(CAPTIONS, 40, 24)
BERT = BertTokenizer({name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red"])})
EVERY: dict[str, TextTokenizer] = {"clip": CLIP, "t5": T5, "bert": BERT}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no variable, so that nothing on this machine is found."""
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.delenv("DARKROOM_TOKENIZERS", raising=False)
    return folder


@pytest.mark.parametrize("name", EVERY)
def test_a_folder_says_whose_tokenizer_it_holds(name: str, tmp_path: Path) -> None:
    tokenizer = EVERY[name]
    tokenizer.save(tmp_path)
    read = read_tokenizer(tmp_path)
    assert type(read) is type(tokenizer)
    assert (read.vocab_size, read.context_length) == (tokenizer.vocab_size, tokenizer.context_length)
    assert torch.equal(read.encode(CAPTIONS), tokenizer.encode(CAPTIONS))


def test_whole_tokenizers_and_single_files_are_told_apart(shared: Path, tmp_path: Path) -> None:
    for name, source, kind in [
        ("spiece.model", "t5_spiece.model", T5Tokenizer),
        ("tokenizer.json", "t5_tokenizer.json", T5Tokenizer),
        ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt.gz", Tokenizer),
    ]:
        folder = tmp_path / source
        folder.mkdir()
        shutil.copy(shared / "data/tokenizers" / source, folder / name)
        assert type(read_tokenizer(folder)) is kind


def test_folders_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocab\.json and merges\.txt \(CLIP\)") as error:
        read_tokenizer(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(error.value)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {}}}')
    with pytest.raises(InputError, match="'WordLevel', not BPE, Unigram, WordPiece"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["clip", "clip_g", "openclip_h"])
def test_any_clip_serves_its_kinds_with_the_padding_of_each(kind: str, tmp_path: Path) -> None:
    CLIP.save(tmp_path)
    found = find_tokenizer(kind, [tmp_path])
    assert found.vocab == CLIP.vocab and found.context_length == 20
    assert found.pad == (EOS if kind == "clip" else "!")
    Tokenizer(CLIP.vocab, CLIP.merges, pad="!").save(tmp_path)
    assert find_tokenizer(kind, [tmp_path]).pad == found.pad


def test_folders_of_models_are_searched(tmp_path: Path) -> None:
    """SD 3's layout: two tokenizers of CLIP and one of T5."""
    CLIP.save(tmp_path / "tokenizer")
    OTHER_CLIP.save(tmp_path / "tokenizer_2")
    T5.save(tmp_path / "tokenizer_3")
    assert find_tokenizer("clip", [tmp_path]).vocab == CLIP.vocab
    assert find_tokenizer("clip_g", [tmp_path]).vocab == OTHER_CLIP.vocab
    assert find_tokenizer("t5", [tmp_path]).pieces == T5.pieces


def test_the_first_place_wins_and_those_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    T5.save(tmp_path / "one")
    OTHER_CLIP.save(tmp_path / "two/tokenizers/clip")
    CLIP.save(tmp_path / "three")
    places = [tmp_path / name for name in ("nowhere", "one", "two", "three")]
    assert find_tokenizer("clip", places).vocab == OTHER_CLIP.vocab
    assert find_tokenizer("t5", places[::-1]).pieces == T5.pieces


def test_files_of_several_kinds_may_share_a_folder(tmp_path: Path) -> None:
    T5.save(tmp_path)
    BERT.save(tmp_path)
    CLIP.save(tmp_path)  # the settings left are CLIP's
    assert find_tokenizer("clip", [tmp_path]).vocab == CLIP.vocab
    found = find_tokenizer("t5", [tmp_path])
    assert found.pieces == T5.pieces and found.context_length == 512
    assert find_tokenizer("bert", [tmp_path]).vocab == BERT.vocab


def test_files_may_be_places(shared: Path) -> None:
    files = shared / "data/tokenizers"
    places = [files / "t5_spiece.model", files / "bpe_simple_vocab_16e6.txt.gz"]
    assert find_tokenizer("t5", places).vocab_size == 32100
    assert find_tokenizer("clip_g", places).pad_token_id == 0
    with pytest.raises(InputError, match=r"t5_spiece\.model"):
        find_tokenizer("bert", places)


@pytest.mark.parametrize("name", EVERY)
def test_the_variable_names_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EVERY[name].save(tmp_path / name)
    monkeypatch.setenv("DARKROOM_TOKENIZERS", str(tmp_path))
    assert find_tokenizer(name, []).vocab_size == EVERY[name].vocab_size
    monkeypatch.setenv("DARKROOM_TOKENIZERS", str(tmp_path / name))
    assert find_tokenizer(name, [tmp_path / "nowhere"]).vocab_size == EVERY[name].vocab_size


@pytest.mark.parametrize(
    ("kind", "repo", "subfolder"),
    [
        ("clip", "openai--clip-vit-large-patch14", "."),
        ("clip_g", "laion--CLIP-ViT-bigG-14-laion2B-39B-b160k", "."),
        ("openclip_h", "stabilityai--stable-diffusion-2-1", "tokenizer"),
        ("clip", "black-forest-labs--FLUX.1-schnell", "tokenizer"),
        ("t5", "black-forest-labs--FLUX.1-dev", "tokenizer_2"),
        ("t5", "google--t5-v1_1-xxl", "."),
        ("bert", "google-bert--bert-base-uncased", "."),
    ],
)
def test_what_the_hub_downloaded_is_found(kind: str, repo: str, subfolder: str, cache: Path) -> None:
    expected = EVERY.get(kind, CLIP)
    expected.save(cache / f"models--{repo}" / "snapshots" / "abc" / subfolder)
    assert find_tokenizer(kind, []).vocab_size == expected.vocab_size
    with pytest.raises(InputError, match="no tokenizer"):
        find_tokenizer("bert" if kind != "bert" else "t5", [])


def test_the_main_revision_comes_first(cache: Path) -> None:
    repo = cache / "models--openai--clip-vit-large-patch14"
    OTHER_CLIP.save(repo / "snapshots/aaa")
    CLIP.save(repo / "snapshots/bbb")
    assert find_tokenizer("clip", []).vocab == OTHER_CLIP.vocab
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("bbb")
    assert find_tokenizer("clip", []).vocab == CLIP.vocab


def test_bert_reads_what_latent_diffusion_reads(tmp_path: Path) -> None:
    BertTokenizer(BERT.vocab, context_length=512).save(tmp_path)
    assert read_tokenizer(tmp_path).context_length == 77
    assert find_tokenizer("bert", [tmp_path]).context_length == 77


def test_the_error_says_where_it_looked_and_how_to_get_one(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(InputError) as error:
        find_tokenizer("clip", [tmp_path, tmp_path / "nowhere"])
    message = str(error.value)
    for part in [
        "vocab.json and merges.txt",
        "openai/clip-vit-large-patch14",
        "`tokenizers=`",
        "DARKROOM_TOKENIZERS",
        f"{tmp_path} and its subfolders",
        f"{tmp_path / 'nowhere'} (not there)",
        str(cache),
        f"{tmp_path / 'vocab.json'}: not valid JSON",
    ]:
        assert part in message


def test_importing_it_does_not_import_the_hub() -> None:
    code = "import sys, darkroom.text.find; sys.exit('huggingface_hub.constants' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
