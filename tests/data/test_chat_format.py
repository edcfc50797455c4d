"""Which templates are taken, what reaches them, and that an exported tokenizer asks a model as it was trained."""

from __future__ import annotations

import datetime
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer

from rlhf_lightning.data.chat_export import save_tokenizer
from rlhf_lightning.data.chat_format import ChatFormat, _tokens_at
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import ConfigurationError, DataError, ModelError
from tests.data.chat_formats import CHATML, FORMATS, GEMMA, LLAMA2, byte_tokenizer

CHATML_TOKENS = "<|im_start|> <|im_end|>"
USER = {"role": "user", "content": "Hi there"}
TALK = [USER, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go on."}]
SYSTEM = {"role": "system", "content": "Be kind."}
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
DATE_STRING = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ 'Today is ' ~ date_string ~ '\n' }}" + CHATML
)
SINGLE_TURN = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + CHATML
REWRITES_HISTORY = CHATML.replace(  # an earlier reply is shortened once the conversation has been answered
    "m.content +", "(m.content if messages[-1].role == 'user' or loop.last else m.content[:2]) +"
)
THOUGHT = CHATML.replace("assistant\n'", "assistant\n' + ('' if enable_thinking | default(true) else '<no_think>')")
THOUGHT = THOUGHT.replace(
    "m.content +",
    "('<no_think>' if m.role == 'assistant' and not enable_thinking | default(true) else '') + m.content +",
)


def chatml(template, **options):
    return ChatFormat(byte_tokenizer(CHATML_TOKENS, template, eos_token="<|im_end|>"), **options)


def test_a_template_that_writes_the_date_is_refused_with_the_advice_that_fits():
    with pytest.raises(ModelError, match=r"writes the current date, so a run differs .*chat_template: FILE.jinja$"):
        chatml(DATED)
    with pytest.raises(
        ModelError, match=r'writes the current date.*fix it with chat_template_kwargs: \{date_string: "26 Jul 2024"\}$'
    ):
        chatml(DATE_STRING)


def test_a_template_whose_date_is_fixed_is_accepted(tmp_path):
    fixed = chatml(DATE_STRING, chat_template_kwargs={"date_string": "26 Jul 2024"})
    assert fixed.prompt_text([USER]).startswith("Today is 26 Jul 2024\n<|im_start|>user\n")
    file = tmp_path / "fixed.jinja"
    file.write_text(DATED.replace("strftime_now('%d %b %Y')", "'1 May 1999'"), encoding="utf-8")
    assert chatml(DATED, chat_template=str(file)).prompt_text([USER]).startswith("Today is 1 May 1999\n")


def test_a_template_that_never_shows_its_clock_is_accepted():
    assert chatml("{% set now = strftime_now('%Y') %}" + CHATML).prompt_text([USER]) == FORMATS["qwen"].prompt


@pytest.mark.parametrize("day", [datetime.datetime(1999, 12, 31), datetime.datetime(2040, 2, 29)])
def test_the_text_of_a_prompt_is_the_same_on_any_day(day, monkeypatch):
    import transformers.utils.chat_template_utils as library

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    chat_format = chatml(DATE_STRING, chat_template_kwargs={"date_string": "26 Jul 2024"})
    before = chat_format.prompt_text(TALK)
    monkeypatch.setattr(library, "datetime", Clock)
    with pytest.raises(ModelError, match="writes the current date"):
        chatml(DATED)
    assert chat_format.tokenizer.apply_chat_template([USER], tokenize=False).startswith(f"Today is {day:%d %b %Y}")
    assert chat_format.prompt_text(TALK) == before


def test_a_template_that_rewrites_earlier_turns_once_a_reply_follows_is_refused():
    with pytest.raises(ModelError, match=r"writes the prompt differently once a response follows.*transcript"):
        chatml(REWRITES_HISTORY)


def test_a_template_for_single_turns_alone_works_on_them():
    chat_format = chatml(SINGLE_TURN)
    assert chat_format.prompt_text([USER]) == FORMATS["qwen"].prompt
    with pytest.raises(DataError, match="turns user, assistant, user: one turn only"):
        chat_format.prompt_text(TALK)


def test_a_template_that_alters_the_reply_is_refused():
    with pytest.raises(ModelError, match="writes the prompt differently"):
        chatml(CHATML.replace("m.content +", "(m.content | lower if m.role == 'assistant' else m.content) +"))


def test_template_arguments_reach_the_template():
    on, off = (chatml(THOUGHT, chat_template_kwargs={"enable_thinking": value}) for value in (True, False))
    assert on.prompt_text([USER]) == chatml(THOUGHT).prompt_text([USER]) == FORMATS["qwen"].prompt
    assert off.prompt_text([USER]) == FORMATS["qwen"].prompt + "<no_think>"
    assert off.eos_id == on.eos_id


class Exported:
    """A chat format, and the tokenizer that it exports, loaded again."""

    def __init__(self, chat_format, directory):
        self.format = chat_format
        save_tokenizer(chat_format, directory)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def prompt(self, messages, **options):
        """Prompt ids in training, and those that the exported tokenizer makes."""
        options = {"add_generation_prompt": True, "return_dict": False, **options}
        trained = self.format.encode_prompts([self.format.prompt_text(messages)])[0]
        return trained, self.tokenizer.apply_chat_template(messages, **options)

    def row(self, messages, reply):
        """Ids of a whole row in training, and those that the exported tokenizer makes."""
        trained = self.prompt(messages)[0]
        trained += [*self.format.token_ids([self.format.response_text(reply)])[0], self.format.eos_id]
        whole = [*messages, {"role": "assistant", "content": reply}]
        return trained, self.tokenizer.apply_chat_template(whole, return_dict=False)


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_tokenizer_asks_and_answers_as_it_was_trained(name, tmp_path):
    exported = Exported(FORMATS[name].chat_format, tmp_path)
    conversations = [[USER], TALK] + ([[SYSTEM, *TALK]] if name not in ("gemma", "llama 2") else [])
    for messages in conversations:
        trained, asked = exported.prompt(messages)
        assert trained == asked
        for reply in ("Well.", " Well.", "\nWell.\t", "W e\n\nll"):
            row, written = exported.row(messages, reply)
            assert row == written[: len(row)]
            assert exported.tokenizer.decode(written[len(row) :]) in ("", "\n")  # many end a turn with a line end


def test_an_exported_tokenizer_makes_the_same_format_again(tmp_path):
    for number, known in enumerate(FORMATS.values()):
        exported = Exported(known.chat_format, tmp_path / str(number))
        again = ChatFormat(exported.tokenizer)
        for messages in ([USER], TALK):
            assert again.encode_prompts([again.prompt_text(messages)])[0] == exported.prompt(messages)[0]
        # "transcript" may begin a response with a blank of its own; a template never does without its lead
        assert again.response_text("Well.") == known.chat_format.response_text("Well.")
        assert again.eos_id == known.chat_format.eos_id


def test_an_overriding_template_file_is_exported(tmp_path):
    file = tmp_path / "llama2.jinja"
    file.write_text(LLAMA2 + "\n", encoding="utf-8")
    tokenizer = byte_tokenizer("<s> </s>", CHATML, adds="<s> $A", bos_token="<s>", eos_token="</s>")
    exported = Exported(ChatFormat(tokenizer, chat_template=str(file)), tmp_path / "model")
    trained, asked = exported.prompt(TALK)
    assert trained == asked
    assert exported.tokenizer.decode(asked) == "<s>[INST] Hi there [/INST] Yes? </s><s>[INST] Go on. [/INST]"
    assert exported.tokenizer.chat_template == file.read_text(encoding="utf-8")
    assert tokenizer.chat_template == CHATML


def test_a_template_file_with_leading_blanks_and_without_start_or_generation_prompt_is_exported(tmp_path):
    """What is put before and after a template must not change how Jinja trims its first and last line."""
    file = tmp_path / "odd.jinja"
    file.write_text(
        "\n  {% for m in messages %}\n[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n  {% endfor %}\n", "utf-8"
    )
    tokenizer = byte_tokenizer("<s> </s>", adds="<s> $A", bos_token="<s>", eos_token="</s>")
    exported = Exported(ChatFormat(tokenizer, chat_template=str(file)), tmp_path / "model")
    assert exported.format.start_ids
    assert exported.format.prompt_tail
    for messages in ([USER], TALK):
        trained, asked = exported.prompt(messages)
        assert trained == asked
        row, written = exported.row(messages, "Well.")
        assert row == written[: len(row)]


def test_template_arguments_are_exported_as_defaults(tmp_path):
    arguments = {
        "enable_thinking": False,
        "unused": {"a": [None, "b"]},
        "no-name": 1,
        "date_string": "26 'Jul'\n2024",
    }
    chat_format = chatml(DATE_STRING[: -len(CHATML)] + THOUGHT, chat_template_kwargs=arguments)
    exported = Exported(chat_format, tmp_path)
    trained, asked = exported.prompt([USER])
    assert trained == asked
    text = exported.tokenizer.decode(asked)
    assert text == "Today is 26 'Jul'\n2024\n" + FORMATS["qwen"].prompt + "<no_think>"
    _, other = exported.prompt([USER], enable_thinking=True, date_string="today")
    assert exported.tokenizer.decode(other) == "Today is today\n" + FORMATS["qwen"].prompt


def test_an_argument_that_no_template_can_read_is_refused():
    with pytest.raises(ConfigurationError, match=r"chat_template_kwargs: date_string is a date, which no template can"):
        chatml(DATE_STRING, chat_template_kwargs={"date_string": datetime.date(2024, 7, 26)})


@pytest.mark.parametrize("letter", "aAbBdHIjmMpSUwWyY")
def test_no_part_of_a_date_or_time_goes_unseen(letter):
    for call in (f"strftime_now('%{letter}')", f"strftime_now(format='at %-{letter}.')"):
        with pytest.raises(ModelError, match="writes the current date"):
            chatml("{{ " + call + " }}" + CHATML)


def test_exporting_leaves_the_tokenizer_in_use_as_it_is(tmp_path):
    chat_format = FORMATS["transcript in place of a template"].chat_format
    save_tokenizer(chat_format, tmp_path)
    assert chat_format.tokenizer.chat_template == CHATML


def test_the_ids_of_a_row_need_not_be_those_of_its_joined_text(tiny_qwen2):
    """They are encoded apart, so that a prompt has the same ids whatever follows; exporting cannot change that."""
    tokenizer = load_tokenizer(str(tiny_qwen2))
    first, second = next(token for token in sorted(tokenizer.get_vocab()) if len(token) == 2 and token.isalpha())
    tokenizer.chat_template = CHATML.replace("assistant\n'", f"assistant\n{first}'").replace(
        "m.role + '\n'", f"m.role + '\n' + ('{first}' if m.role == 'assistant' else '')"
    )
    glued = ChatFormat(tokenizer)
    prompt = glued.prompt_text([USER])
    assert prompt == FORMATS["qwen"].prompt + first
    apart, joined = glued.token_ids([prompt])[0] + glued.token_ids([second])[0], glued.token_ids([prompt + second])[0]
    assert tokenizer.decode(apart) == tokenizer.decode(joined) == prompt + second
    assert apart != joined


