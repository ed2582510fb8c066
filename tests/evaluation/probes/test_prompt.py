"""Check the prompts of needle probes: length, depth of the needle, answers, and what they depend on."""

import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from ttt_jax.config import ConfigError
from ttt_jax.data.prepare import tokenizer as tokenizer_lib
from ttt_jax.data.token_source import TokenSource
from ttt_jax.evaluation.probes import needle, prompt

TEXT = "".join(
    f"Chapter {i}.\n\nIt was the {i}th day; nobody had “counted” them! Was it cold? She said: Ünd so weiter... and "
    f"went on, {'word ' * (i % 7)}until evening.\n"
    for i in range(200)
)
BOS = 256


def byte_source(text):
    return TokenSource("books/validation", np.frombuffer(text.encode(), np.uint8).astype(np.uint16), 257, BOS)


@pytest.fixture(scope="module")
def bpe():
    """Return a byte-level BPE as ``ttt tokenize --train-bpe`` makes it; merges join spaces with words."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    corpus = [TEXT, needle.NOISE, " 1234567 7654321 1212121 is"]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer_lib.from_huggingface(tokenizer.to_str().encode(), "tokenizer.json", None, None)


@pytest.fixture(scope="module")
def prefixing():
    """Return a tokenizer that puts a space before the first word of every text, as SentencePiece models do."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], show_progress=False)
    words = " ".join([TEXT, needle.NOISE, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ\n-:,."])
    needles = [needle.draw(np.random.default_rng(0), task, 2) for task in needle.TASKS.values()]
    questions = [text for each in needles for text in (each.question, each.sentence, each.introduction)]
    tokenizer.train_from_iterator([words, *questions], trainer)
    return tokenizer_lib.from_huggingface(tokenizer.to_str().encode(), "tokenizer.json", None, None)


@pytest.fixture(scope="module")
def byte():
    return tokenizer_lib.byte()


def made(tokenizer, name="number", *, haystack=None, encode=None, bos=BOS, **options):
    task = needle.TASKS[name]
    if haystack is None:
        haystack = needle.haystack_of_source(byte_source(TEXT), tokenizer_lib.byte().decoder())
    options = {"context": 1000, "depths": [0, 50, 100], "index": 0, **options}
    haystack = needle.noise_haystack() if task.noise else haystack
    return prompt.examples(task, haystack, encode or tokenizer.encoder(), bos, **options)


def text_of(tokenizer, example):
    return tokenizer.decoder()(example.tokens)


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(needle.TASKS)),
    context=st.integers(520, 3000),
    depth=st.floats(0, 100),
    index=st.integers(0, 10**6),
    bos=st.sampled_from([None, BOS]),
)
def test_length_depth_and_answer(byte, name, context, depth, index, bos):
    (example,) = made(byte, name, context=context, depths=[depth], index=index, bos=bos)
    assert example.tokens.shape == (context,)
    assert (example.tokens == BOS).sum() == (bos is not None)
    text = text_of(byte, example)
    hidden = example.needle
    # The answer to the question is in the text, once.
    kind, key = re.search(r"What is the special magic (\w+) for (\S+) mentioned", text).groups()
    (answer,) = re.findall(rf"One of the special magic {kind}s for {key} is: (\S+)\.", text)
    assert text.endswith(f"The special magic {kind} for {key} mentioned in the provided text is {answer}")
    assert (key, answer) == (hidden.key, hidden.values[0])
    np.testing.assert_array_equal(example.tokens[-len(answer) :], list(answer.encode()))
    np.testing.assert_array_equal(example.candidates[0], list(answer.encode()))
    # The depth is the needle's position in the bytes of the haystack, to half of the longest unit.
    before, after = text.encode().split(hidden.sentence.encode())
    before = before.split(hidden.introduction.encode())[1]
    after = after.split(b"\nWhat is the special magic")[0]
    actual = 100 * len(before) / (len(before) + len(after))
    assert actual == pytest.approx(example.depth, abs=100 * 3 / (len(before) + len(after)))
    assert abs(example.depth - depth) <= 100 * 151 / (len(before) + len(after))


def test_the_forms_of_answers(byte):
    for name, form in (
        ("passkey", r"[1-9]\d{6}"),
        ("number", r"[1-9]\d{6}"),
        ("uuid", r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}"),
    ):
        for index in range(20):
            hidden = made(byte, name, index=index, candidates=5)[0].needle
            assert len(set(hidden.values)) == 5
            assert all(re.fullmatch(form, value) for value in hidden.values)
            assert re.fullmatch("[a-z]+-[a-z]+", hidden.key)
    assert len({made(byte, index=index)[0].needle for index in range(30)}) == 30


def test_noise_repeats_five_sentences(byte):
    text = text_of(byte, made(byte, "passkey", depths=[30])[0])
    _, *lines, last, _ = text.split("\n")
    assert needle.NOISE.startswith(last)
    assert sum(line == needle.NOISE for line in lines) == len(lines) - 1 > 3  # all but the needle
    assert needle.NOISE.startswith("The grass is green. The sky is blue.")


