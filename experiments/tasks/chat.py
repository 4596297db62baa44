"""How a prompt is put to a model: by its chat template where its tokenizer brings one, or else as plain text."""

from __future__ import annotations

from crypten_llm.models.tokenizer import encode_prompt, encode_rendered, has_chat_template, render_chat

_MESSAGE = "MESSAGE"


class Frame:
    """What stands around a message of the user, and its token ids. ``rendered``: a chat template wrote it."""

    def __init__(self, tokenizer):
        self.tokenizer, self.rendered = tokenizer, has_chat_template(tokenizer)
        self._before = self._behind = ""
        if self.rendered:
            text = render_chat(tokenizer, [{"role": "user", "content": _MESSAGE}])
            self._before, _, self._behind = text.partition(_MESSAGE)

    def around(self, message: str, prefix: str = "") -> str:
        """The whole prompt, up to and with ``prefix``, how the answer begins."""
        if self.rendered:
            return f"{self._before}{message}{self._behind}{prefix}"
        return f"{message} {prefix}" if prefix else message

    def ids(self, prompt: str) -> list[int]:
        return token_ids(self.tokenizer, prompt, self.rendered)


def token_ids(tokenizer, prompt: str, rendered: bool) -> list[int]:
    """As the model gets them; of what a template wrote, the special tokens are in the text."""
    return encode_rendered(tokenizer, prompt) if rendered else encode_prompt(tokenizer, prompt)