def test_a_tokenizer_that_brings_truncation_and_padding_of_its_own_is_neither_cut_nor_padded(tmp_path):
    tokenizer = byte_tokenizer(CHATML_TOKENS, CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")
    plain = ChatFormat(tokenizer)
    expected = plain.token_ids([string.ascii_letters, "x"])
    fingerprint = plain.fingerprint()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(tmp_path)
    chat_format = ChatFormat(load_tokenizer(str(tmp_path)))
    assert chat_format.token_ids([string.ascii_letters, "x"]) == expected
    chat_format.tokenizer("a b c", truncation=True, max_length=2, padding="max_length")  # a call may leave some
    assert chat_format.token_ids([string.ascii_letters, "x"]) == expected
    chat_format.tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    assert chat_format.fingerprint() == fingerprint


def test_nothing_to_encode_is_no_ids():
    assert FORMATS["qwen"].chat_format.token_ids([]) == []
    assert FORMATS["qwen"].chat_format.encode_prompts([]) == []


def test_a_tokenizer_written_in_python_serves_as_well():
    tokenizer = ByT5Tokenizer()  # a token per byte, EOS added by itself, no BOS, no template
    assert getattr(tokenizer, "backend_tokenizer", None) is None
    chat_format = ChatFormat(tokenizer)
    assert chat_format.start_ids == []
    assert chat_format.eos_id == tokenizer.eos_token_id
    prompt = chat_format.encode_prompts([chat_format.prompt_text([USER])])[0]
    assert tokenizer.decode(prompt) == "\n\nHuman: Hi there\n\nAssistant:"
    assert tokenizer.eos_token_id not in prompt
    assert chat_format.control_token_in(["fine", "a </s> b"]) == "</s>"
    assert chat_format.fingerprint() == ChatFormat(ByT5Tokenizer()).fingerprint()
    assert chat_format.fingerprint() != ChatFormat(ByT5Tokenizer(extra_ids=10)).fingerprint()


def changed_formats():
    """Chat formats that each differ in one thing that decides about ids."""
    base = {"specials": "<|im_start|> <|im_end|> <|endoftext|>", "template": CHATML, "eos_token": "<|im_end|>"}

    def make(options=None, **changes):
        tokenizer = byte_tokenizer(**{**base, **changes})
        return ChatFormat(tokenizer, **(options or {}))

    yield "as it was", make
    yield "template", lambda: make(template="{# another #}" + CHATML)
    yield "transcript", lambda: make({"chat_template": "transcript"})
    yield "arguments", lambda: make({"chat_template_kwargs": {"x": 1}})
    yield "other arguments", lambda: make({"chat_template_kwargs": {"x": 2}})
    yield "eos", lambda: make(eos_token="<|endoftext|>")
    yield "specials", lambda: make(specials="<|im_start|> <|im_end|> <|endoftext|> <|more|>")
    yield "start token", lambda: make(adds="<|endoftext|> $A")

    def with_word():
        chat_format = make()
        chat_format.tokenizer.add_tokens(["word"])
        return chat_format

    yield "vocabulary", with_word


def test_the_fingerprint_changes_with_every_part_that_decides_about_ids():
    fingerprints = {name: make().fingerprint() for name, make in changed_formats()}
    assert len(set(fingerprints.values())) == len(fingerprints)


def test_the_fingerprint_changes_with_nothing_else(tmp_path):
    makers = dict(changed_formats())
    first = makers["as it was"]()
    before = first.fingerprint()
    assert before == makers["as it was"]().fingerprint()
    first.token_ids(["some", "text"])
    assert first.fingerprint() == before
    first.tokenizer.save_pretrained(tmp_path)
    assert ChatFormat(load_tokenizer(str(tmp_path))).fingerprint() == before
    file = tmp_path / "same.jinja"
    file.write_text(CHATML, encoding="utf-8")
    assert ChatFormat(first.tokenizer, chat_template=str(file)).fingerprint() == before
    ordered = [ChatFormat(first.tokenizer, chat_template_kwargs=a) for a in ({"x": 1, "y": 2}, {"y": 2, "x": 1})]
    assert ordered[0].fingerprint() == ordered[1].fingerprint()


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_control_token_is_found_wherever_it_stands_and_nowhere_else(text):
    chat_format = QWEN
    tokens = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    found = [token for token in tokens if token in text]
    assert (chat_format.control_token_in([text]) is None) == (not found)
    for token in tokens:
        assert chat_format.control_token_in(["", text + token]) in {*tokens}
    ids = chat_format.token_ids([text])[0]
    assert bool(found) == bool(set(ids) & set(chat_format.tokenizer.all_special_ids))


QWEN = FORMATS["qwen"].chat_format


def test_the_head_that_a_cut_keeps_is_all_before_the_words_of_the_first_user():
    head = len(QWEN.token_ids(["<|im_start|>user\n"])[0])
    system = len(QWEN.token_ids(["<|im_start|>system\nBe kind.<|im_end|>\n"])[0])
    turns = [turns_of(QWEN, messages) for messages in ([USER], TALK, [SYSTEM, USER])]
    assert [places[0] for _, places in turns] == [head, head, system + head]
    assert [len(places) for _, places in turns] == [1, 2, 1]
    assert QWEN.encode_turns([]) == []
    assert QWEN.tail_length == len(QWEN.token_ids(["<|im_end|>\n<|im_start|>assistant\n"])[0])
    gemma = FORMATS["gemma"].chat_format
    assert gemma.token_ids(["<bos><start_of_turn>user\n"])[0] == list(gemma.head_ids)
    assert gemma.template == GEMMA
    assert np.ndim(gemma.pad_id) == 0


def turns_of(chat_format, messages):
    (found,) = chat_format.encode_turns([(messages, chat_format.generation_text(messages))])
    return found.ids, found.turns


LONG_TALK = [
    {"role": role, "content": f"{role} says 5 {word}: Hi there, user; the assistant {word}s."}
    for role, word in zip(
        ["user", "assistant"] * 3 + ["user"], ["one", "two", "three", "four", "five", "six", "seven"], strict=True
    )
]


@pytest.mark.parametrize("name", [*FORMATS, "tiny", "tiny transcript"])
@pytest.mark.parametrize("system", [False, True])
def test_a_prompt_without_its_oldest_turns_is_the_prompt_of_the_rest_of_the_conversation(name, system, tiny_qwen2):
    if name.startswith("tiny"):
        template = "transcript" if "transcript" in name else None
        chat_format = ChatFormat(load_tokenizer(str(tiny_qwen2)), chat_template=template)
    else:
        chat_format = FORMATS[name].chat_format
    start = [SYSTEM] if system else []
    try:
        ids, places = turns_of(chat_format, [*start, *LONG_TALK])
    except DataError:
        assert system  # a template that takes no system message
        return
    assert len(places) == 4
    for turn, place in enumerate(places):
        rest, _ = turns_of(chat_format, [*start, *LONG_TALK[2 * turn :]])
        assert chat_format.tokenizer.decode(ids[place:]).lstrip().startswith(LONG_TALK[2 * turn]["content"])
        assert chat_format.tokenizer.decode(ids[: places[0]] + ids[place:]) == chat_format.tokenizer.decode(rest)


def test_turns_that_cannot_be_told_apart_have_one_place():
    two = [USER, {"role": "user", "content": "And?"}]  # no probe shows what stands between two turns of a user
    assert turns_of(QWEN, two)[1] == [len(QWEN.token_ids(["<|im_start|>user\n"])[0])]
    shouting = chatml(CHATML.replace("m.content", "m.content | replace('t', 'T')"))
    assert len(turns_of(shouting, TALK)[1]) == 1


def test_a_token_that_holds_header_and_words_has_no_place():
    assert _tokens_at([(4, 5)], [0, 2, 4, 7]) == [2]  # the blank is a part of the token
    assert _tokens_at([(4, 5)], [0, 2, 5, 7]) == [2]  # offsets without the blank
    assert _tokens_at([(4, 5)], [0, 2, 3, 7]) is None
    assert _tokens_at([(4, 4)], [0, 2]) is None


def test_a_template_that_runs_out_of_memory_is_refused_with_that_reason(tiny_qwen2, monkeypatch):
    tokenizer = load_tokenizer(str(tiny_qwen2))

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", full)
    with pytest.raises(DataError, match=r"turns user: not enough memory$"):
        ChatFormat(tokenizer)
