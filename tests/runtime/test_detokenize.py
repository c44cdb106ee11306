"""Detokenisation: whole characters, stop strings wherever the pieces are cut."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from xllm.runtime.detokenize import Detokenizer, StopMatcher


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer.backend_tokenizer, ())
    return [stream.push(token_id) for token_id in ids] + [stream.finish()]


def test_characters_are_never_split(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "é€😀z"
    found = pieces(tokenizer, tokenizer.encode(text))
    assert found == ["", "é", "", "", "€", "", "", "", "😀", "z", ""]


def test_an_unfinished_character_shows_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, tokenizer.encode("a😀")[:-1]) == ["a", "", "", "", "�"]


def test_special_and_unknown_tokens_have_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "".join(pieces(tokenizer, [256, 97, 257, 9999, 98])) == "ab"


@settings(deadline=None)  # machines are busy
@given(ids=st.lists(st.integers(0, 257), max_size=40))
def test_pieces_add_up_to_the_whole(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["END", "\n\n"])
    assert [matcher.push(piece) for piece in ("a", "E", "N", "x", "\n", "b", "E")] == [
        "a", "", "", "ENx", "", "\nb", ""]
    assert matcher.flush() == "E" and matcher.flush() == "" and matcher.matched is None


def test_the_stop_that_is_complete_first_wins() -> None:
    matcher = StopMatcher(["abc", "b"])
    assert matcher.push("xabc") == "xa" and matcher.matched == "b"


def by_character(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The meaning: at the first character that completes a stop, the longest such stop ends it."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None)  # machines are busy
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(0, 30), max_size=8))
def test_cuts_do_not_matter(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, out, start = StopMatcher(stops), "", 0
    for cut in [*sorted(cuts), len(text)]:
        out += matcher.push(text[start:cut])
        start = max(start, cut)
        assert text.startswith(out)
        if matcher.matched is not None:
            break
    else:
        out += matcher.flush()
    assert (out, matcher.matched) == by_character(text, stops)


def test_stop_across_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = Detokenizer(tokenizer.backend_tokenizer, ["€!"])
    found = [stream.push(token_id) for token_id in tokenizer.encode("a€!")]
    assert "".join(found) == "a" and stream.matched_stop == "€!" and stream.finish() == ""
