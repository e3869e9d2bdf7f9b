"""The prompt around a stream: what comes before the video once, and what a question puts behind it."""

from __future__ import annotations

from typing import Any

from mmtoken.errors import InputError, UnsupportedError

PLAIN = "{video}\n{question}"
"""The prompt where neither processor nor tokenizer has a chat template."""


class StreamPrompt:
    """The processor's own chat template, parted at the video.

    Args:
        processor: has `tokenizer` and `video_token`, and a chat template or none.

    Raises:
        UnsupportedError: the processor handles no videos, or its template does not hold the video once.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        self.video_token: Any = getattr(processor, "video_token", None)
        if self.tokenizer is None or not isinstance(self.video_token, str):
            raise UnsupportedError(
                f"processor is a {type(processor).__name__} without a tokenizer and a video token; hand in the "
                "model's own processor, which reads videos."
            )
        self.before = self._parts("?")[0]

    def _render(self, question: str) -> str:
        holders: tuple[Any, ...] = (self.processor, self.tokenizer)
        if all(getattr(holder, "chat_template", None) is None for holder in holders):
            return PLAIN.format(video=self.video_token, question=question)
        holder = next(holder for holder in holders if getattr(holder, "chat_template", None) is not None)
        content = [{"type": "video"}, {"type": "text", "text": question}]
        rendered: str = holder.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return rendered

    def _parts(self, question: str) -> tuple[str, str]:
        parts = self._render(question).split(self.video_token)
        if len(parts) != 2:
            raise UnsupportedError(
                f"the chat template writes {self.video_token!r} {len(parts) - 1} times for one video; a stream needs "
                "it once, between what comes before the video and the question."
            )
        return parts[0], parts[1]

    def prefix(self) -> list[int]:
        """Token ids of what comes before the video."""
        # As processors do: a template that begins with the beginning-of-sequence token has written it itself.
        begin: Any = getattr(self.tokenizer, "bos_token", None)
        written = bool(begin) and self.before.startswith(begin)
        return self._ids(self.before, add_special_tokens=not written)

    def suffix(self, question: str) -> tuple[list[int], slice]:
        """Token ids of what comes behind the video, and which of them are the question's own words.

        Where the question's words cannot be told from the template's, all of them count.

        Raises:
            InputError: the question is empty, or holds a placeholder of images or videos.
            UnsupportedError: what comes before the video depends on the question.
        """
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"question={question!r} is no text; give a question.")
        for name in ("video_token", "image_token"):
            token = getattr(self.processor, name, None)
            if isinstance(token, str) and token in question:
                raise InputError(f"question={question!r} holds the placeholder {token!r}; leave it out.")
        before, after = self._parts(question)
        if before != self.before:
            raise UnsupportedError(
                "the chat template writes something else before the video for every question, but a stream computes "
                "that part once; use a template that puts the question behind the video."
            )
        ids = self.ids(after)
        start, found, end = after.partition(question)
        first, last = self.ids(start), self.ids(end)
        stop = len(ids) - len(last)
        if found and len(first) < stop and ids[: len(first)] == first and ids[stop:] == last:
            return ids, slice(len(first), stop)
        return ids, slice(0, len(ids))

    def ids(self, text: str) -> list[int]:
        """Token ids of text inside the video."""
        return self._ids(text, add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids
