import pytest
from released_folder import records

from torchfilm.data.clevr.vocabulary import SPECIALS, Vocabulary, answer_text, tokenize


def vocabulary() -> Vocabulary:
    return Vocabulary.build(records("train"))


def test_words_are_split_on_single_spaces_and_punctuation_follows_the_original() -> None:
    assert tokenize("Is it red; yes, or  no? Now.") == [
        "Is",
        "it",
        "red",
        ";",
        "yes",
        ",",
        "or",
        "",
        "no",
        "Now",
    ]


def test_special_tokens_come_first_then_sorted_tokens() -> None:
    v = vocabulary()
    for table in (v.questions, v.programs, v.answers):
        assert dict(list(table.items())[:4]) == SPECIALS
        assert list(table)[4:] == sorted(list(table)[4:])
        assert list(table.values()) == list(range(len(table)))
    assert list(v.answers)[4:] == ["0", "1", "2", "cube", "sphere", "yes"]
    assert "filter_color[red]" in v.programs
    assert "" in v.questions, "the released CLEVR's 93rd word comes from double spaces"
    assert {"How", "how"} <= set(v.questions), "case counts"


def test_decoding_undoes_encoding() -> None:
    v = vocabulary()
    for record in records("train"):
        tokens = v.encode(record["question"])
        assert tokens[0] == 1
        assert tokens[-1] == 2
        assert v.decode([*tokens, 0, 0]) + "?" == record["question"]


def test_a_rare_word_is_unknown_above_the_threshold() -> None:
    v = Vocabulary.build(records("train"), unk_threshold=2)
    assert "please" not in v.questions
    assert "red" in v.questions
    assert v.encode("red please?") == [1, v.questions["red"], 3, 2]


def test_expanding_keeps_every_number_and_appends_the_new_words() -> None:
    v = vocabulary()
    wider = v.expand([{"question": "Which zebra and apple are red?"}])
    assert dict(list(wider.questions.items())[: len(v.questions)]) == dict(v.questions)
    assert list(wider.questions)[len(v.questions) :] == ["Which", "and", "apple", "zebra"]
    assert wider.answers == v.answers


def test_saving_and_loading_gives_the_same_vocabulary(tmp_path) -> None:
    v = vocabulary()
    v.save(tmp_path / "vocab.json")
    again = Vocabulary.load(tmp_path / "vocab.json")
    assert again == v
    assert again.digest == v.digest != v.expand([{"question": "zebra"}]).digest
    assert [p.name for p in tmp_path.iterdir()] == ["vocab.json"]


def test_the_nearest_words_to_a_misspelt_one_are_named() -> None:
    v = vocabulary()
    assert v.unknown("What is the shpe of the qqq, qqq?") == ["shpe", "qqq"]
    assert v.nearest("shpe")[0] == "shape"
    assert v.nearest("CYAN")[0] == "cyan"
    assert len(v.nearest("zzzzzz")) == 3


def test_empty_tokens_count_only_if_the_vocabulary_has_them() -> None:
    v = Vocabulary.build([{"question": "a b"}])
    assert v.encode("a  b ") == v.encode("a b")


@pytest.mark.parametrize(("raw", "text"), [(True, "yes"), (False, "no"), (3, "3"), ("metal", "metal")])
def test_answers_of_the_public_generator_become_the_released_text(raw, text) -> None:
    assert answer_text(raw) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a vocabulary file with the keys"),
        ('{"question_token_to_idx": {}}', "program_token_to_idx"),
        (
            '{"question_token_to_idx": {"a": 4}, "program_token_to_idx": {}, "answer_token_to_idx": {}}',
            "0 to 0",
        ),
        (
            '{"question_token_to_idx": {"a": 0}, "program_token_to_idx": {}, "answer_token_to_idx": {}}',
            "<NULL>",
        ),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, message) -> None:
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Vocabulary.load(tmp_path / "vocab.json")


@pytest.mark.parametrize("text", ['{"question_token_to_idx": {"a": 1e400}}', "[" * 100_000, "3"])
def test_a_file_that_holds_no_vocabulary_is_named(tmp_path, text) -> None:
    (tmp_path / "vocab.json").write_text(text)
    with pytest.raises(ValueError, match=r"vocab\.json: expected a vocabulary file with the keys"):
        Vocabulary.load(tmp_path / "vocab.json")
