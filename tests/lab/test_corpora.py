"""The four sentence sets: what is kept, what is dropped, and splits that depend on the seed alone."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from papercore.lab import corpora
from tests.tiny_bert import write_questions


def _zip(root, name, files):
    (root / "corpora").mkdir(exist_ok=True)
    with zipfile.ZipFile(root / "corpora" / f"{name}.zip", "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{name}/{file}", text.encode("latin-1"))


def test_trec_keeps_the_official_split(tmp_path):
    corpus = corpora.read("trec", path=write_questions(tmp_path, each=4, tests=2))
    assert len(corpus.train_texts) == 24 and len(corpus.test_texts) == 12
    assert corpus.classes == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert np.bincount(corpus.train_labels).tolist() == [4] * 6
    assert corpus.train_texts[1].startswith("why ") and corpus.train_fine[1] == "DESC:fine"
    assert len(corpus.descriptions) == 6


def test_leaks_are_dropped_from_training_alone(tmp_path):
    train = "HUM:ind who is it ?\nHUM:ind who is it ?\nLOC:city where is it ?\nNUM:date when is it ?\n"
    _zip(tmp_path, "qc", {"train.txt": train, "test.txt": "LOC:city where is it ?\n"})
    corpus = corpora.read("trec", path=tmp_path)
    assert len(corpus.train_texts) == 4
    clean = corpus.without_leaks()
    assert clean.train_texts == ("who is it ?", "when is it ?")
    assert clean.train_labels.tolist() == [3, 5] and clean.train_fine == ("HUM:ind", "NUM:date")
    assert clean.test_texts == corpus.test_texts


def test_a_damaged_line_is_named(tmp_path):
    _zip(tmp_path, "qc", {"train.txt": "HUM:ind who ?\nXYZ:abc what ?\n", "test.txt": "HUM:ind who ?\n"})
    with pytest.raises(
        ValueError, match=r"qc/train.txt, line 2: expected 'CLASS:fine question', got 'XYZ:abc what"
    ):
        corpora.read("trec", path=tmp_path)


def test_sentences_with_an_old_line_end_byte_stay_whole(tmp_path):
    # 0x85 is a line end to str.splitlines, and an ellipsis in the encoding of many reviews
    _zip(
        tmp_path,
        "sentence_polarity",
        {"rt-polarity.neg": "bad\x85 film\nworse\nbad\x85 film\n", "rt-polarity.pos": "good\nfine\n"},
    )
    corpus = corpora.read("mr", path=tmp_path, test_size=1)
    texts = [*corpus.train_texts, *corpus.test_texts]
    assert sorted(texts) == ["bad\x85 film", "fine", "good", "worse"]  # the duplicate is gone
    labels = dict(zip(texts, [*corpus.train_labels, *corpus.test_labels], strict=True))
    assert labels == {"bad\x85 film": 0, "worse": 0, "good": 1, "fine": 1}


def test_reviews_need_marks_of_one_sign(tmp_path):
    first = "* head *\n[t] title\nlens[+2]##i like it .\nlens[-1], size[-3]##too big .\nlens[+1], size[-1]##mixed .\n##unmarked .\n"
    _zip(tmp_path, "product_reviews_1", {"camera.txt": first, "README.txt": "lens[+2]##not a review ."})
    _zip(tmp_path, "product_reviews_2", {"phone.txt": "sound[+3][u]##great sound .\n"})
    corpus = corpora.read("cr", path=tmp_path, test_size=1)
    labels = dict(
        zip(
            (*corpus.train_texts, *corpus.test_texts),
            [*corpus.train_labels, *corpus.test_labels],
            strict=True,
        )
    )
    assert labels == {"i like it .": 1, "too big .": 0, "great sound .": 1}


def test_splits_depend_on_the_seed_alone(tmp_path):
    sentences = [f"plot {i}" for i in range(20)], [f"quote {i}" for i in range(20)]
    _zip(
        tmp_path,
        "subjectivity",
        {"plot.tok.gt9.5000": "\n".join(sentences[0]), "quote.tok.gt9.5000": "\n".join(sentences[1])},
    )
    one, same, other = (corpora.read("subj", path=tmp_path, test_size=10, seed=seed) for seed in (0, 0, 1))
    assert one.test_texts == same.test_texts and one.train_texts == same.train_texts
    assert set(one.test_texts) != set(other.test_texts)
    assert not set(one.train_texts) & set(one.test_texts) and len(one.train_texts) == 30
    with pytest.raises(ValueError, match="between 1 and 39"):
        corpora.read("subj", path=tmp_path, test_size=40)


def test_few_shot_samples_are_balanced_and_apart():
    labels = np.repeat([0, 1, 2], [40, 9, 25])
    train, held = corpora.few_shot(labels, 4, seed=1)
    assert np.bincount(labels[train]).tolist() == [4, 4, 4] == np.bincount(labels[held]).tolist()
    assert not set(train) & set(held)
    assert np.array_equal(corpora.few_shot(labels, 4, seed=1)[0], train)
    assert not np.array_equal(corpora.few_shot(labels, 4, seed=2)[0], train)
    with pytest.raises(ValueError, match=r"class 1 has 9 examples; k=5 for training and 5 held out need 10"):
        corpora.few_shot(labels, 5, seed=0)


def test_samples_without_regard_to_class():
    train, held = corpora.sample(50, 20, seed=3, held_out=10)
    assert len(set(train) | set(held)) == 30
    with pytest.raises(ValueError, match="do not fit into 50"):
        corpora.sample(50, 45, seed=0, held_out=10)


def test_unknown_names_and_needless_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown corpus 'imdb': expected one of trec, mr, subj, cr"):
        corpora.read("imdb")
    with pytest.raises(ValueError, match="official test set"):
        corpora.read("trec", test_size=10, path=tmp_path)
