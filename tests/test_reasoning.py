"""`<think>` parts: told apart as they stream, whatever spells the tags, and not sent back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_models import CONTROL, PHI4, USER_DEFINED, Script, say, scripted, write_chat_model
from chat_templates import PHI4_REASONING
from hypothesis import given
from hypothesis import strategies as st

import phi3c
from phi3c.chat import ChatTemplate
from phi3c.reasoning import ReasoningSplitter, without_reasoning

DEFINITION = re.compile(r"(\s*)<think>\s*(.*?)\s*(?:</think>\s*(.*)|$)", re.DOTALL)
OPENED = re.compile(r"()\s*(.*?)\s*(?:</think>\s*(.*)|$)", re.DOTALL)


def parts(text: str, *, thinking: bool = False) -> tuple[str, str]:
    """(reasoning, answer) of a whole text."""
    match = (OPENED if thinking else DEFINITION).fullmatch(text)
    return ("", text) if match is None else (match[2], match[1] + (match[3] or ""))


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<", "</", "<th", "ink>", "/think>", "think", ">", " ", "\n", "a", "é"]
)


@given(pieces=st.lists(FRAGMENTS, max_size=12), thinking=st.booleans())
def test_pieces_add_up_to_the_parts_of_the_whole(pieces: list[str], thinking: bool) -> None:
    splitter = ReasoningSplitter(thinking=thinking)
    reasoning = answer = ""
    for i, piece in enumerate(pieces):
        more_reasoning, more_answer = splitter.push(piece)
        reasoning, answer = reasoning + more_reasoning, answer + more_answer
        # what has been said can never be taken back, and nothing certain is withheld: whatever tag or text
        # may follow, the parts begin with what was given out, and the shortest of them are just that
        said = "".join(pieces[: i + 1])
        futures = [parts(said + tail, thinking=thinking) for tail in FUTURES]
        assert reasoning == shared_beginning([future[0] for future in futures])
        assert answer == shared_beginning([future[1] for future in futures])
    more_reasoning, more_answer = splitter.flush()
    assert (reasoning + more_reasoning, answer + more_answer) == parts("".join(pieces), thinking=thinking)


FUTURES = ["", "x"] + [tag[i:] + "x" for tag in ("<think>", "</think>") for i in range(len(tag))]


def shared_beginning(texts: list[str]) -> str:
    shortest, longest = min(texts), max(texts)
    for i, char in enumerate(shortest):
        if longest[i] != char:
            return shortest[:i]
    return shortest


def test_tags_and_white_space_around_them_are_in_neither_part() -> None:
    text = "<think>\nTwo and two\n\nmake four. \n</think>\n\nFour.\n"
    splitter = ReasoningSplitter(thinking=False)
    assert splitter.push(text) == ("Two and two\n\nmake four.", "Four.\n")
    assert without_reasoning(text) == "Four.\n"
    assert without_reasoning("No <think>tag</think> at the beginning") == (
        "No <think>tag</think> at the beginning"
    )


# -- of a model

TAGS = {"spelled out": {}, "user-defined": USER_DEFINED, "control": CONTROL}


@pytest.fixture(scope="module", params=TAGS, ids=lambda name: f"tags {name}")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[phi3c.Model]:
    """Phi-4-reasoning's turns; in the vocabularies met, the tags are tokens of their own or plain text."""
    tags = {tag: TAGS[request.param] for tag in ("<think>", "</think>")} if TAGS[request.param] else {}
    path = tmp_path_factory.mktemp("think") / "model.gguf"
    with phi3c.Model(write_chat_model(path, {**PHI4, **tags}, PHI4_REASONING)) as loaded:
        yield loaded


ANSWER = "<think>\nhello</ the in on \n</think>\n\nhello <b>the</b><|im_end|>"


def test_reasoning_comes_back_apart(model: phi3c.Model) -> None:
    chunks, completion = say(model, ANSWER)
    assert completion.reasoning == "hello</ the in on"
    assert completion.text == str(completion) == "hello <b>the</b>"
    assert (completion.finish_reason, completion.stop_detail) == ("stop", "eog:<|im_end|>")
    assert "".join(chunk.reasoning for chunk in chunks) == completion.reasoning
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert completion.message == {"role": "assistant", "content": completion.text}


def test_reasoning_streams(model: phi3c.Model) -> None:
    chunks, _ = say(model, ANSWER)
    assert sum(chunk.reasoning != "" for chunk in chunks) > 2
    first_text = next(i for i, chunk in enumerate(chunks) if chunk.text)
    assert not any(chunk.reasoning for chunk in chunks[first_text:])


def test_what_is_not_reasoning_is_untouched(model: phi3c.Model) -> None:
    for text in ("hello", "\n hello", "hello <think", "the</think>", " <thin"):
        _, completion = say(model, text + "<|im_end|>")
        assert completion.reasoning == ""
        assert completion.text == model.detokenize(completion.token_ids)


def test_a_thought_that_is_cut_off(model: phi3c.Model) -> None:
    n = len(Script(model, "<think>hello the").ids)
    _, completion = say(model, "<think>hello the</think>hello", max_tokens=n)
    assert (completion.reasoning, completion.text) == ("hello the", "")
    assert (completion.finish_reason, completion.stop_detail) == ("length", "max_tokens")
    n = len(Script(model, "<think>hello</thi").ids)
    _, completion = say(model, "<think>hello</thi", max_tokens=n)
    assert (completion.reasoning, completion.text) == ("hello</thi", "")


def test_nothing_thought(model: phi3c.Model) -> None:
    _, completion = say(model, "<think>\n\n</think>\n\nhello<|im_end|>")
    assert (completion.reasoning, completion.text) == ("", "hello")


def test_stop_strings_are_of_the_answer(model: phi3c.Model) -> None:
    _, completion = say(model, "<think>hello\nthe</think>\nhello\nthe<|im_end|>", stop="\n")
    assert (completion.reasoning, completion.text) == ("hello\nthe", "hello")
    assert completion.stop_detail == "stop:\n"


def test_generate_leaves_everything_as_it_is(model: phi3c.Model) -> None:
    stream = model.generate("hello", stream=True)
    script = Script(model, "<think>hello</think> the<|im_end|>")
    scripted(stream, script)
    completion = stream.result()
    assert completion.reasoning == ""
    assert completion.text == model.detokenize(script.ids)


def test_a_prompt_that_opens_the_thought(tmp_path: Path) -> None:
    source = PHI4_REASONING + "{% if add_generation_prompt %}<think>\n{% endif %}"
    with phi3c.Model(write_chat_model(tmp_path / "m.gguf", PHI4, source)) as model:
        _, completion = say(model, "hello\n</think>\n\nthe<|im_end|>")
        assert (completion.reasoning, completion.text) == ("hello", "the")
        # but not one whose user ends with the tag
        path = write_chat_model(tmp_path / "n.gguf", PHI4, "{{ messages[-1]['content'] }}")
    with phi3c.Model(path) as model:
        _, completion = say(model, "hello<|im_end|>", [{"role": "user", "content": "<think>"}])
        assert (completion.reasoning, completion.text) == ("", "hello")


def test_a_character_that_a_tag_breaks_off_is_before_it(model: phi3c.Model) -> None:
    stream = model.chat([{"role": "user", "content": "Hi"}], stream=True)
    script = Script(model, "<think>é</think>hello<|im_end|>")
    (second_byte,) = Script(model, "é").ids[1:]
    script.left.remove(second_byte)
    scripted(stream, script)
    assert (stream.result().reasoning, stream.result().text) == ("\ufffd", "hello")


def test_reasoning_is_kept_from_templates_that_would_print_it() -> None:
    source = "{% for m in messages %}{{ m.reasoning }}{{ m.reasoning_content }}{{ m.content }}{% endfor %}"
    chat = ChatTemplate(source, bos_token="", eos_token="")
    message = {"role": "assistant", "content": "A", "reasoning": ["because"], "reasoning_content": "because"}
    assert chat.render([message]) == "A"


def test_history_is_rendered_without_reasoning(model: phi3c.Model) -> None:
    _, completion = say(model, "<think>because</think>A1<|im_end|>")
    plain = {"role": "assistant", "content": "A1"}
    prompt = model.apply_chat_template([{"role": "user", "content": "U1"}, plain])
    for message in (
        completion.message,
        {**plain, "reasoning": "because"},
        {**plain, "reasoning_content": "because"},
        {"role": "assistant", "content": "<think>because</think>\n\nA1"},
    ):
        assert model.apply_chat_template([{"role": "user", "content": "U1"}, message]) == prompt
    assert "because" not in prompt
