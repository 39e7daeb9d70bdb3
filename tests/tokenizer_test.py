import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prolong_jax.config import TINY_BASE
from prolong_jax.tokenizer import ChatTokenizer, stop_finder, stream_text

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "naïve café, 日本語",
    "12345 12345 x = 1",
] * 50
R1_TEMPLATE = (
    "{{bos_token}}{% for m in messages %}<user>{{m['content']}}{% endfor %}{{'<think>\\n'}}"
)
MIXED = "The fox, naïve: 日本 🙂🇯🇵 é  two  spaces\n\tx .\ufffd don't 12345 e\u0301"


def write_settings(directory, **changes):
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": R1_TEMPLATE} | changes
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def byte_level(tmp_path):
    """Byte-level BPE that keeps digits together, as no Qwen tokenizer does, in a qwen2 model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_settings(
        tmp_path, tokenizer_class="LlamaTokenizerFast", clean_up_tokenization_spaces=True
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 1}))
    return tmp_path


@pytest.fixture
def pieces(tmp_path):
    """A directory with nothing but a sentencepiece model and its settings."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=350,
        byte_fallback=True,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
    )
    write_settings(tmp_path, tokenizer_class="LlamaTokenizer", unk_token="<unk>")
    return tmp_path


@pytest.fixture(params=["byte_level", "pieces", "tiny"])
def tokenizer(request):
    return ChatTokenizer(
        TINY_BASE if request.param == "tiny" else request.getfixturevalue(request.param)
    )


def encode(tokenizer, text):
    return tokenizer._tokenizer.encode(text, add_special_tokens=False)


def test_text_survives(tokenizer):
    assert tokenizer.decode(encode(tokenizer, MIXED)) == MIXED


def test_streamed_pieces_are_whole_characters_and_add_up(tokenizer):
    ids = encode(tokenizer, MIXED)
    pieces = list(stream_text(tokenizer.decode, ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) > 20  # it does stream
    assert sum(piece.count("\ufffd") for piece in pieces) == 1  # the one of the text itself


def test_a_stream_shows_each_character_as_soon_as_it_is_whole(byte_level):
    tokenizer, arrived, shown = ChatTokenizer(byte_level), [], ""
    ids = encode(tokenizer, "x🙂é日")

    def one_by_one():
        for token in ids:
            whole = tokenizer.decode(arrived).rstrip("\ufffd")
            assert shown == whole
            arrived.append(token)
            yield token

    for piece in stream_text(tokenizer.decode, one_by_one()):
        shown += piece
    assert shown == "x🙂é日"


def test_a_sequence_that_ends_inside_of_a_character_is_shown_to_its_end(byte_level):
    tokenizer = ChatTokenizer(byte_level)
    ids = encode(tokenizer, "x🙂")[:-1]
    assert "".join(stream_text(tokenizer.decode, ids)) == tokenizer.decode(ids) == "x\ufffd"


def test_a_shipped_tokenizer_is_read_as_it_stands(byte_level):
    file = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    text = "12345 e\u0301"
    assert encode(ChatTokenizer(byte_level), text) == file.encode(text).ids


def test_a_prompt_that_opens_the_reasoning(byte_level, pieces):
    for directory in (byte_level, pieces):
        tokenizer = ChatTokenizer(directory)
        ids, opened = tokenizer.encode_chat([{"role": "user", "content": "The fox"}])
        assert opened == "<think>\n"
        assert ids[0] == tokenizer._tokenizer.bos_token_id and ids.count(ids[0]) == 1
        text = tokenizer._tokenizer.decode(ids)
        assert text.startswith("<s>") and text.endswith("<think>\n")


def test_a_prompt_that_does_not(byte_level):
    write_settings(byte_level, chat_template="<think></think>{{messages[0]['content']}}")
    assert ChatTokenizer(byte_level).encode_chat([{"role": "user", "content": "x"}])[1] == ""


@pytest.mark.parametrize(("declared", "stop_ids"), [(7, (7,)), ([7, 9], (7, 9))])
def test_stop_ids_of_the_generation_config(byte_level, declared, stop_ids):
    (byte_level / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    assert ChatTokenizer(byte_level).stop_ids == stop_ids


def test_without_a_generation_config_the_model_and_then_the_tokenizer_say_it(byte_level):
    assert ChatTokenizer(byte_level).stop_ids == (1,)
    (byte_level / "config.json").unlink()
    assert ChatTokenizer(byte_level).stop_ids == (1,)
    write_settings(byte_level, eos_token=None)
    with pytest.raises(ValueError, match="has no stop token"):
        ChatTokenizer(byte_level)


def test_directories_without_a_usable_tokenizer_are_refused(byte_level, tmp_path):
    write_settings(byte_level, chat_template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTokenizer(byte_level)
    (byte_level / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="no usable tokenizer"):
        ChatTokenizer(byte_level)


def test_a_stop_string_is_found_in_few_looks():
    calls = []

    def decode(tokens):
        calls.append(len(tokens))
        return "".join(map(chr, tokens))

    find = stop_finder(decode, ("stop", "st.p"))
    text = list(map(ord, "x" * 5000 + "stop" + "x" * 3000))
    assert find(text) == 5004 and len(calls) < 20
    assert find(text[:5003]) is None and find(list(map(ord, "st.p"))) == 4
    assert stop_finder(decode, ())(text) is None
    with pytest.raises(ValueError, match="empty"):
        stop_finder(decode, ("",))