def test_needles_stand_between_sentences(byte):
    for example in made(byte, depths=list(range(10, 100, 10))):
        before, after = text_of(byte, example).split(f" {example.needle.sentence}")
        assert before.endswith((".", "!", "?"))
        assert after[0] in " \n"


def test_depth_and_context_move_the_same_needle_in_the_same_text(byte):
    short, long = made(byte, index=4), made(byte, index=4, context=2000)
    assert len({example.needle for example in (*short, *long)}) == 1
    texts = [text_of(byte, example).replace(" " + example.needle.sentence, "") for example in short]
    assert texts[0] == texts[1] == texts[2]
    assert [example.depth for example in short][::2] == [0, 100]
    assert made(byte, index=4)[1].tokens.tolist() == short[1].tokens.tolist()
    assert made(byte, index=4, seed=1)[0].needle != short[0].needle
    assert made(byte, index=5)[0].needle != short[0].needle
    assert made(byte, index=4, depths=[50])[0].tokens.tolist() == short[1].tokens.tolist()


def test_answers_of_a_tokenizer_that_joins_spaces_with_words(bpe):
    """Expect question and candidate together to have the tokens of the whole text."""
    joined = 0
    for index in range(10):
        (example,) = made(bpe, index=index, context=600, depths=[40], bos=0)
        hidden, decode = example.needle, bpe.decoder()
        question = example.tokens[: -len(example.candidates[0])]
        for value, tokens in zip(hidden.values, example.candidates, strict=True):
            whole = bpe.encoder()(f"\n{hidden.question} {value}")
            np.testing.assert_array_equal(whole[-len(tokens) :], tokens)
            text = decode(np.concatenate([question, tokens]))
            assert text.endswith(f"\n{hidden.question} {value}")
        joined += all(decode(tokens).startswith(" ") for tokens in example.candidates)
        assert example.tokens.shape == (600,)
    assert joined  # " 1" is one token here


def test_answers_of_a_tokenizer_that_begins_texts_with_a_space(prefixing):
    (example,) = made(prefixing, context=700, depths=[50], bos=None)
    text = prefixing.decoder()(example.tokens)
    assert " \n" not in text  # as if its parts had been tokenized separately
    assert text.startswith(f"{example.needle.introduction}\n")
    assert example.needle.sentence in text
    assert text.endswith(f"\n{example.needle.question} {example.needle.values[0]}")


def test_haystacks_of_files_repeat_after_their_end(byte, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT[:3000])
    found = needle.haystack_of_file(str(path))
    assert found.name == "book.txt"
    assert found.fingerprint != needle.haystack_of_source(byte_source(TEXT), byte.decoder()).fingerprint
    units = found.units(0.999, 5000)
    assert "".join(units) in TEXT[:3000] * 4
    assert len("".join(units)) > 4500
    (example,) = made(byte, haystack=found, context=9000, depths=[50])
    assert example.tokens.shape == (9000,)


@given(st.text(alphabet=st.sampled_from("ab .!?\n\"'é”"), max_size=900))
def test_units_are_the_whole_text(text):
    units = needle.split_into_units(text)
    assert "".join(units) == text
    assert all(0 < len(unit) <= 300 for unit in units)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "notes.txt: not UTF-8 text; expected a text file"),
        (b" \n", "notes.txt: no text in it"),
        (None, "notes.txt: no such file"),
    ],
)
def test_files_that_are_not_text_are_refused(byte, tmp_path, content, message):
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="--haystack") as error:
        needle.haystack_of_file(str(path))
    assert message in str(error.value)


def test_a_source_without_text_is_refused(byte):
    source = TokenSource("empty/test", np.full(5000, BOS, np.uint16), 257, BOS)
    with pytest.raises(ConfigError, match=r"^empty/test: no text in it; expected --haystack FILE"):
        made(byte, haystack=needle.haystack_of_source(source, byte.decoder()))


def test_a_split_without_tokens_is_refused(byte):
    with pytest.raises(ConfigError, match=r"^books/validation: no text in it; expected --haystack FILE"):
        needle.haystack_of_source(byte_source(""), byte.decoder())


def test_a_short_text_is_read_once_for_a_long_haystack(byte):
    reads, decode = [], byte.decoder()
    found = needle.haystack_of_source(byte_source("Ab c. "), lambda tokens: reads.append(len(tokens)) or decode(tokens))
    units = found.units(0.5, 100_000)
    assert len(reads) <= 4
    assert "".join(units) in "Ab c. " * 20_000
    assert len("".join(units)) > 99_000


def test_a_context_that_is_too_short_is_refused(byte):
    with pytest.raises(ConfigError) as error:
        made(byte, context=300)
    least = int(
        re.fullmatch(r"--context 300: a prompt without haystack has (\d+) tokens; expected more", str(error.value))[1]
    )
    assert made(byte, context=least + 1)[0].tokens.shape == (least + 1,)
    with pytest.raises(ConfigError):
        made(byte, context=least)
